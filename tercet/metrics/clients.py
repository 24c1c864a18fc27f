"""Who asks for how much: a few series a client, and a bound on how many clients have their own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter

from tercet.errors import Cancelled, TercetError

ANONYMOUS = (
    "anonymous"  # label of a client without a name; its address is no label: personal, and there is no end of them
)
OTHER = "other"  # label of the clients beyond the bound
MOST_CLIENTS = 1000  # that have series of their own


class BoundedLabels:
    """The first `most` names keep themselves as label for the life of the process; all others share OTHER."""

    def __init__(self, most: int = MOST_CLIENTS) -> None:
        self._most = most
        self._names: set[str] = set()

    def label(self, name: str) -> str:
        if name not in self._names:
            if len(self._names) >= self._most:
                return OTHER
            self._names.add(name)
        return name


class ClientCounters:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._labels = BoundedLabels()
        self._requests = Counter(
            "tercet_client_requests",
            "Requests of a client by outcome: ok, refused (4xx), failed (5xx), cancelled",
            ["client", "outcome"],
            registry=registry,
        )
        self._prompt = Counter(
            "tercet_client_prompt_tokens",
            "Prompt tokens of a client's choices that got a first token",
            ["client"],
            registry=registry,
        )
        self._generation = Counter(
            "tercet_client_generation_tokens", "Tokens generated for a client", ["client"], registry=registry
        )

    def ended(self, name: str, error: type[TercetError] | None) -> None:
        self._requests.labels(self._labels.label(name), _outcome(error)).inc()

    def spent(self, name: str, prompt_tokens: int, generated: int) -> None:
        label = self._labels.label(name)
        self._prompt.labels(label).inc(prompt_tokens)
        self._generation.labels(label).inc(generated)


def _outcome(error: type[TercetError] | None) -> str:
    if error is None:
        return "ok"
    if issubclass(error, Cancelled):
        return "cancelled"
    return "refused" if error.http_status < 500 else "failed"
