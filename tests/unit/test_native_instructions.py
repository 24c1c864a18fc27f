"""The native kernels by each kind of instructions that this CPU has, not by its best alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tercet.kernels.native import operations, trial
from tercet.kernels.native.layers import NativeLayer, NativeLayers, NativeShape, NativeStep
from tercet.kernels.native.library import library
from tercet.kernels.native.linear import NativeLinear

pytestmark = [
    pytest.mark.skipif(trial.missing() is not None, reason=str(trial.missing())),
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="another kind of CPU"),
]
KERNELS = [str(Path(__file__).with_name(name)) for name in ("test_kernels_native.py", "test_kernels_moe.py")]
NAME = "from tercet.kernels.native.library import library; print(library().instructions().decode())"
KINDS = "(linear or attention or contexts or number or expert or row) and not torch"
ARGUMENTS = ["-q", "-x", "-p", "no:cacheprovider", *KERNELS, "-m", "not slow", "-k", KINDS]
SUITE = f"import pytest, sys; sys.exit(pytest.main({ARGUMENTS}))"
REFUSED = "from tests.refused_tiles import refuse_tiles; refuse_tiles(); "


def flags():
    return Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()


def run(code, **environment):
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def for_avx2(tmp_path_factory):
    """Environment in which the kernels are compiled for AVX2 alone."""
    folder = tmp_path_factory.mktemp("avx2")
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")))
    script = folder / "compiler"
    script.write_text(f'#!/bin/bash\nexec {compiler} "${{@/-march=native/-march=x86-64-v3}}"\n')
    script.chmod(0o755)
    return {"CXX": str(script), "XDG_CACHE_HOME": str(folder)}


@pytest.mark.skipif("avx2" not in flags(), reason="a CPU without AVX2")
@pytest.mark.timeout(600)  # it compiles them, and runs a suite with them
def test_by_avx2(for_avx2):
    assert run(NAME, **for_avx2) == "avx2"
    run(SUITE, **for_avx2)


@pytest.mark.skipif(library().instructions() != b"amx_bf16", reason="no AMX here")
def test_where_tiles_are_refused():
    """The dot products of AVX512-BF16 are used, and the name says so."""
    assert run(REFUSED + NAME) == "avx512_bf16"
    run(REFUSED + SUITE)


def linear(n, k):
    """-> the layer, rows for it, and what they should give."""
    torch.manual_seed(n)
    weight, bias, x = (torch.randn(n, k) / k**0.5).bfloat16(), torch.randn(n), torch.randn(50, k)
    exact = (x.bfloat16() if library().instructions().endswith(b"bf16") else x).double()
    return NativeLinear(weight, bias), x, exact @ weight.double().T + bias.double()


@pytest.mark.parametrize(("n", "k"), [(16, 32), (70, 64), (33, 96), (200, 576), (1, 32), (64, 48)])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_number_of_rows(n, k, threads):
    """Of 1 to 50: right values, and of each row the same to the bit, wherever it stands."""
    library().set_threads(threads)
    layer, x, expected = linear(n, k)
    whole = layer.linear(x)
    torch.testing.assert_close(whole.double(), expected, rtol=1e-5, atol=1e-5)
    for rows in range(1, 51):
        assert torch.equal(layer.linear(x[:rows]), whole[:rows]), f"{rows} rows change the result of a row"
        assert torch.equal(layer.linear(x[50 - rows :]), whole[50 - rows :]), f"{rows} rows elsewhere"
    library().set_threads(1)


def layer_of(hidden, width, biased):
    """A layer of 4 query heads over 2 KV heads of 32, and its context of up to 64 tokens."""
    torch.manual_seed(width)

    def of(n, k):
        return NativeLinear((torch.randn(n, k) / k**0.5).bfloat16(), torch.randn(n) / 4 if biased else None)

    norms, angles = torch.rand(2, hidden), torch.outer(torch.arange(64.0), torch.arange(1, 17) / 16)
    shape = NativeShape(4, 2, 32, 1e-5, angles.cos(), angles.sin())
    linears = of(256, hidden), of(hidden, 128), of(2 * width, hidden), of(hidden, width)
    return shape, NativeLayer(norms[0], None, norms[1], *linears, None)


def forward(shape, layer, x, chunks):
    """Chunk after chunk over one cache."""
    layers, cache = NativeLayers(shape, [layer]), torch.zeros(1, 4, 2, 16, 2, 32, dtype=torch.bfloat16)
    table, first, outs = torch.arange(4), 0, []
    for rows in chunks:
        at = torch.arange(first, first + rows)
        out = x[first : first + rows].clone()
        first += rows
        layers.forward(out, NativeStep(at, at, operations.spans([(0, rows, first, table)])), cache, None)
        outs.append(out)
    return torch.cat(outs)


@pytest.mark.parametrize(("hidden", "width"), [(64, 96), (96, 64), (70, 96), (64, 48)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_layer_in_chunks(hidden, width, biased, threads):
    """The right values, and the same to the bit however the tokens are divided."""
    library().set_threads(threads)
    shape, layer = layer_of(hidden, width, biased)
    x = torch.randn(60, hidden)
    whole = forward(shape, layer, x, [60])
    for chunks in ([1] * 60, [17, 1, 33, 9], [2, 16, 32, 10], [48, 12]):
        assert torch.equal(forward(shape, layer, x, chunks), whole), f"chunks of {chunks}"
    library().set_threads(1)
    torch.testing.assert_close(whole, by_operations(shape, layer, x), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize(("hidden", "width"), [(64, 96), (70, 48)])
def test_halves_of_a_layer(hidden, width):
    """One after the other they are the whole layer, to the bit; beside x they give what is added to it."""
    shape, layer = layer_of(hidden, width, biased=True)
    layers, x, at = NativeLayers(shape, [layer, layer]), torch.randn(60, hidden), torch.arange(60)
    table = torch.arange(4)
    step, cache = NativeStep(at, at, operations.spans([(0, 60, 60, table)])), torch.zeros(2, 4, 2, 16, 2, 32)
    whole, halves, told, again = x.clone(), x.clone(), [], torch.zeros_like(cache)
    layers.forward(whole, step, cache, None)
    for i in range(2):
        layers.attention_half(i, halves, halves, step, again, told.append)
        update = torch.zeros_like(x)
        layers.mlp_half(i, halves, update)
        summed = halves + update
        layers.mlp_half(i, halves, halves)
        torch.testing.assert_close(halves, summed, rtol=1e-5, atol=1e-5)
    assert torch.equal(halves, whole)
    assert torch.equal(again, cache)
    assert told == [0, 1]


def test_what_is_raised_between_the_halves_ends_them():
    shape, layer = layer_of(64, 96, biased=False)
    at, table = torch.arange(5), torch.arange(4)
    step = NativeStep(at, at, operations.spans([(0, 5, 5, table)]))
    x, cache = torch.randn(5, 64), torch.zeros(1, 4, 2, 16, 2, 32)
    out = x.clone()

    def on_layer(layer):
        raise LookupError(layer)

    with pytest.raises(LookupError, match="0"):
        NativeLayers(shape, [layer]).attention_half(0, x, out, step, cache, on_layer)
    assert torch.equal(out, x)


def by_operations(shape, layer, x):
    """Each operation of the layer alone."""
    at, table, cache = torch.arange(60), torch.arange(4), torch.zeros(4, 2, 16, 2, 32, dtype=torch.bfloat16)
    step = NativeStep(at, at, operations.spans([(0, 60, 60, table)]))
    qkv = layer.qkv.linear(operations.rms_norm(x, layer.attention_norm, 1e-5)).view(60, 8, 32)
    operations.rotate_and_write(qkv, None, shape, step, cache)
    x = x + layer.output.linear(operations.attend(qkv[:, :4], shape, step, cache, None).flatten(1))
    gates = layer.gate_up.linear(operations.rms_norm(x, layer.mlp_norm, 1e-5))
    return x + layer.down.linear(operations.silu_and_mul(gates))


def test_a_child_has_the_same_instructions():
    """AMX is asked for in a process; one that it forks computes without asking again."""
    layer, x, _ = linear(70, 64)
    expected, (reader, writer) = layer.linear(x), os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, bytes([torch.equal(layer.linear(x), expected)]))
        os._exit(0)
    os.close(writer)
    assert os.read(reader, 1) == b"\x01"
    os.waitpid(child, 0)
    os.close(reader)
