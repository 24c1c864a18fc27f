"""The check of a GPU, as far as a machine without one can try it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch
import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.testing import CliRunner

from benchmarks import gpu_check
from tests.machine import ROOT

MAKE = "make", "-o", ".venv/.stamp"
TESTS = "tests/unit/test_triton_gather.py"
SMALL = f"--device cpu --tests {TESTS} --only gather"


def make(*args: str, cwd=ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([*MAKE, *args], cwd=cwd, capture_output=True, text=True, timeout=150, check=False)


@pytest.fixture
def repository(tmp_path):
    """A copy, since the targets write into the folder that they stand in."""
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in (".venv", "benchmarks", "tercet", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.timeout(170)
def test_the_check_runs_on_a_cpu(repository):
    done = make("gpu-check", f"PYTHON={sys.executable}", f"ARGS={SMALL} --result result.json", cwd=repository)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((repository / "result.json").read_text())
    assert [(tested["name"], tested["passed"]) for tested in result["tests"]] == [(TESTS, True)]
    assert re.search(r"\d passed", result["tests"][0]["last"])
    assert [row["name"].split(",")[0] for row in result["rows"]] == ["gather"]
    assert all(row["seconds"] > 0 for row in result["rows"])
    assert (result["not_run"], result["failed"]) == ({}, {})
    assert result["rates"]["bandwidth"] > 0


def test_a_failing_file_is_told_with_its_words(monkeypatch, tmp_path):
    failing = tmp_path / "test_failing.py"
    failing.write_text("def test_it():\n    assert 1 == 2\n")
    tested = gpu_check.run_one(str(failing), "cpu", time.monotonic() + 60)
    assert not tested.passed
    assert "assert 1 == 2" in tested.output


def test_what_a_foreign_library_warns_of_is_no_failure(tmp_path):
    warning = tmp_path / "test_warning.py"
    warning.write_text("import warnings\n\ndef test_it():\n    warnings.warn('old', DeprecationWarning)\n")
    assert gpu_check.run_one(f"{warning}", "cpu", time.monotonic() + 60).passed
    assert gpu_check.run_one(f"{warning}::test_it", "cpu", time.monotonic() + 60).passed


def test_a_file_that_takes_too_long_is_ended_and_has_failed(tmp_path):
    endless = tmp_path / "test_endless.py"
    endless.write_text("import time\n\ndef test_it():\n    time.sleep(60)\n")
    began = time.monotonic()
    tested = gpu_check.run_one(str(endless), "cpu", began + 2)
    assert not tested.passed
    assert time.monotonic() - began < 30
    assert tested.last == gpu_check.USED_UP


def test_every_kernel_and_every_test_for_a_gpu_is_run():
    names = gpu_check.all_tests()
    files = {name.partition("::")[0] for name in names}
    assert {str(path.relative_to(ROOT)) for path in ROOT.glob("tests/gpu/test_*.py")} <= files
    kernels = {path.stem for path in (ROOT / "tercet/kernels/triton").glob("*.py")} - {
        "__init__",
        "dependent",
        "tiles",
        "trial",
    }
    assert {f"tests/unit/test_triton_{name}.py" for name in kernels} <= files


def test_a_file_that_marks_tests_for_a_gpu_is_run():
    marking = re.compile(r"mark\.gpu|, names\b.*\bticket_of$", re.MULTILINE)  # tests.movers' list of transports
    found = {path for path in ROOT.glob("tests/*/test_*.py") if marking.search(path.read_text())} - {Path(__file__)}
    assert {str(path.relative_to(ROOT)) for path in found} <= {n.partition("::")[0] for n in gpu_check.all_tests()}


def test_the_divided_file_has_no_other_tests():
    found = re.findall(r"^(?:async )?def (test_\w+)", (ROOT / gpu_check.PROCESSES).read_text(), re.MULTILINE)
    assert [f"{gpu_check.PROCESSES}::{name}" for name in found] == [gpu_check.OVER_A_TRANSPORT]


def test_what_needs_a_gpu_is_no_part_of_make_test():
    done = subprocess.run(
        [*MAKE, "--dry-run", "pytest-clusters", "pytest-rest"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    marks = re.findall(r'-m "([^"]*)"', done.stdout)
    assert len(marks) == 4
    assert all("not gpu" in mark or mark.startswith("ray") for mark in marks)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_machine_without_a_gpu_is_told_so():
    app = typer.Typer()
    app.command()(gpu_check.main)
    done = CliRunner().invoke(app)
    assert done.exit_code == 2, done.output
    assert "sees no CUDA device here" in done.output


LOADED = """
import importlib, sys
from benchmarks import gpu_check
import pytest, pytest_asyncio, pytest_timeout, tests.conftest, tests.worker_process, benchmarks.gpu_workers
for name in gpu_check.all_tests():
    importlib.import_module(name.partition("::")[0].removesuffix(".py").replace("/", "."))
print(*{name.split(".")[0] for name in sys.modules} - sys.stdlib_module_names)
"""


def needs_of(package: str) -> set[str]:
    """What an installation of it brings, by the names of distributions."""
    found, left = set(), [package]
    while left:
        requirements = map(Requirement, metadata.requires(left.pop()) or [])
        names = {
            canonicalize_name(r.name) for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})
        }
        installed = {name for name in names - found if is_installed(name)}
        found |= installed
        left += installed
    return found


def is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def test_the_wheels_are_few_and_all_that_is_missing(repository):
    done = make("gpu-wheels", cwd=repository)
    assert done.returncode == 0, done.stdout + done.stderr
    wheels = list((repository / "build/gpu-wheels").glob("*.whl"))
    assert sum(wheel.stat().st_size for wheel in wheels) < 60 << 20
    versions = {name.replace("_", "-").lower(): version for name, version, *_ in (w.name.split("-") for w in wheels)}
    assert {name: metadata.version(name) for name in versions} == versions, "not what fits each other here"
    carried = set(versions)
    there = {"torch", "triton", "transformers", *needs_of("torch"), *needs_of("transformers")}
    loaded = subprocess.run([sys.executable, "-c", LOADED], cwd=ROOT, capture_output=True, text=True, check=True)
    names = {
        "grpc": "grpcio",
        "google": "protobuf",
        "yaml": "pyyaml",
        "torchgen": "torch",
        "py": "pytest",
        "PIL": "pillow",
        "opentelemetry": "opentelemetry-api",
    }
    wanted = {names.get(name, name).replace("_", "-") for name in loaded.stdout.split() if not name.startswith("_")}
    # What libraries try to import, and go on without.
    optional = {"grpc-tools", "grpc-health", "grpc-reflection", "accelerate", "psutil", "sentencepiece", "sniffio"}
    optional |= {"scipy", "charset-normalizer"}  # by transformers; ours takes scipy for the placement of experts alone
    optional |= {"nixl", "nixl-cu12", "ucxx", "libucx", "libucxx"}  # transports that are asked whether they are there
    missing = wanted - carried - there - optional - {"tercet", "tests", "benchmarks", "examples", "cython-runtime"}
    assert not missing, f"neither carried nor there: {missing}"
