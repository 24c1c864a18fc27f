"""The check of a GPU, as far as a machine without one can try it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

from tests.machine import ROOT

MAKE = "make", "-o", ".venv/.stamp"
SMALL = "--device cpu --hidden 192 --layers 1"


def make(*args: str, cwd=ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([*MAKE, *args], cwd=cwd, capture_output=True, text=True, timeout=150, check=False)


@pytest.fixture
def repository(tmp_path):
    """A copy, since the targets write into the folder that they stand in."""
    for name in ("Makefile", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for name in (".venv", "benchmarks", "tercet"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.timeout(170)
def test_the_check_runs_on_a_cpu(repository):
    done = make("gpu-check", f"PYTHON={sys.executable}", f"ARGS={SMALL} --result result.json", cwd=repository)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((repository / "result.json").read_text())
    assert [(row["transport"], row["wrong"]) for row in result["tokens"]] == [("tcp", [])]
    assert [*result["step_ms"]] == ["torch"]
    assert len(result["step_ms"]["torch"]) == 3
    assert all(ms > 0 for ms in result["step_ms"]["torch"].values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_machine_without_a_gpu_is_told_so(repository):
    done = make("gpu-check", f"PYTHON={sys.executable}", cwd=repository)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "sees no CUDA device here" in done.stdout


def test_the_wheels_are_few_and_all_that_is_missing(repository):
    done = make("gpu-wheels", cwd=repository)
    assert done.returncode == 0, done.stdout + done.stderr
    wheels = list((repository / "build/gpu-wheels").glob("*.whl"))
    assert sum(wheel.stat().st_size for wheel in wheels) < 60 << 20
    carried = {re.split(r"-\d", wheel.name)[0].replace("_", "-").lower() for wheel in wheels}
    # What torch, transformers and the benchmarks' own tables bring.
    there = {"torch", "torchgen", "numpy", "safetensors", "huggingface-hub", "httpx2", "idna", "tqdm", "yaml"}
    there |= {"sentencepiece", "sympy", "mpmath"}
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, tercet.roles.worker, tercet.roles.router.router, tercet.models.loader; "
         "print(*{name.split('.')[0] for name in sys.modules} - sys.stdlib_module_names)"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    names = {"grpc": "grpcio", "google": "protobuf"}
    wanted = {names.get(name, name).replace("_", "-") for name in loaded.stdout.split() if not name.startswith("_")}
    optional = {"grpc-tools", "grpc-health", "grpc-reflection"}  # grpc tries them, and goes on without
    missing = wanted - carried - there - optional - {"tercet", "cython-runtime"}
    assert not missing, f"neither carried nor there: {missing}"
