"""The decoder layers by Triton's kernels compute what torch's do: the same hidden states, tokens and cache."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tercet.kernels.kinds import Kernels
from tercet.models.batch import PrefillChunk, StepBatch
from tercet.models.sources import load_model
from tercet.spec import ModelSpec
from tests.triton_interpreter import DEVICE
from tests.unit.test_models_families import BLOCK, FAMILIES, SMALL, saved

pytest.importorskip("triton")

NAMES = ["llama tied, biases, head_dim", "qwen3 layer_types"]  # the second has windows and norms of queries and keys
BLOCKS = 40  # of each cache; the last one is nobody's
TABLES = torch.randperm(BLOCKS - 1, generator=torch.Generator().manual_seed(4)).view(3, 13)  # of three sequences


@pytest.fixture(scope="module", params=NAMES)
def models(request, tmp_path_factory):
    """The same model with torch's kernels and with Triton's."""
    directory = tmp_path_factory.mktemp("model")
    saved(FAMILIES[request.param], directory)
    spec = ModelSpec(source=str(directory), dtype="float32")
    return [load_model(spec, Kernels(kind, DEVICE)).model for kind in ("torch", "triton")]


def batch_of(decodes, chunks, ids):
    """decodes: (sequence, context); chunks: (sequence, start, stop). All rows' logits are wanted."""
    parts = [(s, context - 1, context) for s, context in decodes] + chunks
    at = [torch.arange(start, stop) for _, start, stop in parts]
    slots = [TABLES[s][p // BLOCK] * BLOCK + p % BLOCK for (s, _, _), p in zip(parts, at, strict=True)]
    width = max((-(-context // BLOCK) for _, context in decodes), default=0)
    tables = torch.zeros(len(decodes), width, dtype=torch.int64)
    for row, (s, context) in enumerate(decodes):
        tables[row, : -(-context // BLOCK)] = TABLES[s][: -(-context // BLOCK)]
    planned, row = [], len(decodes)
    for s, start, stop in chunks:
        planned.append(PrefillChunk(row, stop - start, stop, TABLES[s][: -(-stop // BLOCK)].to(DEVICE)))
        row += stop - start
    return StepBatch(
        torch.cat([ids[s][p] for (s, _, _), p in zip(parts, at, strict=True)]).to(DEVICE),
        torch.cat(at).to(DEVICE),
        torch.cat(slots).to(DEVICE),
        len(decodes),
        tables.to(DEVICE),
        torch.tensor([context for _, context in decodes], dtype=torch.int64, device=DEVICE),
        tuple(planned),
        torch.arange(row, device=DEVICE),
        torch.tensor([*(c.start_row for c in planned), row, *(c.context for c in planned)], device=DEVICE),
    )


STEPS = {  # what is in the cache before, the decodes, the chunks
    "a whole prefill": ([], [], [(0, 0, 25)]),
    "two prefills": ([], [], [(0, 0, 19), (1, 0, 8)]),
    "chunks behind a cached prefix": ([(0, 0, 16), (1, 0, 5)], [], [(0, 16, 33), (1, 5, 6)]),
    "a decode of one token": ([], [(2, 1)], []),
    "decodes of mixed lengths": ([(0, 0, 29), (1, 0, 8), (2, 0, 70)], [(0, 30), (1, 9), (2, 71)], []),
    "decodes, then chunks": ([(0, 0, 16), (2, 0, 40)], [(2, 41), (0, 17)], [(1, 0, 21)]),
}


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)


def prepared(model, before, ids):
    """A cache with `before` in it, by this model, and NaN elsewhere."""
    config = model.config
    shape = (config.num_layers, BLOCKS, 2, BLOCK, config.num_kv_heads, config.head_dim)
    cache = torch.full(shape, float("nan"), device=DEVICE)
    if before:
        model.hidden(batch_of([], before, ids), cache)
    return cache


@pytest.mark.parametrize("name", STEPS)
def test_a_step(name, models):
    before, decodes, chunks = STEPS[name]
    theirs, ours = models
    ids = torch.randint(SMALL["vocab_size"], (3, 104), generator=torch.Generator().manual_seed(9))
    cache = prepared(theirs, before, ids)
    copy, batch = cache.clone(), batch_of(decodes, chunks, ids)
    expected, hidden = theirs.hidden(batch, cache), ours.hidden(batch, copy)
    assert expected.std() > 0.1
    close(hidden, expected)
    close(copy, cache)
    assert ours.logits(hidden).argmax(-1).tolist() == theirs.logits(expected).argmax(-1).tolist()


def test_a_layer_is_told_of_once_it_is_in_the_cache(models):
    theirs, ours = models
    ids = torch.randint(SMALL["vocab_size"], (3, 104))
    cache = prepared(theirs, [], ids)
    copy, batch, told, done = cache.clone(), batch_of([], [(0, 0, 3)], ids), [], ours.layers_done
    theirs.hidden(batch, cache)

    def on_layer(layer):
        close(copy[: layer + 1], cache[: layer + 1])
        assert copy[layer + 1 :].isnan().all()
        assert ours.layers_done == done + layer
        told.append(layer)

    ours.hidden(batch, copy, on_layer)
    assert told == [0, 1, 2]
    assert ours.layers_done == done + 3


class NoWait(TorchDispatchMode):
    """Fails where a tensor's value is looked at, by the names that this has in inference mode."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in {"item", "is_nonzero", "resolve_neg", "nonzero", "equal", "unique"}
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="what leaves the launches out is for the interpreter")
def test_a_step_never_waits_for_the_device(models, monkeypatch):
    """Else its launches could not run ahead of the GPU."""
    from triton.runtime.interpreter import InterpretedFunction

    theirs, ours = models
    launched = []
    monkeypatch.setattr(InterpretedFunction, "__getitem__", lambda *_: lambda *_, **__: launched.append(1))
    ids = torch.zeros(3, 104, dtype=torch.int64)
    batch, cache = batch_of([(2, 41), (0, 17)], [(1, 0, 21)], ids), prepared(ours, [], ids)
    with NoWait():
        ours.hidden(batch, cache)
    assert len(launched) == (7 + ours.config.qk_norm) * ours.config.num_layers
    with pytest.raises(AssertionError), NoWait():
        theirs.hidden(batch, cache)
