"""Hundreds of mixed requests in bursts, with random aborts, in a pool that is too small: whichever kernels compute, all
tokens are those that another set of kernels gives to each request alone."""

from __future__ import annotations

import functools
import queue
import random
import time

import pytest

from tercet.core import SamplingParams
from tercet.kernels.kinds import Kernels
from tercet.kernels.native import trial
from tests.engines import Running, load_tiny
from tests.few import few
from tests.tiny import VOCAB


def requests(count: int) -> list[tuple[list[int], SamplingParams]]:
    rng = random.Random(9)
    made = []
    for number in range(count):
        length = rng.choice([1, 2, 15, 16, 17, rng.randrange(1, 60), rng.randrange(60, 200)])
        prompt = [rng.randrange(VOCAB) for _ in range(length)]
        if number % 3 == 0 and number:  # shares a prefix with the request before
            prompt = (made[-1][0][:48] + prompt)[:220]
        sampled = {} if number % 2 else {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1}
        sampled |= {"seed": number, "max_tokens": rng.randrange(1, 20), "ignore_eos": True}
        made.append((prompt, SamplingParams(**{"temperature": 0.0} | sampled)))
    return made


@functools.cache
def alone(count: int) -> dict[int, list[int]]:
    """The tokens of each request alone, by torch."""
    running, tokens = Running(load_tiny(), max_running=1), {}
    for number, (prompt, params) in enumerate(requests(count)):
        running.add(number, prompt, params)
        _, tokens[number] = running.done.get(timeout=30)
    running.stop()
    return tokens


@pytest.mark.parametrize("kind", ["torch", "native"])
@pytest.mark.parametrize("count", few([400, 1000], 1))
def test_many_requests(kind, count):
    if kind == "native" and trial.missing() is not None:
        pytest.skip(trial.missing())
    rng, loaded, expected = random.Random(4), load_tiny(Kernels(kind)), alone(count)
    running = Running(loaded, budget=96, blocks=48, max_running=12, prefix=True)
    waiting, going, over, aborted = list(enumerate(requests(count))), {}, 0, 0
    while waiting or going:
        for number, (prompt, params) in waiting[: rng.choice([0, 1, 5, 60]) if len(going) < 200 else 0]:
            going[number] = running.add(number, prompt, params)
            waiting.pop(0)
        while True:
            try:
                sequence, tokens = running.done.get(timeout=5 if going and not waiting else 0.002)
            except queue.Empty:
                break
            number = int(sequence.ticket.request_id[1:])
            if going.pop(number, None) is None:
                continue  # aborted when it was just over
            assert tokens == expected[number], number
            over += 1
            if not going:
                break
            if over % 30 == 0:  # however fast they are
                number = rng.choice([*going])
                sequence = going.pop(number)
                running.engine.abort(sequence)
                time.sleep(0.002)  # the step that it was in is over, or its tokens are still right
                got = running.outputs.get(sequence, [])
                assert got == expected[number][: len(got)], number
                aborted += 1
    running.stop()
    assert over + aborted == count
    assert over > 0.8 * count
    assert aborted > 10
