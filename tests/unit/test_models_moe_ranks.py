"""Mixtures of experts and latent attention shared by ranks: together they give the logits of one."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tercet.distributed.collectives import Collectives
from tercet.distributed.place import Place
from tercet.distributed.ranks import Ranks
from tercet.models.sources import load_model
from tercet.spec import ModelSpec
from tests.unit.test_models_moe import (
    BLOCK,
    BLOCKS,
    FAMILIES,
    KERNELS,
    STEPS,
    VOCAB,
    batch_of,
    close,
    empty_cache,
    loaded,
    saved_with_bias,
)

NAMES = ["qwen3-moe normalised, some dense", "deepseek-v2 groups, scaled, biases", "deepseek-v3 yarn, biases, eps"]


class Threads:
    """What ranks that are threads of this process share."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.parts: list[torch.Tensor] = [torch.empty(0)] * size


class Together(Collectives):
    def __init__(self, rank: int, size: int, threads: Threads) -> None:
        super().__init__(rank, size)
        self._threads = threads

    def _gathered(self, x):
        self._threads.parts[self.rank] = x.clone()
        self._threads.barrier.wait(20)
        parts = torch.stack(self._threads.parts)
        self._threads.barrier.wait(20)
        return parts

    def all_reduce(self, x):
        return self._gathered(x).sum(0)

    def gather(self, x):
        parts = self._gathered(x)
        return parts if self.rank == 0 else None


def ranks_of(directory, size, kernels):
    threads, spec = Threads(size), ModelSpec(source=str(directory), dtype="float32")
    ranks = [Ranks(Place(rank, tensor=size), Together(rank, size, threads)) for rank in range(size)]
    return [load_model(spec, KERNELS[kernels], each) for each in ranks]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_tensor_ranks(name, size, kernels, tmp_path):
    saved_with_bias(FAMILIES[name], tmp_path)
    whole, parts = loaded(tmp_path, kernels), ranks_of(tmp_path, size, kernels)
    assert {part.fingerprint for part in parts} == {whole.fingerprint}
    ids, cache = torch.randint(VOCAB, (3, 72)), empty_cache(whole.model)
    caches = [torch.full(part.model.kv_layout(BLOCKS, BLOCK).shape, float("nan")) for part in parts]
    with ThreadPoolExecutor(size) as pool:
        for decodes, chunks in STEPS:
            batch = batch_of(decodes, chunks, ids)

            def step(part, kept, batch=batch):
                return part.model.logits(part.model.hidden(batch, kept)[batch.logit_rows])

            first, *others = pool.map(step, parts, caches)
            close(first, whole.model.forward(batch, cache))
            assert others == [None] * (size - 1)


def test_every_tensor_rank_holds_the_latents(tmp_path):
    saved_with_bias(FAMILIES["deepseek-v3"], tmp_path)
    layouts = [part.model.kv_layout(BLOCKS, BLOCK) for part in ranks_of(tmp_path, 4, "torch")]
    assert [[*layout.heads] for layout in layouts] == [[0]] * 4
    assert {layout.parts for layout in layouts} == {1}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stages_have_the_fingerprint_of_the_whole(dtype, tmp_path):
    """Though each reads of the others' layers no more than bytes."""
    saved_with_bias(FAMILIES["deepseek-v3"], tmp_path)
    spec = ModelSpec(source=str(tmp_path), dtype=dtype)
    ranks = [None, *(Ranks(Place(rank, pipeline=2)) for rank in range(2))]
    assert len({load_model(spec, KERNELS["torch"], each).fingerprint for each in ranks}) == 1
