"""The logprobs of a prompt's own tokens, as evaluation harnesses ask for them: transformers', told once and first."""

from __future__ import annotations

import asyncio

import pytest
import torch
from transformers import AutoModelForCausalLM

from tercet.core import Done, Progress, PromptLogprobs, Role, TokenEvent
from tercet.errors import EngineFault
from tercet.transfer.mover.sender import KvSender
from tests.helpers import LocalCluster, cluster, request_of, spec_of
from tests.tiny import VOCAB, tiny_model

TOP = 5


def prompt_of(length: int, first: int = 3) -> list[int]:
    return [(first + 11 * n) % VOCAB for n in range(length)]


async def events_of(made: LocalCluster, prompt: list[int], **params: object) -> list[object]:
    asked = {"max_tokens": 4, "ignore_eos": True, "prompt_logprobs": TOP} | params
    return [event async for event in made.router.generate(request_of(prompt, **asked))]


@pytest.fixture(scope="module")
def reference():
    return AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32).eval()


def assert_scores(events: list[object], prompt: list[int], reference) -> None:
    """They come first and once, and are what transformers says."""
    assert isinstance(events[0], PromptLogprobs)
    assert all(isinstance(event, TokenEvent | Progress | Done) for event in events[1:])
    with torch.inference_mode():
        rows = reference(torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert len(events[0].entries) == len(prompt) - 1
    for (logprob, top), token, row in zip(events[0].entries, prompt[1:], rows, strict=False):
        assert logprob == pytest.approx(float(row[token]), abs=1e-4)
        best = row.topk(TOP)
        assert [i for i, _ in top] == best.indices.tolist()
        assert [p for _, p in top] == pytest.approx(best.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("topology", ["pd", "aggregated"])
@pytest.mark.parametrize("budget", [1, 16, 63, 512])
async def test_they_are_those_of_transformers(topology, budget, reference):
    """Whole prompts in chunks of any size; a cached prefix is computed again, since its logits are wanted."""
    async with cluster(spec_of(topology, decoders=1, source=tiny_model(), scheduler__token_budget=budget)) as made:
        for length in (1, 2, 16, 17, 64, 65, 150):
            plain = [e.token_id for e in (await made.generate(prompt_of(length), max_tokens=4, ignore_eos=True))[0]]
            events = await events_of(made, prompt_of(length))
            assert_scores(events, prompt_of(length), reference)
            assert [e.token_id for e in events if isinstance(e, TokenEvent)] == plain
        together = await asyncio.gather(*(events_of(made, prompt_of(90, n)) for n in range(6)))
        for number, events in enumerate(together):
            assert_scores(events, prompt_of(90, number), reference)


async def test_a_preempted_prompt_is_scored_once(reference):
    spec = spec_of("aggregated", decoders=1, source=tiny_model(), kv__blocks=12, scheduler__token_budget=20)
    async with cluster(spec) as made:
        prompts = [prompt_of(60, n) for n in range(4)]
        for events, prompt in zip(
            await asyncio.gather(*(events_of(made, p, max_tokens=60) for p in prompts)), prompts, strict=True
        ):
            assert_scores(events, prompt, reference)
        assert made.workers["aggregated-0"].engine._state._scheduler.preemptions > 0


async def test_a_second_attempt_tells_them_no_second_time(reference, monkeypatch):
    """The link breaks behind the scores' report; the client hears them once, before the first token."""
    async with cluster(spec_of("pd", source=tiny_model(), transfer__transport="tcp")) as made:
        real, broken = KvSender.finish, []

        def finish(self, ticket, note):  # the scores are told before it
            if not broken:
                broken.extend(peer.shutdown() for peer in list(self._peers.values()))
            real(self, ticket, note)

        monkeypatch.setattr(KvSender, "finish", finish)
        events = await events_of(made, prompt_of(80))
        assert events[-1].attempts == 2
        assert_scores(events, prompt_of(80), reference)


async def test_tokens_wait_for_scores_that_come_late(monkeypatch, reference):
    """The two workers' streams have no order between them; here all that the prefill worker says comes late."""
    async with cluster(spec_of("pd", decoders=1, source=tiny_model())) as made:
        link = next(link for link in made.router._links.values() if link.info.role is Role.PREFILL)
        heard = link._on_reports
        later = asyncio.get_running_loop().call_later
        monkeypatch.setattr(link, "_on_reports", lambda reports: later(0.3, heard, reports))
        assert_scores(await events_of(made, prompt_of(40)), prompt_of(40), reference)


async def test_scores_that_are_no_numbers_end_the_request(monkeypatch):
    async with cluster(spec_of("pd", decoders=1, source=tiny_model())) as made:
        model = made.workers["prefill-0"].engine._executor._runner._model
        logits = type(model).logits
        monkeypatch.setattr(
            type(model),
            "logits",
            lambda self, x: logits(self, x).fill_(float("nan")) if len(x) > 8 else logits(self, x),
        )
        with pytest.raises(EngineFault, match="logits for the prompt"):
            await events_of(made, prompt_of(40))
        assert len((await made.generate(prompt_of(5), max_tokens=3, ignore_eos=True))[0]) == 3
