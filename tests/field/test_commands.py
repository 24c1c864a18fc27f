"""Every command that the documents, the docstrings and the Makefile give is run by a test, as a user would type it."""

from __future__ import annotations

import ast
import contextlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.machine import BIN, ROOT, Machine, Served, free_port, is_ready, new_machine, until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(170)]

README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = dict(re.findall(r"^([a-z][a-z-]*):([^#=\n]*)", MAKEFILE, re.MULTILINE))  # target -> prerequisites
COMMAND = re.compile(r"^    ((?:make|tercet|curl|ray|python) (?:.*\\\n)*.*)$", re.MULTILINE)
MEASURED = re.compile(r"`(python -m [^`]*)`")
PARTS = {"proto-check", "pytest", "pytest-clusters", "pytest-rest"}  # of `test`, which nobody types
ANYWHERE = "--set gateway.http.port=0 --set gateway.grpc.port=0 --set ray.address=local"
MAKE = "make", "-o", ".venv/.stamp"  # a Makefile younger than the environment would have it installed anew

HERE, CLI = "tests/field/test_commands.py", "tests/unit/test_cli.py"
SEEING = f"{HERE}:test_what_the_readme_types_about_pictures"
CLUSTER = "tests/integration/test_ray_cluster.py"
EXPERTS = "tests/integration/test_ray_experts.py:test_counts_of_a_running_mixture_are_recorded_and_solved"
GPU = "tests/unit/test_gpu_check.py"
ON_TINY = f"{HERE}:test_what_the_readme_types_against_a_served_cluster"
# command -> the test that runs it. A benchmark stands here by its module: the figures themselves take long.
RUN_BY = {
    "make test": ".ci/run",
    **dict.fromkeys(("make lint", "make types", "make imports", "make proto-check", "make pytest"), "Makefile:test"),
    **dict.fromkeys(("make setup", "make extras", "make tools"), "Makefile:pytest"),
    **dict.fromkeys(("make pytest-clusters", "make pytest-rest"), "Makefile:pytest"),
    "make test-deploy": f"{HERE}:test_make_test_deploy_finds_what_it_runs",
    "make chromium": "Makefile:test-deploy",
    "make wheel": "tests/deploy/test_two_hosts.py:test_all_of_the_job_runs_from_the_wheel_that_it_brought",
    "make slow": f"{HERE}:test_make_slow_finds_what_takes_long",
    "make help": f"{HERE}:test_make_help_names_every_target_for_users",
    "make clean": f"{HERE}:test_make_clean_removes_what_was_made_and_nothing_else",
    "make proto": f"{HERE}:test_make_proto_writes_what_is_committed",
    "make demo": f"{HERE}:test_make_demo_answers_and_says_what_each_stage_took",
    "make demo-vision": f"{HERE}:test_make_demo_vision_says_what_is_in_each_picture",
    "make demo-moe": f"{HERE}:test_make_demo_moe_says_who_computed_which_experts",
    **dict.fromkeys(
        ("tercet serve configs/local-vision.yaml", 'tercet chat "What is in the picture?" --image a.png'), SEEING
    ),
    "make serve": ON_TINY,
    "make bench": ON_TINY,
    "make gpu-wheels": f"{GPU}:test_the_wheels_are_few_and_all_that_is_missing",
    "make gpu-check": f"{GPU}:test_the_check_runs_on_a_cpu",
    "python -m benchmarks.gpu_check": f"{GPU}:test_the_check_runs_on_a_cpu",
    "python -m benchmarks.gpu": f"{GPU}:test_the_check_runs_on_a_cpu",
    "make soak": f"{HERE}:test_a_long_command_in_short",
    "tercet keys add keys.yaml team-a --requests-per-minute 600 --tokens-per-minute 200000 --concurrent 16": (
        "tests/unit/test_keys.py:test_the_command_draws_lists_and_removes"
    ),
    "tercet serve configs/local.yaml --set gateway.http.host=0.0.0.0 --set gateway.api_keys=keys.yaml "
    "--set 'gateway.tls={certificate: server.pem, key: server.key}'": (
        "tests/integration/test_ray_doors.py:test_who_has_the_key_and_trusts_the_certificate_gets_an_answer"
    ),
    "tercet chat": ON_TINY,
    "tercet status": ON_TINY,
    "tercet top": ON_TINY,
    "tercet explain": ON_TINY,
    "tercet scale decode 3": ON_TINY,
    "tercet role set worker-1 prefill": ON_TINY,
    "tercet down": ON_TINY,
    "curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' "
    """-d '{"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}'""": ON_TINY,
    "python -m benchmarks.serving": ON_TINY,
    "tercet experts show": EXPERTS,
    "tercet experts export counts.npz --windows 4 --seconds 15": EXPERTS,
    "tercet experts solve counts.npz --svg loads.svg": (
        "tests/unit/test_experts_cli.py:test_the_picture_is_an_image_without_links"
    ),
    "tercet experts apply plan.json": EXPERTS,
    "tercet experts show --plan": EXPERTS,
    "tercet experts import counts.pt counts.npz --ranks 32 --top-k 8": (
        "tests/unit/test_foreign_counts.py:test_what_was_imported_is_solved"
    ),
    "tercet validate SPEC": f"{CLI}:test_version_and_validate",
    "tercet spec SPEC": f"{CLI}:test_spec_prints_every_key_and_is_read_again",
    "tercet plan SPEC": f"{CLI}:test_plan_shows_every_member_and_starts_nothing",
    **dict.fromkeys(
        (
            "tercet serve configs/local.yaml",
            "tercet serve configs/local.yaml --set model.dtype=float32 --set gateway.http.port=18000",
        ),
        f"{CLUSTER}:test_ctrl_c_ends_a_local_ray_without_a_trace",
    ),
    "ray job submit --address http://127.0.0.1:8265 --working-dir . -- tercet serve configs/local.yaml": (
        f"{CLUSTER}:test_the_same_file_goes_through_ray_job_submit"
    ),
    "python -m benchmarks.engine": (
        "tests/unit/test_engine_benchmark.py:test_the_command_measures_both_with_the_same_tokens"
    ),
    "python -m benchmarks.rivals": "tests/unit/test_rivals_benchmark.py:test_the_command_measures_real_servers",
    "python -m benchmarks.moe": "tests/unit/test_moe_benchmark.py:test_rows",
    "python -m benchmarks.placement": "tests/unit/test_placement_benchmark.py:test_balance",
    "python -m benchmarks.placement_chain": "tests/unit/test_placement_benchmark.py:test_interlayer",
    "python -m benchmarks.placement_nodes": "tests/unit/test_placement_benchmark.py:test_nodes",
    "python -m benchmarks.latents": "tests/unit/test_latents_benchmark.py:test_figures",
    "python -m benchmarks.groups": "tests/unit/test_groups_benchmark.py:test_the_command_measures_groups",
    "python -m benchmarks.exchange": ("tests/unit/test_exchange_benchmark.py:test_the_command_measures_both_exchanges"),
    "python -m benchmarks.transfer": (
        "tests/unit/test_transfer_benchmark.py:test_the_command_moves_and_compares_every_byte"
    ),
    **dict.fromkeys(
        (
            "python -m tests.soak",
            "python -m benchmarks.gateway",
            "python -m benchmarks.topologies",
            "python -m benchmarks.encode",
            "python -m benchmarks.placement_live",
            "python -m benchmarks.transfer_tail",
        ),
        f"{HERE}:test_a_long_command_in_short",
    ),
}


def commands_in(text: str) -> list[str]:
    """Each on one line, without what is said beside it."""
    found = []
    for command in COMMAND.findall(text):
        joined = re.sub(r"\\\n\s*", "", command)
        found += re.split(r"\s{3,}|\s+#", joined)[0].split(" | ")
    return found


def documented() -> set[str]:
    texts = [README, *(path.read_text() for path in ROOT.glob("docs/**/*.md"))]
    modules = [path for folder in ("benchmarks", "tests", "tercet", "proto") for path in ROOT.glob(f"{folder}/**/*.py")]
    texts += [ast.get_docstring(ast.parse(path.read_text()), clean=False) or "" for path in modules]
    commands = {command for text in texts for command in commands_in(text)} | {f"make {target}" for target in TARGETS}
    commands |= set(MEASURED.findall((ROOT / "benchmarks/RESULTS.md").read_text()))
    return {" ".join(c.split()[:3]) if c.startswith("python -m") else c for c in commands}


def test_every_command_is_run_by_a_test():
    assert documented() == set(RUN_BY)
    for where in set(RUN_BY.values()):
        file, _, name = where.partition(":")
        if file == "Makefile":
            assert name in TARGETS
        elif name:
            assert f"def {name}(" in (ROOT / file).read_text(), where
    assert "exec make test" in (ROOT / ".ci/run").read_text()
    for command, where in RUN_BY.items():
        if where.startswith("Makefile:"):
            target = where.partition(":")[2]
            assert re.search(rf"^{target}:.*\n?.*\b{command.removeprefix('make ')}\b", MAKEFILE, re.MULTILINE), command


# ---- commands that start nothing


def test_make_help_names_every_target_for_users():
    told = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert {line.split()[0] for line in told.splitlines()} == set(TARGETS) - PARTS


def test_make_slow_finds_what_takes_long():
    done = subprocess.run(
        [*MAKE, "slow", "ARGS=--collect-only -q tests/integration/test_token_exact.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "[1]" in done.stdout


def test_make_test_deploy_finds_what_it_runs():
    done = subprocess.run(
        [*MAKE, "-o", "chromium", "test-deploy", "ARGS=--collect-only -q tests/deploy"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "test_dashboard_page.py" in done.stdout
    assert "test_image.py" in done.stdout


def test_make_clean_removes_what_was_made_and_nothing_else(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for made in (".venv/bin", ".mypy_cache", ".pytest_cache", "tercet.egg-info", "tercet"):
        (tmp_path / made).mkdir(parents=True)
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    assert {path.name for path in tmp_path.iterdir()} == {"Makefile", "tercet"}


def test_make_proto_writes_what_is_committed(tmp_path):
    for part in ("proto", "tercet/wire/gen"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    generated = [path for path in (tmp_path / "tercet/wire/gen").iterdir() if path.name != "__init__.py"]
    for path in generated:
        path.unlink()
    subprocess.run([*MAKE, "proto"], cwd=tmp_path, check=True, capture_output=True)
    assert generated
    for path in generated:
        assert path.read_bytes() == (ROOT / path.relative_to(tmp_path)).read_bytes(), path.name


# ---- commands around a cluster


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    made = new_machine()
    yield made
    made.clear()


@pytest.fixture(scope="module")
def spec(machine: Machine) -> tuple[Path, int]:
    """A spec of a small random model, and its HTTP port."""
    return machine.tiny_spec("typed")


def test_make_demo_answers_and_says_what_each_stage_took(machine, spec):
    done = machine.run(*MAKE, "demo", f"SPEC={spec[0]}")
    assert done.returncode == 0, done.stderr
    for stage in ("queue", "prefill", "transfer", "decode"):
        assert stage in done.stdout
    assert not machine.left()


def test_what_the_readme_types_against_a_served_cluster(machine, spec):
    path, port = spec
    process = machine.start(*MAKE, "serve", f"SPEC={path}")
    served = Served(machine, process, "typed", port)
    until(lambda: process.poll() is not None or is_ready(served.client()), 90)
    assert process.poll() is None, served.log

    def typed(command: str, text: str = "") -> str:
        own = command.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
        done = machine.run(*shlex.split(own), text=text)
        assert done.returncode == 0, (own, done.stdout, done.stderr)
        return done.stdout

    (curl,) = (c for c in RUN_BY if c.startswith("curl"))
    assert json.loads(typed(curl))["choices"][0]["message"]["content"]
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert typed(shlex.join([sys.executable, "-c", block.replace(":8000", f":{port}")])).strip()
    assert re.search(r"^ *worker-\d +decode +live", typed("tercet status"), re.MULTILINE)
    assert typed("tercet chat", "Hello\n\n").strip()
    assert "finished" in typed("tercet explain")
    refused = machine.run("tercet", "top")
    assert refused.returncode == 2
    assert "this is no terminal; use --once" in refused.stderr
    assert re.search(r"^ *worker-\d +decode +live", typed("tercet top --once"), re.MULTILINE)
    assert typed("tercet scale decode 3") == "cluster typed: decode has 3 workers (worker-2, worker-3 came)\n"
    again = {"cluster": "typed", "role": "decode", "workers": ["worker-1", "worker-2", "worker-3"]}
    assert json.loads(typed("tercet scale decode 3 --json")) == again | {"came": [], "went": []}
    assert "worker-1 serves as prefill, in its process" in typed("tercet role set worker-1 prefill")
    back = json.loads(typed("tercet role set worker-1 decode --json"))
    assert (back["worker"], back["role"], back["how"]) == ("worker-1", "decode", "in_place")
    loads = "--num-prompts 4 --input-len 20 --output-len 4 --vocab-size 256"
    for line in (c for c in commands_in(module_docstring("benchmarks/serving.py")) if "--trace" not in c):
        own = line if "--base-url" in line else f"{line} --base-url http://127.0.0.1:8000"
        assert "output throughput" in typed(f"{own} {loads}".replace("python", sys.executable, 1))
    asked = f"--base-url http://127.0.0.1:{port} {loads}"
    assert "output throughput" in typed(shlex.join([*MAKE, "bench", f"ARGS={asked}"]))
    assert typed("tercet down") == "cluster typed is down\n"
    assert process.wait(30) == 0, served.log
    until(lambda: not machine.left(), 20)


@pytest.mark.slow  # the same model is served and asked in test_what_the_readme_types_about_pictures
def test_make_demo_vision_says_what_is_in_each_picture(machine):
    done = machine.run(*MAKE, "demo-vision", f"ARGS={ANYWHERE}", seconds=150)
    assert done.returncode == 0, done.stderr
    for told in ("There is a purple circle in the lower left.", "There is the digit 2 in blue."):
        assert told in done.stdout
    assert done.stdout.count("attempts") == 2  # a table for each
    assert not machine.left()


def test_make_demo_moe_says_who_computed_which_experts(machine):
    made = machine.folder / "tiny"
    done = machine.run(*MAKE, "demo-moe", f"TINY_MOE={made}", f"ARGS={ANYWHERE} --set model.source={made}", seconds=150)
    assert done.returncode == 0, done.stderr
    assert "the answer means nothing" in done.stdout
    table = [line.replace("│", " ").split() for line in done.stdout.splitlines() if "worker-" in line and "%" in line]
    assert [row[:-2] for row in table] == [
        ["worker-0", "0", "0-7"],
        ["worker-1", "0", "0-3"],
        ["worker-1", "1", "4-7"],
    ]
    rows = [int(row[-2].replace(",", "")) for row in table]
    layers, k, prompt, answer = 3, 2, 30, 64  # and a request of the readiness check
    assert rows[0] >= prompt * layers * k
    assert min(rows[1:]) > 0
    assert sum(rows[1:]) >= (answer - 1) * layers * k
    assert not machine.left()


def test_what_the_readme_types_about_pictures(machine):
    """And what examples/shapes/README.md does."""
    port = free_port()
    spec = shlex.split(f"{ANYWHERE} --set gateway.http.port={port}")
    process = machine.start("tercet", "serve", "configs/local-vision.yaml", *spec)
    served = Served(machine, process, "local-vision", port)
    until(lambda: process.poll() is not None or is_ready(served.client()), 90)
    assert process.poll() is None, served.log
    drawn = machine.run(sys.executable, "-m", "examples.shapes.pictures", str(machine.folder))
    assert "1.png: one purple circle, lower left\n" in drawn.stdout
    asked = machine.run("tercet", "chat", "What is in the picture?", "--image", f"{machine.folder}/1.png")
    assert asked.stdout == "There is a purple circle in the lower left.\n"
    counted = machine.run(
        *(sys.executable, "-m", "examples.ask_shapes", "--pictures", "5", "--url", f"http://127.0.0.1:{port}")
    )
    assert len(re.findall(r"[45] of 5", counted.stdout)) == 6, (counted.stdout, counted.stderr)
    assert machine.run("tercet", "down").returncode == 0
    assert process.wait(30) == 0, served.log
    until(lambda: not machine.left(), 20)


def module_docstring(file: str) -> str:
    return ast.get_docstring(ast.parse((ROOT / file).read_text()), clean=False) or ""


# ---- commands whose figures take long, in their shortest form

SHORT = {
    "soak": [*MAKE, "soak", "ARGS=--minutes 0.1 --transports tcp"],
    "gateway": [str(BIN / "python"), "-m", "benchmarks.gateway", "--rounds", "1", "--tokens", "4"],
    "topologies": [str(BIN / "python"), "-m", "benchmarks.topologies", "--rounds", "1", "--prompts", "1"],
    "placement_live": [
        *(str(BIN / "python"), "-m", "benchmarks.placement_live"),
        *("--rounds", "1", "--seconds", "1", "--adapt-s", "20"),
    ],
    "encode": [str(BIN / "python"), "-m", "benchmarks.encode", "--rounds", "1", "--requests", "2", "--images", "1"],
    "transfer_tail": [str(BIN / "python"), "-m", "benchmarks.transfer_tail", "--rounds", "1", "--only", "tcp"],
}

MARKS = dict.fromkeys(("soak", "topologies", "encode", "placement_live"), pytest.mark.slow)  # clusters for a minute


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, ())) for name in SHORT])
def test_a_long_command_in_short(name):
    if name == "transfer_tail" and not can_make_namespaces():
        pytest.skip("network namespaces cannot be made here")
    machine = new_machine(PATH=f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin")
    try:
        done = machine.run(*SHORT[name], seconds=160)
        assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-2000:])
        assert not machine.left()
    finally:
        machine.clear()


def can_make_namespaces() -> bool:
    if shutil.which("tc", path="/usr/sbin:/sbin:/usr/bin") is None:
        return False
    with contextlib.suppress(OSError):
        made = subprocess.run(["ip", "netns", "add", "tercet-probe"], check=False, capture_output=True)
        subprocess.run(["ip", "netns", "del", "tercet-probe"], check=False, capture_output=True)
        return made.returncode == 0
    return False
