"""The native kernels' library: built once, whoever asks; and every reason why it cannot be, by name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from tercet.cluster.unbuilt import refuse_unbuilt
from tercet.core import Role
from tercet.errors import UnsupportedSpec
from tercet.kernels import kinds
from tercet.kernels.kinds import Kernels, choose_kernels
from tercet.kernels.native import library, trial
from tercet.kernels.native.library import NativeMissingError
from tercet.spec import ClusterSpec, PoolSpec, RoleSpec

here = pytest.mark.skipif(trial.missing() is not None, reason=str(trial.missing()))


def stand_in(directory, script):
    """A compiler that is a shell script."""
    compiler = directory / "compiler"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    return str(compiler)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "tercet"


def test_no_compiler(cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(NativeMissingError, match=r"no C\+\+ compiler no-such-compiler; install g\+\+, or set CXX"):
        library.build()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(cache))
    with pytest.raises(NativeMissingError, match=r"no C\+\+ compiler; install"):
        library.build()


def test_a_compiler_that_fails_is_quoted(cache, tmp_path, monkeypatch):
    monkeypatch.setenv(
        "CXX", stand_in(tmp_path, '[ "$1" = --version ] || { echo "x.h:3: error: no such thing" >&2; exit 4; }')
    )
    with pytest.raises(NativeMissingError, match=r"exit code 4: x\.h:3: error: no such thing"):
        library.build()
    assert not list(cache.glob("*.so"))


def test_a_compiler_that_hangs_is_stopped(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", stand_in(tmp_path, '[ "$1" = --version ] || exec sleep 60'))
    monkeypatch.setattr(library, "BUILD_S", 0.3)
    with pytest.raises(NativeMissingError, match=r"timed out after 0\.3"):
        library.build()


def test_a_folder_that_others_can_write_to_is_not_used(cache):
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.raises(NativeMissingError, match="can be written by others"):
        library.build()


def test_a_folder_that_cannot_be_made(cache, monkeypatch):
    cache.parent.joinpath("file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent / "file"))
    with pytest.raises(NativeMissingError, match="set XDG_CACHE_HOME to a folder of yours"):
        library.build()


def test_many_processes_build_it_once(cache, tmp_path, monkeypatch):
    script = (
        f'echo "$1" >> {tmp_path}/calls\n[ "$1" = --version ] && exit\nsleep 0.3\nfor last; do :; done; touch "$last"'
    )
    monkeypatch.setenv("CXX", stand_in(tmp_path, script))
    code = "from tercet.kernels.native import library; print(library.build())"
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert len({process.communicate()[0] for process in running}) == 1
    assert all(process.returncode == 0 for process in running)
    calls = (tmp_path / "calls").read_text().split()
    assert len([call for call in calls if call != "--version"]) == 1
    assert len(list(cache.glob("*.so*"))) == 1


@here
@pytest.mark.parametrize(
    "target",
    ["native", *(pytest.param(each, marks=pytest.mark.slow) for each in ("x86-64", "x86-64-v3", "sapphirerapids"))],
)
def test_no_warnings(target):
    """The C++ is clean for every width of vectors that it is made for."""
    if target != "native" and os.uname().machine != "x86_64":
        pytest.skip("another kind of CPU")
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")))
    command = [compiler, "-std=gnu++20", f"-march={target}", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    done = subprocess.run([*command, str(library.SOURCES / "library.cpp")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_is_chosen(monkeypatch, caplog):
    """auto falls back aloud; who asks for native kernels gets them or an error."""
    monkeypatch.setattr(kinds.native_trial, "missing", lambda: "they are broken")
    assert choose_kernels("auto") == choose_kernels("torch") == Kernels()
    assert "no native kernels, torch's are used, which are slower: they are broken" in caplog.text
    with pytest.raises(UnsupportedSpec, match="kernels: native: they are broken"):
        choose_kernels("native")
    with pytest.raises(UnsupportedSpec, match="this worker computes on meta"):
        choose_kernels("native", torch.device("meta"))
    monkeypatch.setattr(kinds.native_trial, "missing", lambda: None)
    assert choose_kernels("auto").native


@here
@pytest.mark.parametrize("broken", ["rms_norm", "silu_and_mul", "rotate_and_write", "attend"])
def test_kernels_that_are_wrong_on_this_cpu_are_not_used(broken, monkeypatch):
    right = getattr(trial.operations, broken)
    monkeypatch.setattr(trial.operations, broken, lambda x, *rest: right(x + 1, *rest))
    assert trial.missing.__wrapped__().startswith(broken)


@here
def test_linear_layers_that_are_wrong_on_this_cpu_are_not_used(monkeypatch):
    right = trial.NativeLinear.linear
    monkeypatch.setattr(trial.NativeLinear, "linear", lambda self, x: right(self, x) + (len(x) == 5))
    assert trial.missing.__wrapped__().startswith("linear (torch.float32, 5 rows) gives wrong values on this CPU")


def test_native_kernels_of_a_gpu_pool_are_refused():
    roles = {Role.AGGREGATED: RoleSpec(pool="p", gpus=1, kernels="native")}
    spec = ClusterSpec(topology="aggregated", roles=roles, pools={"p": PoolSpec(accelerator="gpu", gpus=1)})
    with pytest.raises(UnsupportedSpec, match=r"kernels: native ones are for CPUs, and pool p has GPUs"):
        refuse_unbuilt(spec)
