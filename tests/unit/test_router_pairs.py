"""Pairs of workers: which one misses transfer.min_bandwidth, and where each is reached."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tercet.core import GenerateRequest, PairState, Role, SamplingParams, WorkerInfo
from tercet.roles.router.decisions import Decisions
from tercet.roles.router.effects import Introduce, Part, StartLeg
from tercet.roles.router.pairs import slow_pair
from tercet.spec import LimitsSpec

FAST, SLOW = PairState("decode-0", "tcp", 2e9, 1e-4), PairState("decode-1", "tcp", 1e6, 1e-4)
BROKEN = PairState("decode-1", fault="connection refused")


@pytest.mark.parametrize(
    ("states", "floor", "want"),
    [
        ([FAST, SLOW], 0, ""),
        ([FAST, SLOW], 1e6, ""),
        (
            [FAST, SLOW],
            1e8,
            "prefill-0 to decode-1: 1,000,000 bytes/s by tcp; transfer.min_bandwidth is 100,000,000",
        ),
        ([FAST], 1e8, "prefill-0 to decode-1: not measured yet"),
        ([FAST, BROKEN], 1e8, "prefill-0 to decode-1: connection refused"),
    ],
)
def test_the_pair_that_misses_the_floor_is_named(states, floor, want):
    found = slow_pair({"prefill-0": states}, ["decode-0", "decode-1"], floor)
    assert found.startswith(want)
    assert bool(found) == bool(want)


def test_a_worker_that_is_reached_elsewhere_keeps_its_legs_and_is_introduced_anew():
    roles = (Role.PREFILL, Role.DECODE)
    router = Decisions(roles, dict.fromkeys(roles, 4), LimitsSpec())
    prefill, decode = (WorkerInfo(f"{role.value}-0", role, 1, "127.0.0.1:1", role.value, "same") for role in roles)
    sends, gets = router.set_workers([prefill, decode])[0]
    for view in (sends, gets):
        router.on_up(view, 0.0)
    request = GenerateRequest("r", (1, 2), SamplingParams(), 60.0)
    _, effects = router.submit(request, "r", 0.0)
    assert [effect.leg.peer for effect in effects if isinstance(effect, StartLeg)] == ["", "decode"]
    elsewhere = replace(decode, transfer_endpoint="elsewhere")
    assert router.set_workers([prefill, elsewhere]) == ([], [Introduce(sends, ["elsewhere"])])
    _, effects = router.submit(replace(request, request_id="s"), "s", 0.0)
    legs = {effect.worker: effect.leg.peer for effect in effects if isinstance(effect, StartLeg)}
    assert legs == {gets: "", sends: "elsewhere"}
    new, effects = router.set_workers([prefill, replace(elsewhere, epoch=2)])
    assert len(new) == 1
    assert Part(gets) in effects
