"""200 varied prompts, greedy, float32: disaggregated = aggregated = transformers on the same dequantised weights.

What transformers would generate is not generated but checked: one forward pass over prompt and answer must choose, at
each position of the answer, the token that stands there. By induction over the positions that is the same as equality
with its greedy `generate`.
"""

from __future__ import annotations

import asyncio
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from tercet.models.sources import load_tokenizer, locate
from tercet.spec import ModelSpec
from tests.helpers import LocalCluster, cluster, spec_of

TOKENS = 8
TEXTS = [
    "What is the capital of France?",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return ",
    "SELECT name, COUNT(*) FROM orders GROUP BY",
    "Écris une phrase sur la mer et le vent d'automne.",
    "日本の首都はどこですか。短く答えてください。",
    "Напиши короткое стихотворение о зиме.",
    "اكتب جملة قصيرة عن البحر",
    "The quick brown fox jumps over the lazy dog. " * 3,
    "1 + 1 = 2, 2 + 2 = 4, 3 + 3 =",
    '{"name": "Ada", "born": 1815, "field":',
    "🙂🚀 emoji and ümläuts: ½ × ¾ = ",
    "List three reasons to test software.\n1.",
]


def prompts() -> list[list[int]]:
    """Chat, code, non-English, random ids; 1 token to 2,000 tokens."""
    tokenizer = load_tokenizer(ModelSpec())
    rng = random.Random(7)
    made = []
    for number, text in enumerate(TEXTS * 5):
        chat = [{"role": "user", "content": f"{text} ({number})"}]
        made.append(tokenizer.encode(tokenizer.apply_chat_template(chat), add_special=False))
        made.append(tokenizer.encode(f"{text[: 5 + 7 * number]} {number}"))
    lengths = [1, 2, 3, 15, 16, 17, 31, 33, 64] * 8 + [120, 128, 200, 256, 300, 600, 1000, 2000]
    made += [[rng.randrange(3, 49000) for _ in range(n)] for n in lengths]
    assert len(made) == 200
    return made


async def answers(made: LocalCluster, asked: list[list[int]]) -> list[list[int]]:
    """Sixteen at a time, so that batches mix."""
    gate = asyncio.Semaphore(16)

    async def one(prompt: list[int]) -> list[int]:
        async with gate:
            events, _ = await made.generate(prompt, max_tokens=TOKENS, ignore_eos=True, timeout_s=300.0)
            return [e.token_id for e in events]

    return list(await asyncio.gather(*(one(p) for p in asked)))


# Thirteen shares no divisor with the number of texts or of short lengths, so that it meets each kind.
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("every", [13, pytest.param(1, marks=pytest.mark.slow)])
async def test_disaggregated_is_aggregated_is_transformers(every):
    asked = prompts()[::every]
    async with cluster(spec_of("pd")) as made:
        disaggregated = await answers(made, asked)
    async with cluster(spec_of("aggregated", decoders=2)) as made:
        aggregated = await answers(made, asked)
    assert disaggregated == aggregated
    assert all(len(tokens) == TOKENS for tokens in aggregated)
    assert_transformers_agrees(asked, aggregated)


def assert_transformers_agrees(asked: list[list[int]], answered: list[list[int]]) -> None:
    path = locate(ModelSpec())
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    reference = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    try:
        for prompt, tokens in zip(asked, answered, strict=True):
            with torch.inference_mode():
                logits = reference(torch.tensor([prompt + tokens[:-1]]), logits_to_keep=TOKENS).logits[0]
            assert logits.argmax(-1).tolist() == tokens, prompt
    finally:
        torch.set_num_threads(threads)
