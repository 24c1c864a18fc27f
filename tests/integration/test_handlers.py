"""A worker is one engine and the handlers that it serves: any mix of them, with the tokens of any other."""

from __future__ import annotations

import asyncio
import contextlib
import random
import uuid

import pytest

from tercet.core import Admitted, Done, Leg, Progress, Role, SamplingParams, Ticket, TokenEvent, WorkerInfo
from tercet.errors import ProtocolViolation, TercetError
from tercet.roles.worker import Worker
from tercet.wire.worker_client import WorkerLink
from tercet.wire.worker_server import ReportStream
from tests.helpers import TOKEN, cluster, spec_of
from tests.tiny import VOCAB, tiny_model

rng = random.Random(8)
PROMPTS = [[rng.randrange(VOCAB) for _ in range(n)] for n in (1, 15, 16, 17, 40, 63, 64, 65, 120)]
PARAMS = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
ALL = (Role.PREFILL, Role.DECODE, Role.AGGREGATED)


class Host:
    """A worker that serves the given kinds, and a link to it."""

    def __init__(self, name: str, serves: tuple[Role, ...]) -> None:
        spec = spec_of("pd", source=tiny_model(), scheduler__max_running=64)
        self.worker = Worker(name, Role.PREFILL, 1, spec, "127.0.0.1", TOKEN, serves)
        self.heard: dict[Ticket, asyncio.Queue] = {}

    async def start(self) -> None:
        self.info: WorkerInfo = await self.worker.start()
        up = asyncio.Event()
        self.link = WorkerLink(self.info, TOKEN, self.hear, lambda load: None, lambda fault: up.set())
        await asyncio.wait_for(up.wait(), 10)

    def hear(self, reports) -> None:
        for ticket, outcome in reports:
            self.heard[ticket].put_nowait(outcome)

    def begin(self, ticket: Ticket, kind: Role, prompt: list[int], peer: str = "") -> None:
        self.heard[ticket] = asyncio.Queue()
        self.link.start(Leg(ticket, kind, tuple(prompt), len(prompt), PARAMS, 30.0, peer))

    async def end_of(self, ticket: Ticket) -> list:
        """All outcomes of a leg, its last one behind."""
        outcomes = []
        while not outcomes or isinstance(outcomes[-1], Admitted | TokenEvent | Progress):
            outcomes.append(await asyncio.wait_for(self.heard[ticket].get(), 30))
        return outcomes

    async def stop(self) -> None:
        await self.link.close()
        await self.worker.stop()


@contextlib.asynccontextmanager
async def hosts(*serves: tuple[Role, ...]):
    made = [Host(f"worker-{number}", kinds) for number, kinds in enumerate(serves)]
    for host in made:
        await host.start()
    try:
        yield made
        for host in made:
            for _ in range(500):
                load = host.worker.engine.load()
                if load.blocks_free == load.blocks_total and not load.running:
                    break
                await asyncio.sleep(0.02)
            host.worker.engine.check_integrity()
            assert load.blocks_free == load.blocks_total, f"blocks leak: {load}"
    finally:
        for host in made:
            await host.stop()


async def handed_over(prompt: list[int], prefill: Host, decode: Host) -> list[int]:
    ticket = Ticket(uuid.uuid4().hex, 0, 1)
    decode.begin(ticket, Role.DECODE, prompt)
    prefill.begin(ticket, Role.PREFILL, prompt, decode.info.transfer_endpoint)
    there, here = await asyncio.gather(prefill.end_of(ticket), decode.end_of(ticket))
    assert isinstance(there[-1], Done), there
    return tokens_of(here)


async def in_one(prompt: list[int], host: Host) -> list[int]:
    ticket = Ticket(uuid.uuid4().hex, 0, 1)
    host.begin(ticket, Role.AGGREGATED, prompt)
    return tokens_of(await host.end_of(ticket))


def tokens_of(outcomes: list) -> list[int]:
    assert isinstance(outcomes[-1], Done), outcomes
    return [event.token_id for event in outcomes if isinstance(event, TokenEvent)]


async def test_workers_that_serve_every_kind_give_the_same_tokens():
    """All kinds at once on both, handed over in both directions: what `aggregated` gives alone."""
    async with cluster(spec_of("aggregated", decoders=1, source=tiny_model())) as made:
        expected = [[e.token_id for e in (await made.generate(p, max_tokens=6, ignore_eos=True))[0]] for p in PROMPTS]
    async with hosts(ALL, ALL) as (one, other):
        jobs = [
            job
            for prompt in PROMPTS
            for job in (
                handed_over(prompt, one, other),
                handed_over(prompt, other, one),
                in_one(prompt, one),
                in_one(prompt, other),
            )
        ]
        got = await asyncio.gather(*jobs)
    assert got == [tokens for tokens in expected for _ in range(4)]


@pytest.mark.parametrize("serves", [(Role.PREFILL,), (Role.DECODE,), (Role.AGGREGATED,), (Role.PREFILL, Role.DECODE)])
async def test_a_leg_of_another_kind_is_refused_by_name(serves):
    async with hosts(serves) as [host]:
        for kind in set(ALL) - set(serves):
            ticket = Ticket(uuid.uuid4().hex, 0, 1)
            host.begin(ticket, kind, PROMPTS[3])
            [error] = await host.end_of(ticket)
            assert isinstance(error, ProtocolViolation)
            assert str(error) == f"{kind} legs are not served here, only {', '.join(serves)}"


async def test_legs_of_every_kind_are_given_up():
    """Aborted at any moment, by their own kind of handler: no block stays."""
    async with hosts(ALL, ALL) as (one, other):
        for number in range(30):
            ticket, prompt = Ticket(uuid.uuid4().hex, 0, 1), PROMPTS[number % len(PROMPTS)]
            other.begin(ticket, Role.DECODE, prompt)
            one.begin(ticket, Role.PREFILL, prompt, other.info.transfer_endpoint)
            alone = Ticket(uuid.uuid4().hex, 0, 1)
            one.begin(alone, Role.AGGREGATED, prompt)
            await asyncio.sleep(rng.choice([0, 0.002, 0.01]))
            for host, what in ((one, ticket), (other, ticket), (one, alone)):
                host.worker.legs.abort(what)


async def test_every_kind_ends_when_the_engine_dies():
    async with hosts(ALL) as [host]:
        tickets = [Ticket(uuid.uuid4().hex, 0, 1) for _ in ALL]
        for ticket, kind in zip(tickets, ALL, strict=True):
            host.begin(ticket, kind, PROMPTS[-1], host.info.transfer_endpoint)
        host.worker.legs.die(TercetError("broken on purpose"))
        for ticket in tickets:
            assert "broken on purpose" in str((await host.end_of(ticket))[-1])


@pytest.mark.parametrize("kind", [Role.AGGREGATED, Role.DECODE])
async def test_a_report_that_cannot_be_passed_on_costs_only_its_own_leg(kind, monkeypatch):
    """Both run in the same steps; the end of the first to end cannot be put into a message."""
    finished = ReportStream.finished

    def stumbles(stream, leg, done):
        if len(leg.token_ids) == len(PROMPTS[2]) and leg.kind is kind:
            raise ValueError("out of range")
        finished(stream, leg, done)

    async with hosts(ALL, ALL) as (one, other):
        ask = (lambda p: in_one(p, one)) if kind is Role.AGGREGATED else (lambda p: handed_over(p, other, one))
        expected = [await ask(prompt) for prompt in (PROMPTS[3], PROMPTS[4])]
        monkeypatch.setattr(ReportStream, "finished", stumbles)
        faulty, *others = await asyncio.gather(*map(ask, PROMPTS[2:5]), return_exceptions=True)
        assert "unexpected ValueError: out of range" in str(faulty)
        assert others == expected
