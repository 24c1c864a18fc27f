"""Whether every pair of a prefill and a decode worker is as fast as the spec asks. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tercet.core import PairState


def slow_pair(pairs: Mapping[str, Iterable[PairState]], decodes: Iterable[str], floor: float) -> str:
    """Why the first pair that misses `floor` (bytes/s) does; empty if none does.

    pairs: prefill worker -> what it was measured at. decodes: the live decode workers.
    """
    if not floor:
        return ""
    wanted = list(decodes)
    for prefill, states in pairs.items():
        known = {state.worker_id: state for state in states}
        for decode in wanted:
            state = known.get(decode)
            if state is None or state.bandwidth < floor:
                return f"{prefill} to {decode}: {_speed(state)}; transfer.min_bandwidth is {floor:,.0f} bytes/s"
    return ""


def _speed(state: PairState | None) -> str:
    if state is None:
        return "not measured yet"
    return state.fault or f"{state.bandwidth:,.0f} bytes/s by {state.transport}"
