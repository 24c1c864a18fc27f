"""Tokens go to the experts' ranks and back, by both exchanges, between processes of their own."""

from __future__ import annotations

import os
import signal
import time
from itertools import chain

import numpy as np
import pytest
import torch

from tercet.distributed import collective_exchange, direct_exchange
from tercet.distributed.exchange import expected_bytes
from tercet.errors import InternalError, PeerDown, ProtocolViolation, RankLost, UnsupportedSpec
from tercet.kernels.moe import ELSEWHERE
from tests.exchanges import Case, Out, Rank, ask_all, collective, direct

HEADERS = {"collective": collective_exchange.HEADER_BYTES, "direct": direct_exchange.HEADER_BYTES}
TOKENS = {1: (5,), 2: (7, 3), 3: (4, 0, 9), 4: (3, 1, 0, 8)}


@pytest.fixture(scope="module")
def pool():
    found: list[Rank] = []
    yield found
    for rank in found:
        rank.stop()


@pytest.fixture
def ranks(pool):
    """Four processes, new ones in place of those that a test has ended."""
    for rank in pool:
        if not rank.alive:
            rank.stop()
    pool[:] = [rank for rank in pool if rank.alive]
    pool += [Rank() for _ in range(4 - len(pool))]
    return pool


def cases(size: int) -> list[Case]:
    tokens = TOKENS[size]
    return [
        *(Case(tokens, k=k, routing=routing, seed=k) for k in (1, 2, 3, 4) for routing in ("even", "skewed", "one")),
        *(Case(tokens, dtype=torch.bfloat16, k=k, seed=20 + k) for k in (1, 3)),
        *(
            Case(tokens, width=width, scales=True, dtype=dtype)
            for width in (1, 5)
            for dtype in (torch.bfloat16, torch.float16)
        ),
        Case(tokens, layers=5, k=3, seed=30),
        Case((0,) * size, layers=2),
        Case((1,) * size, k=4, seed=31),
        Case(tuple(reversed(tokens)), seed=32),
        Case((150,) * size, width=512, k=4, seed=33),  # more than a socket's buffer
    ]


def run(ranks: list[Rank], which: str, tmp_path, wanted: list[Case]) -> list[list[list[Out]]]:
    """-> rank -> case -> layer -> Out."""
    if which == "collective":
        collective(ranks, os.fspath(tmp_path / "store"), wanted[0].slots_per_rank)
    else:
        direct(ranks, wanted[0].slots_per_rank, tcp=which == "direct over TCP")
    return ask_all(ranks, "run", wanted)


def check(wanted: list[Case], found: list[list[list[Out]]], header: int) -> None:
    for number, case in enumerate(wanted):
        tolerance = 1e-5 if case.dtype == torch.float32 else 3e-2 if case.dtype == torch.bfloat16 else 3e-3
        for layer in range(case.layers):
            expected, chosen = case.map(), [case.batch(layer, rank) for rank in range(len(case.tokens))]
            slots = [expected.choose(experts, rank, layer) for rank, (_, experts, _) in enumerate(chosen)]
            for rank in range(len(case.tokens)):
                out, whole = found[rank][number][layer], case.expected(layer, rank).numpy()
                assert np.abs(out.y - whole).max(initial=0) <= tolerance * max(1e-9, np.abs(whole).max(initial=0))
                check_received(case, rank, slots, layer, out)
                row_bytes = case.width * case.dtype.itemsize
                assert out.sent == expected_bytes(slots, rank, case.slots_per_rank, row_bytes, header)
                assert sum(out.sent_to) == out.sent.total
                assert out.sent_to[rank] == 0


def check_received(case: Case, rank: int, slots: list[torch.Tensor], layer: int, out: Out) -> None:
    """Row by row: each comes once, if any of its slots is on this rank, with its slots there and all its weights."""
    rows, first = [], rank * case.slots_per_rank
    for source, chosen in enumerate(slots):
        x, _, weights = case.batch(layer, source)
        for row, numbers in enumerate(chosen.tolist()):
            here = [slot - first if 0 <= slot - first < case.slots_per_rank else ELSEWHERE for slot in numbers]
            if set(here) != {ELSEWHERE}:
                rows.append((x[row].tolist(), here, weights[row].tolist()))
    assert list(zip(*(part.tolist() for part in out.received), strict=True)) == rows


def same(first: list[list[list[Out]]], second: list[list[list[Out]]]) -> None:
    for ours, theirs in zip(first, second, strict=True):
        for a, b in zip(chain.from_iterable(ours), chain.from_iterable(theirs), strict=True):
            assert np.array_equal(a.y, b.y)
            assert all(np.array_equal(x, y) for x, y in zip(a.received, b.received, strict=True))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_both_exchanges_give_what_one_process_gives_and_send_what_the_formula_says(ranks, size, tmp_path):
    wanted = cases(size)
    found = {which: run(ranks[:size], which, tmp_path, wanted) for which in HEADERS}
    for which, outs in found.items():
        check(wanted, outs, HEADERS[which])
    same(found["collective"], found["direct"])


def test_direct_links_between_hosts_are_tcp_and_give_the_same(ranks, tmp_path):
    wanted = cases(3)
    unix, tcp = (run(ranks[:3], which, tmp_path, wanted) for which in ("direct", "direct over TCP"))
    check(wanted, tcp, HEADERS["direct"])
    same(unix, tcp)


SURVIVABLE = Case((3, 2, 4), experts=4, spare=4, seed=5)  # all experts lie on any two of its ranks
LARGE = Case((400, 400, 400), experts=4, spare=4, width=2048, scales=True)  # no socket's buffer takes its frames


def check_without(case: Case, survivors: dict[int, Rank]) -> None:
    found = ask_all(list(survivors.values()), "run", [case])
    for (number, _), [[out]] in zip(survivors.items(), found, strict=True):
        assert np.allclose(out.y, case.expected(0, number).numpy(), rtol=1e-5, atol=1e-6)


def go_on(survivors: dict[int, Rank], lost: int, attempt: int, number: int = 0) -> None:
    ask_all(list(survivors.values()), "call", "without", [lost])
    ask_all(list(survivors.values()), "call", "resume", attempt, number)


def rejoin(pool: list[Rank], survivors: dict[int, Rank], lost: int, attempt: int) -> list[Rank]:
    """-> all ranks, with a new process for the lost one."""
    pool.append(newcomer := Rank())
    newcomer.ask("listen", lost, 3, SURVIVABLE.slots_per_rank, 20.0, False)
    endpoint = newcomer.answer()
    newcomer.ask("call", "join", list(survivors))
    ask_all(list(survivors.values()), "call", "rejoin", lost, endpoint)
    assert newcomer.answer() is None
    everyone = [rank for _, rank in sorted({**survivors, lost: newcomer}.items())]
    ask_all(everyone, "call", "resume", attempt, 7)
    return everyone


def check_lost(survivors: dict[int, Rank], lost: int, since: float, within: tuple[float, float]) -> None:
    for rank in survivors.values():
        error = rank.answer()
        assert isinstance(error, RankLost), error
        assert error.rank == lost
        assert str(lost) in str(error)
        assert within[0] <= rank.answered - since < within[1]


@pytest.mark.parametrize("lost", [0, 1, 2])
@pytest.mark.parametrize("verb", ["dispatch", "combine"])
def test_survivors_of_a_killed_rank_name_it_go_on_and_take_a_new_one_in(ranks, verb, lost):
    direct(ranks[:3], SURVIVABLE.slots_per_rank)
    if verb == "combine":
        ask_all(ranks[:3], "prepare", SURVIVABLE)
    survivors = {number: rank for number, rank in enumerate(ranks[:3]) if number != lost}
    for rank in survivors.values():
        rank.ask(*(["combine"] if verb == "combine" else ["prepare", SURVIVABLE]))
    time.sleep(0.2)
    killed = time.monotonic()
    ranks[lost].signal(signal.SIGKILL)
    check_lost(survivors, lost, killed, (0.0, 1.0))
    for rank in survivors.values():  # until they are told to go on, they refuse
        rank.ask("prepare", SURVIVABLE)
        assert isinstance(refusal := rank.answer(), InternalError), refusal
        assert "has to be resumed" in str(refusal)
    go_on(survivors, lost, attempt=1)
    if verb == "combine":
        for rank in survivors.values():  # what was dispatched before is of no use any more
            rank.ask("combine")
            assert isinstance(error := rank.answer(), InternalError), error
            assert "a handle of attempt 0; this is attempt 1" in str(error)
    check_without(SURVIVABLE, survivors)
    check_without(SURVIVABLE, survivors)
    everyone = rejoin(ranks, survivors, lost, attempt=2)
    check([SURVIVABLE], ask_all(everyone, "run", [SURVIVABLE]), HEADERS["direct"])
    assert ask_all(everyone, "look", "number", "active") == [[8, (True,) * 3]] * 3


def test_two_ranks_that_die_at_once_are_taken_out_one_after_the_other(ranks):
    case = Case((3, 2, 4, 1), experts=4, spare=7, k=3, seed=6)
    direct(ranks, case.slots_per_rank)
    survivors = {0: ranks[0], 2: ranks[2]}
    for rank in survivors.values():
        rank.ask("prepare", case)
    for lost in (1, 3):
        ranks[lost].signal(signal.SIGKILL)
    named: dict[int, set[int]] = {number: set() for number in survivors}
    for attempt in (1, 2):
        for number, rank in survivors.items():
            error = rank.answer()
            assert isinstance(error, RankLost), error
            named[number].add(error.rank)
            rank.ask("call", "without", [error.rank])
            assert rank.answer() is None
        ask_all(list(survivors.values()), "call", "resume", attempt, 0)
        for rank in survivors.values():
            rank.ask("prepare", case)
    assert named == {0: {1, 3}, 2: {1, 3}}
    assert [rank.answer() for rank in survivors.values()] == [None, None]
    found = ask_all(list(survivors.values()), "combine")
    for number, y in zip(survivors, found, strict=True):
        assert np.allclose(y, case.expected(0, number).numpy(), rtol=1e-5, atol=1e-6)


def test_a_rank_killed_amid_its_payload_is_lost_and_frames_that_were_cut_short_are_ended_and_dropped(ranks):
    direct(ranks[:3], LARGE.slots_per_rank)
    for rank in (ranks[0], ranks[2]):  # both are stuck: rank 1 does not read
        rank.ask("prepare", LARGE)
    time.sleep(0.5)
    ranks[2].signal(signal.SIGKILL)
    killed = time.monotonic()
    check_lost({0: ranks[0]}, 2, killed, (0.0, 1.0))
    ranks[1].ask("prepare", LARGE)
    check_lost({1: ranks[1]}, 2, killed, (0.0, 10.0))
    survivors = {0: ranks[0], 1: ranks[1]}
    go_on(survivors, 2, attempt=1)
    check_without(LARGE, survivors)
    assert ask_all(ranks[:2], "look", "dropped") == [[1], [1]]
    check_without(LARGE, survivors)


@pytest.mark.parametrize("verb", ["dispatch", "combine"])
def test_a_stopped_rank_is_lost_after_the_timeout_and_hears_of_it_when_it_wakes_up(ranks, verb):
    direct(ranks[:3], SURVIVABLE.slots_per_rank, timeout_s=1.0)
    ask_all(ranks[:3], "run", [SURVIVABLE])
    if verb == "combine":
        ask_all(ranks[:3], "prepare", SURVIVABLE)
    ranks[1].signal(signal.SIGSTOP)
    began, survivors = time.monotonic(), {0: ranks[0], 2: ranks[2]}
    for rank in survivors.values():
        rank.ask(*(["combine"] if verb == "combine" else ["prepare", SURVIVABLE]))
    try:
        check_lost(survivors, 1, began, (1.0, 3.0))
        go_on(survivors, 1, attempt=1, number=1)
        check_without(SURVIVABLE, survivors)
    finally:
        ranks[1].signal(signal.SIGCONT)
    ranks[1].ask(*(["combine"] if verb == "combine" else ["prepare", SURVIVABLE]))
    assert isinstance(error := ranks[1].answer(), RankLost), error


@pytest.mark.parametrize("which", ["collective", "direct"])
def test_ranks_at_different_layers_name_both(ranks, which, tmp_path):
    case = Case((2, 2), layers=2, seed=3)
    run(ranks[:2], which, tmp_path, [case])
    for layer, rank in enumerate(ranks[:2]):
        rank.ask("prepare", case, layer)
    for layer, rank in enumerate(ranks[:2]):
        error = rank.answer()
        assert isinstance(error, ProtocolViolation), error
        assert f"layer {layer}" in str(error)
        assert f"layer {1 - layer}" in str(error)


def test_ranks_at_different_exchanges_name_both_numbers(ranks):
    case = Case((2, 2), seed=3)
    direct(ranks[:2], case.slots_per_rank)
    ranks[0].ask("call", "resume", 1, 4)
    ranks[1].ask("call", "resume", 1, 5)
    assert [rank.answer() for rank in ranks[:2]] == [None, None]
    for rank in ranks[:2]:
        rank.ask("prepare", case)
    for rank in ranks[:2]:
        error = rank.answer()
        assert isinstance(error, ProtocolViolation), error
        assert "exchange 4" in str(error)
        assert "exchange 5" in str(error)


def test_a_collective_exchange_says_that_it_cannot_go_on_without_a_rank(ranks, tmp_path):
    run(ranks[:2], "collective", tmp_path, [Case((1, 1))])
    ranks[0].ask("call", "without", [1])
    assert isinstance(error := ranks[0].answer(), UnsupportedSpec), error
    assert "collective exchange cannot go on without ranks [1]" in str(error)


def test_a_rank_that_dies_in_a_collective_exchange_is_an_error_at_the_others(ranks, tmp_path):
    case = Case((2, 2))
    run(ranks[:2], "collective", tmp_path, [case])
    ranks[0].ask("prepare", case)
    ranks[1].signal(signal.SIGKILL)
    assert isinstance(error := ranks[0].answer(), PeerDown), error
    assert "all-to-all of counts failed" in str(error)
