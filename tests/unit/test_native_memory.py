"""The native kernels' threads and bounds, in programs of their own: what Python would not see."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tercet.kernels.native.library import SOURCES
from tercet.kernels.native.trial import missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
HERE = Path(__file__).parent


SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize=alignment")


def compiler():
    return os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")))


def compiled(name, folder, *options):
    program = folder / name
    flags = ("-std=gnu++20", "-march=native", "-fno-math-errno", "-pthread", f"-I{SOURCES}")
    command = [compiler(), *flags, *options, str(HERE / f"{name}.cpp"), "-o", str(program)]
    subprocess.run(command, check=True, timeout=300)
    return program


@functools.cache
def sanitizes():
    """Whether this compiler has sanitizers: a program that fails to compile for another reason is no reason to skip."""
    command = [compiler(), *SANITIZED, "-x", "c++", "-", "-o", os.devnull]
    return subprocess.run(command, input="int main() {}", text=True, capture_output=True).returncode == 0


def run(program):
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_item_runs_once_while_threads_come_and_go(tmp_path):
    run(compiled("native_team", tmp_path, "-O2"))


@pytest.mark.slow  # the compiler takes minutes
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["native_bounds", "native_experts"])
def test_each_shape_stays_within_its_memory(name, tmp_path):
    if not sanitizes():
        pytest.skip("this compiler has no sanitizers")
    run(compiled(name, tmp_path, "-O1", *SANITIZED))
