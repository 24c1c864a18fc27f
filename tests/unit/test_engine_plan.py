"""A plan is data: it goes through a pipe, and what comes out of it in another process is what comes out of it here."""

from __future__ import annotations

import dataclasses
import multiprocessing
import random
from multiprocessing.connection import Connection
from types import SimpleNamespace

import msgpack
import pytest

from tercet.core import SamplingParams, Ticket, TokenEvent
from tercet.engine.executor import Launched, LocalExecutor
from tercet.engine.plan import Draw, Piece, PieceResult, Push, Seen, StepPlan, StepResult, pack, unpack
from tercet.engine.runner import Runner
from tercet.transfer.memory.region import Region
from tests.engines import SIZE, Running, load_tiny
from tests.tiny import VOCAB

BLOCKS = 200


def piece_of(rng: random.Random) -> Piece:
    """Any piece, each field in each of its forms."""
    length = rng.choice([1, 1, 5, 300])
    ids = [rng.randrange(VOCAB) for _ in range(length)]
    values = {
        "seed": rng.choice([None, 7, 2**63]),
        "stop_token_ids": tuple(ids[: rng.randrange(3)]),
        "top_p": rng.random(),
        "logprobs": rng.choice([None, 0, 20]),
    }
    draw = Draw(SamplingParams(**values), rng.randrange(9), ids[:2], ids[2:5])
    push = Push(rng.randrange(9), list(range(rng.randrange(1, 9))), rng.randrange(16))
    return Piece(
        Ticket("ré" * rng.randrange(1, 9), rng.randrange(3), rng.randrange(3)),
        ids,
        rng.randrange(900),
        list(range(rng.randrange(1, 60))),
        rng.choice([None, draw]),
        rng.choice([None, push]),
        ids[: rng.randrange(2)],
        rng.randrange(21),
        rng.choice([-1, 0, 7]),
        [Seen(*(rng.randrange(300) for _ in range(4))) for _ in range(rng.randrange(3))],
        rng.choice([(), [ids, ids, ids]]),
        -rng.randrange(90),
    )


def plain(value):
    """With lists for tuples: which of them a field is, nobody minds."""
    if isinstance(value, SamplingParams):
        value = dataclasses.astuple(value)
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("seed", range(50))
def test_what_is_packed_is_unpacked(seed):
    rng = random.Random(seed)
    plan = StepPlan([piece_of(rng) for _ in range(rng.randrange(4))], [piece_of(rng) for _ in range(rng.randrange(3))])
    again = unpack(pack(plan))
    assert plain(again) == plain(plan)
    assert isinstance(again, StepPlan)
    for one, other in zip(again.pieces, plan.pieces, strict=True):
        assert (type(one), type(one.ticket), one.end) == (Piece, Ticket, other.end)
        assert type(one.draw) is type(other.draw)
        assert type(one.push) is type(other.push)
        assert [*map(type, one.seen)] == [*map(type, other.seen)]
        assert one.draw is None or one.draw.params == other.draw.params


# ---- a rank elsewhere


def rank(pipe: Connection) -> None:
    """Runs each plan that comes, over a cache of its own; answers with tokens, or why there is none."""
    model = load_tiny().model
    executor = LocalExecutor(Runner(model, Region(model.kv_layout(BLOCKS, SIZE))))
    while packed := pipe.recv_bytes():
        results = executor.launch(unpack(packed)).result()
        pipe.send_bytes(msgpack.packb([[token.token_id for token in result.tokens] for result in results]))


class TwoRanks:
    """Every plan runs here and in another process, in step; the tokens are the other one's."""

    rank, world_size, ahead = 0, 2, False

    def __init__(self, runner: Runner) -> None:
        self._here = LocalExecutor(runner)
        self.vocab_size = runner.vocab_size
        self.layers_done = 0
        self._pipe, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(target=rank, args=(theirs,), daemon=True)
        self._process.start()

    def launch(self, plan: StepPlan) -> Launched:
        self._pipe.send_bytes(pack(plan))
        step = self._here.launch(plan)
        return SimpleNamespace(result=lambda: self._result(step.result()))

    def _result(self, here: StepResult) -> StepResult:
        there = [PieceResult([TokenEvent(i) for i in ids]) for ids in msgpack.unpackb(self._pipe.recv_bytes())]
        assert [[t.token_id for t in r.tokens] for r in here] == [[t.token_id for t in r.tokens] for r in there]
        self.layers_done = self._here.layers_done
        return there

    def close(self) -> None:
        self._pipe.send_bytes(b"")
        self._process.join(10)
        assert self._process.exitcode == 0


def test_two_ranks_over_a_pipe_give_the_tokens_of_one():
    """With preemption, prefix hits, chunks of every length, and every kind of draw."""
    rng = random.Random(4)
    text = [rng.randrange(VOCAB) for _ in range(300)]
    kinds = [{"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9}, {"repetition_penalty": 1.3}, {"logprobs": 3}]
    wanted = [
        (
            text[: rng.choice([1, 16, 17, 130, 300])],
            SamplingParams(max_tokens=rng.choice([1, 5, 40]), seed=n, ignore_eos=True, **kinds[n % len(kinds)]),
        )
        for n in range(24)
    ]
    told = []
    for make in (LocalExecutor, TwoRanks):
        running = Running(load_tiny(), budget=100, blocks=BLOCKS, max_running=6, prefix=True, executor=make)
        sequences = [running.add(n, ids, params) for n, (ids, params) in enumerate(wanted)]
        outputs = dict(running.done.get(timeout=60) for _ in sequences)
        told.append([outputs[sequence] for sequence in sequences])
        running.stop()
        if isinstance(running.executor, TwoRanks):
            running.executor.close()
    assert told[0] == told[1]
