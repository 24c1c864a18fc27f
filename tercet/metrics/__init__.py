"""What a gateway counts, under the names that users of vLLM know with the prefix `tercet_` (docs/metrics.md).

    gateway.py   requests, their times and tokens      clients.py  by client, with a bound on clients
    gen_ai.py    OpenTelemetry's three histograms      ports.py    connections, readiness, the line
    workers.py   from workers' reports and the controller          experts.py  mixtures of experts

    gateway --observe--> Metrics --collected()--> GET /metrics
    router  --loads()--> WorkerGauges (read at each scrape, so that a dead worker's series ends with it)

A success and a failure are counted where the answer leaves; a 4xx has its own code and is never a worker's fault.
"""

from tercet.metrics.clients import ANONYMOUS
from tercet.metrics.experts import Placing
from tercet.metrics.gateway import Asked, Metrics, encoder_for
from tercet.metrics.gen_ai import CHAT, TEXT_COMPLETION
from tercet.metrics.workers import Members

__all__ = ["ANONYMOUS", "CHAT", "TEXT_COMPLETION", "Asked", "Members", "Metrics", "Placing", "encoder_for"]
