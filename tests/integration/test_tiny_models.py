"""The models that examples/make_tiny_model.py makes, served: the greedy tokens of transformers, however KV travels."""

from __future__ import annotations

import asyncio
import random

import pytest
import torch
import typer
from typer.testing import CliRunner

from examples import make_tiny_model
from examples.make_tiny_model import CONFIGS, Family
from tercet.models.sources import load_tokenizer
from tercet.spec import ModelSpec
from tests.helpers import cluster, spec_of

TOKENS = 12
LENGTHS = (1, 2, 15, 16, 17, 40, 75, 130)


@pytest.fixture(scope="module", params=Family)
def made(request, tmp_path_factory):
    """-> a directory, and transformers' model of it."""
    directory = tmp_path_factory.mktemp("tiny")
    return str(directory), make_tiny_model.make(request.param, directory, seed=3)


def greedy(model, prompt):
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("transport", ["tcp", "shm", None])
async def test_greedy_tokens(made, transport):
    """Chunks of 32 tokens, and requests together in a batch; of two prompts one is a prefix of the other."""
    directory, reference = made
    rng = random.Random(5)
    prompts = [[rng.randrange(256) for _ in range(length)] for length in LENGTHS]
    prompts.append(prompts[-1] + [7])
    topology, options = ("pd", {"transfer__transport": transport}) if transport else ("aggregated", {})
    spec = spec_of(topology, 1, source=directory, scheduler__token_budget=32, **options)
    async with cluster(spec) as workers:
        asked = [workers.generate(prompt, max_tokens=TOKENS, ignore_eos=True) for prompt in prompts]
        answers = [[event.token_id for event in events] for events, _ in await asyncio.gather(*asked)]
    expected = [greedy(reference, prompt) for prompt in prompts]
    assert answers == expected
    assert len({token for answer in answers for token in answer}) > 20


def test_command_line(tmp_path):
    """Twice the same model of the same seed, another of another, and each few MB."""

    app = typer.Typer()
    app.command()(make_tiny_model.main)

    def weights(*options):
        done = CliRunner().invoke(app, ["qwen3-moe", str(tmp_path), *options], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return (tmp_path / "model.safetensors").read_bytes()

    first = weights()
    assert first == weights("--seed", "0") != weights("--seed", "1")
    assert len(first) < 4 << 20
    tokenizer = load_tokenizer(ModelSpec(source=str(tmp_path)))
    ids = tokenizer.encode("to be")
    assert len(ids) == 5


@pytest.mark.parametrize("family", Family)
def test_ranks_can_share_it(family):
    config = CONFIGS[family]()
    counts = [config.num_attention_heads, config.num_key_value_heads, getattr(config, "num_experts", 8)]
    assert all(count % 4 == 0 for count in counts)
