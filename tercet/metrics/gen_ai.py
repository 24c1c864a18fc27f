"""The server metrics of OpenTelemetry's conventions for generative AI, in Prometheus form.

Names, units, attributes and buckets are those of opentelemetry.io's page "Semantic conventions for generative AI
metrics"; a dot is an underscore here, and `error.type` is empty where there was no error. `server.address` and
`server.port` are left out: Prometheus's own label `instance` says them.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Histogram

from tercet.errors import TercetError

CHAT, TEXT_COMPLETION = "chat", "text_completion"  # gen_ai.operation.name
_PROVIDER = "tercet"
_LABELS = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model")
_DURATION_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)


class GenAi:
    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        """model: the one that is served; that a request asks for another one in vain makes no label."""
        self._model = model
        self._duration = Histogram(
            "gen_ai_server_request_duration_seconds",
            "Request to a generating endpoint, from its head to its last byte, however it ends",
            [*_LABELS, "error_type"],
            buckets=_DURATION_S,
            registry=registry,
        )
        self._first = Histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "Time to the first token of the first choice, of requests that were answered in full",
            _LABELS,
            buckets=_FIRST_S,
            registry=registry,
        )
        self._token = Histogram(
            "gen_ai_server_time_per_output_token_seconds",
            "Mean time per token after the first one, of the first choice; of requests that were answered in full",
            _LABELS,
            buckets=_TOKEN_S,
            registry=registry,
        )

    def ended(self, operation: str, error: type[TercetError] | None, seconds: float) -> None:
        code = "" if error is None else error.code()
        self._duration.labels(operation, _PROVIDER, self._model, code).observe(seconds)

    def answered(self, operation: str, ttft_s: float, tpot_s: float | None) -> None:
        """tpot_s: None if there was one token alone."""
        self._first.labels(operation, _PROVIDER, self._model).observe(ttft_s)
        if tpot_s is not None:
            self._token.labels(operation, _PROVIDER, self._model).observe(tpot_s)
