"""A `Metrics` in which every series that a gateway can have has a sample."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from tercet.core import STAGES, Done, ExpertRows, FinishReason, Load, Moves, PairState, Role, StageTimes, WorkerInfo
from tercet.errors import InvalidRequest
from tercet.metrics import CHAT, Metrics

LOAD = Load(blocks_total=8, blocks_free=4, embedding_blocks_total=2, pairs=(PairState("d", "tcp", 1e9, 1e-4),))
TIMES = StageTimes(tuple((stage, 0.01) for stage in STAGES), kv_bytes=4096, transport="tcp")


def full_metrics() -> Metrics:
    infos = [WorkerInfo("w", Role.DECODE, 1, "", "", "")]
    metrics = Metrics(lambda: {"w": LOAD}, lambda: infos, {"name": "c", "topology": "pd", "model": "m"})
    metrics.watch_connections(lambda: 1, lambda: {"idle": 1})
    metrics.watch_state(lambda: True, lambda: 0)
    metrics.watch_spans(lambda: 0)
    metrics.members_told({"decode": 1}, {"w": {"role": "decode", "state": "live"}})
    metrics.experts_told({"w": [ExpertRows(0, (0, 1), (2, 3), (2, 3), (0,), 0)]})
    solved = {"solves": 1, "failures": 0, "seconds": 0.1, "gap": 0.0, "gain": 0.1}
    metrics.placement_told({"w": Moves()}, {"w": solved})
    metrics.role_switched("in_place", 0.2)
    with metrics.request(CHAT):
        pass
    metrics.answered(CHAT, 0.1, 0.01)
    metrics.spent("someone", 3, 4)
    metrics.finished(FinishReason.STOP)
    metrics.failed(InvalidRequest)
    metrics.stages(Done(FinishReason.STOP, times=TIMES))
    metrics.image_fetches.labels("fetched").inc()
    metrics.image_uuids.labels("hit").inc()
    return metrics


def described(metrics: Metrics) -> dict[str, tuple[str, str, str]]:
    """Name, as a query has it, of each family -> its type, its labels, its help."""
    found = {}
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        labels = sorted({name for sample in family.samples for name in sample.labels} - {"le"})
        name = f"{family.name}_total" if family.type == "counter" else family.name
        found[name] = (family.type, ", ".join(labels), family.documentation)
    return found


UNITS = (("bytes_per_second", "bytes/s"), ("seconds", "seconds"), ("bytes", "bytes"), ("tokens", "tokens"))
SHARES = ("perc", "balancedness", "gap", "gain")  # 0 to 1; vLLM's `perc` is one, too


def unit(name: str) -> str:
    """As the name says it; empty for what is merely counted."""
    if name.endswith(SHARES):
        return "share"
    return next((unit for part, unit in UNITS if part in name), "")


def table_rows() -> set[str]:
    """The rows that docs/metrics.md must have."""
    found = described(full_metrics())
    return {f"| `{n}` | {kind} | {labels} | {unit(n)} | {text} |" for n, (kind, labels, text) in found.items()}
