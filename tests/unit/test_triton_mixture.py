"""Mixtures of experts and latent attention where the kernels are Triton's: the same logits as torch's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tercet.kernels.kinds import Kernels
from tercet.models.sources import load_model
from tercet.spec import ModelSpec
from tests.triton_interpreter import DEVICE
from tests.unit.test_models_moe import FAMILIES, STEPS, VOCAB, batch_of, close, empty_cache, saved_with_bias

pytest.importorskip("triton")

NAMES = ["mixtral sliding, tied", "qwen3-moe normalised, some dense", "deepseek-v3 yarn, biases, eps"]


def there(batch):
    """The batch in the device's memory."""
    chunks = tuple(replace(chunk, block_table=chunk.block_table.to(DEVICE)) for chunk in batch.chunks)
    tensors = {name: value.to(DEVICE) for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    return replace(batch, chunks=chunks, **tensors)


@pytest.mark.parametrize("name", NAMES)
def test_logits(name, tmp_path):
    """Of few rows and of many, which other products compute."""
    saved_with_bias(FAMILIES[name], tmp_path)
    spec = ModelSpec(source=str(tmp_path), dtype="float32")
    theirs, ours = (load_model(spec, Kernels(kind, DEVICE)).model for kind in ("torch", "triton"))
    assert ours.captures == (ours.config.latent is None)
    ids, cache = torch.randint(VOCAB, (3, 72)), empty_cache(theirs)
    copy = cache.clone()
    for decodes, chunks in STEPS:
        batch = there(batch_of(decodes, chunks, ids))
        close(ours.forward(batch, copy), theirs.forward(batch, cache))
        torch.testing.assert_close(copy, cache, rtol=1e-4, atol=1e-4, equal_nan=True)
