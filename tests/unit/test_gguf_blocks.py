"""Weights in GGUF's own blocks: every value that the file means, and a model that computes with them to the bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
import transformers

from tercet.cluster import preflight
from tercet.cluster.unbuilt import refuse_unbuilt
from tercet.core import Role
from tercet.errors import UnsupportedSpec
from tercet.kernels.kinds import Kernels
from tercet.kernels.native import trial
from tercet.kernels.native.library import library
from tercet.kernels.native.linear import NativeLinear, Quantised, QuantisedLinear
from tercet.models.batch import PrefillChunk, StepBatch
from tercet.models.gguf_blocks import quantised
from tercet.models.sources import load_model
from tercet.spec import ClusterSpec, ModelSpec, RoleSpec
from tests.tiny import tiny_model
from tests.unit.test_models_files import small, write_gguf

Kind = gguf.GGMLQuantizationType
here = pytest.mark.skipif(trial.missing() is not None, reason=str(trial.missing()))
KINDS = [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0]


@pytest.mark.parametrize("kind", KINDS)
def test_every_value_is_what_the_file_means(kind):
    """Of random bytes, so of every q and of scales of either sign and any size, too."""
    rng = np.random.default_rng(int(kind))
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows = rng.integers(0, 256, (50, 6, size), dtype=np.uint8)
    rows[:, :, :4].view(np.float16)[:] = rng.standard_normal((50, 6, 2)) * 10.0 ** rng.integers(-7, 4, (50, 6, 1))
    if kind == Kind.Q8_0:
        rows[:, :, 2:] = rng.integers(0, 256, (50, 6, 32))
    flat = rows.reshape(50, -1)
    found = quantised(flat, kind)
    assert found.q.shape == (50, 6 * block)
    assert np.array_equal(found.values().numpy(), gguf.dequantize(flat, kind))


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q5_0, Kind.Q6_K])
def test_other_kinds_are_left_to_be_widened(kind):
    assert quantised(np.zeros((2, 4 * 210), np.uint8), kind) is None


@here
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k"), [(1, 32), (17, 64), (70, 96), (200, 576)])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_product_with_blocks_is_that_with_their_values(bits, n, k, threads):
    library().set_threads(threads)
    torch.manual_seed(n)
    q = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    weight, bias = Quantised(q, torch.randn(n, k // 32), torch.randn(n, k // 32), bits), torch.randn(n)
    blocks, whole = QuantisedLinear(weight, bias), NativeLinear(weight.values(), bias)
    for rows in (*range(1, 9), 13, 100):
        x = torch.randn(rows, k)
        assert torch.equal(blocks.linear(x), whole.linear(x)), rows
    library().set_threads(1)


def logits(dtype, path):
    """Of a prompt in one chunk and of a token after it; the cache is bfloat16."""
    model = load_model(ModelSpec(source=str(path), dtype=dtype)).model
    config, ids = model.config, torch.randint(0, 90, (20,), generator=torch.Generator().manual_seed(1))
    cache = torch.zeros(config.num_layers, 3, 2, 16, config.num_kv_heads, config.head_dim, dtype=torch.bfloat16)
    none, table = torch.zeros(0, dtype=torch.int64), torch.tensor([2, 0])
    at = torch.arange(20)
    slots = table[at // 16] * 16 + at % 16
    chunk = PrefillChunk(0, 19, 19, table)
    first = StepBatch(ids[:19], at[:19], slots[:19], 0, none.view(0, 0), none, (chunk,), at[:19])
    last = StepBatch(ids[19:], at[19:], slots[19:], 1, table.view(1, 2), at[19:] + 1, (), at[:1])
    return torch.cat((model.forward(first, cache), model.forward(last, cache)))


@here
@pytest.mark.parametrize("kind", [*KINDS, Kind.Q5_1])
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_in_blocks_is_the_model_to_the_bit(kind, tied, tmp_path):
    """Llama's query and key rows are put back in order; what is in other blocks is widened."""
    write_gguf(tmp_path / "m.gguf", small(transformers.LlamaConfig, tie_word_embeddings=tied), kind)
    assert torch.equal(logits("gguf", tmp_path / "m.gguf"), logits("float32", tmp_path / "m.gguf"))


@here
def test_the_models_are_told_apart(tmp_path):
    write_gguf(tmp_path / "m.gguf", small(transformers.Qwen2Config), Kind.Q4_1)
    kinds = ("gguf", "float32", "bfloat16")
    loaded = [load_model(ModelSpec(source=str(tmp_path / "m.gguf"), dtype=dtype)) for dtype in kinds]
    assert len({each.fingerprint for each in loaded}) == 3
    assert loaded[0].model.kv_layout(4, 16).dtype == "bfloat16"


def test_blocks_of_something_else_are_refused():
    with pytest.raises(UnsupportedSpec, match=r"model.dtype: gguf: .* is no GGUF file; use bfloat16 or float32"):
        load_model(ModelSpec(source=tiny_model(), dtype="gguf"))
    roles = {Role.AGGREGATED: RoleSpec(kernels="torch")}
    spec = ClusterSpec(topology="aggregated", roles=roles, model=ModelSpec(dtype="gguf"))
    with pytest.raises(UnsupportedSpec, match=r"gguf takes native kernels, which role aggregated does not have"):
        refuse_unbuilt(spec)
    with pytest.raises(UnsupportedSpec, match="is no GGUF file"):
        preflight.check_model(spec.model_copy(update={"model": ModelSpec(source=tiny_model(), dtype="gguf")}), print)


def test_blocks_need_native_kernels():
    with pytest.raises(UnsupportedSpec, match=r"takes native kernels, and this worker computes with torch \(cpu\)"):
        load_model(ModelSpec(dtype="gguf"), Kernels())
