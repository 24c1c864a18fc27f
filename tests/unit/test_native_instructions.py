"""The native kernels by each kind of instructions that this CPU has, not by its best alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tercet.kernels.native import trial
from tercet.kernels.native.library import library
from tercet.kernels.native.linear import NativeLinear

pytestmark = [
    pytest.mark.skipif(trial.missing() is not None, reason=str(trial.missing())),
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="another kind of CPU"),
]
KERNELS = Path(__file__).parent / "test_kernels_native.py"
NAME = "from tercet.kernels.native.library import library; print(library().instructions().decode())"
ARGUMENTS = ["-q", "-x", "-p", "no:cacheprovider", str(KERNELS), "-k", "linear or attention or contexts or number"]
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
