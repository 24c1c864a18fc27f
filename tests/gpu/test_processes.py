"""Prefill and decode workers as processes on one device, over every transport that is usable there: killed in the
middle, and started again with the next epoch."""

from __future__ import annotations

import asyncio
import random
import signal

import pytest

from tercet.core import Role, TokenEvent
from tercet.kernels.triton import trial
from tercet.transfer.transports.table import ALL
from tests.chaos.test_deaths import Processes
from tests.gpu.small import GREEDY, ON_GPU, PATIENCE_S, PROMPTS, VOCAB, expected, spec_of
from tests.helpers import next_token, request_of
from tests.triton_interpreter import DEVICE

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]
LONG = {"max_tokens": 200, "ignore_eos": True, "timeout_s": PATIENCE_S}
_rng = random.Random(8)
NEW = [[_rng.randrange(VOCAB) for _ in range(n)] for n in (40, 300, 640)]  # that no cache holds


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Else each worker would compile the same kernels while its start is waited for."""
    if ON_GPU:
        assert trial.missing(DEVICE) is None


async def tokens_of(made: Processes, prompt: list[int], **params) -> list[int]:
    return [e.token_id async for e in made.router.generate(request_of(prompt, **params)) if isinstance(e, TokenEvent)]


async def answers(made: Processes) -> list[list[int]]:
    return await asyncio.gather(*(tokens_of(made, prompt, **GREEDY) for prompt in PROMPTS))


async def restart(made: Processes, role: Role, epoch: int) -> None:
    """SIGKILL, and a successor in its place, as the controller would do."""
    worker_id = f"{role.value}-0"
    made.signal(worker_id, signal.SIGKILL)
    await made.processes[worker_id].wait()
    await made.launch(role, 0, epoch)
    await made.announce()


async def kill_in_mid_stream(made: Processes) -> list[list[int]]:
    """The decode worker dies when each stream has had five tokens, the prefill worker while others are computed. The
    router tries all of them again. -> the tokens of each."""
    streams = [made.router.generate(request_of(prompt, **LONG)) for prompt in NEW]
    begun = [[await next_token(stream) for _ in range(5)] for stream in streams]
    rest = [asyncio.create_task(_rest(stream)) for stream in streams]
    await restart(made, Role.DECODE, 2)
    decoded = [first + await more for first, more in zip(begun, rest, strict=True)]
    again = [asyncio.create_task(tokens_of(made, prompt[1:], **LONG)) for prompt in NEW]
    await asyncio.sleep(0.02)
    await restart(made, Role.PREFILL, 2)
    return decoded + [await task for task in again]


async def _rest(stream) -> list[int]:
    return [event.token_id async for event in stream if isinstance(event, TokenEvent)]


@pytest.mark.parametrize("transport", [transport.name for transport in ALL])
async def test_workers_die_and_the_tokens_stay(transport):
    why = next(each for each in ALL if each.name == transport).missing()
    if why is not None:
        pytest.skip(why)
    made = Processes(spec_of(transport=transport))
    await made.start()
    try:
        assert await answers(made) == expected()
        through_deaths = await kill_in_mid_stream(made)
        await made.all_free()
        undisturbed = [await tokens_of(made, p, **LONG) for p in (*NEW, *(prompt[1:] for prompt in NEW))]
        assert through_deaths == undisturbed
        assert all(len(tokens) == 200 for tokens in undisturbed)
        assert await answers(made) == expected()
        await made.all_free()
    finally:
        await made.stop()
