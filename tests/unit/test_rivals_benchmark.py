"""The comparison with other engines: its arithmetic by hand, and the command against small servers that are real."""

import json
import socket
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import machine, rivals, rivals_systems
from benchmarks.rivals import GOALS, PAIRS, ROWS, Goal, Repetition, chosen, judged, medians, ratio, repeat
from benchmarks.rivals_systems import SYSTEMS, THREADS, Given
from tercet.cluster.spec_file import load_spec
from tercet.core import Role
from tests.machine import until

NOTHING = Given(None, None, Path("nowhere"))
SERVER = f"""#!{sys.executable}
import asyncio, json, sys
from aiohttp import web

if "--version" in sys.argv:
    sys.exit("checking the CPU\\nversion: 1.2.3 (build 4)")

async def completions(request):
    asked = await request.json()
    with open(f"{{sys.argv[0]}}.{{port}}", "a") as log:
        print(asked["prompt"], asked["max_tokens"], file=log)
    response = web.StreamResponse()
    await response.prepare(request)
    for number in range(asked["max_tokens"]):
        await asyncio.sleep(0.001)
        choice = {{"text": "x", "finish_reason": None}}
        await response.write(b"data: " + json.dumps({{"choices": [choice]}}).encode() + b"\\n\\n")
    usage = {{"completion_tokens": asked["max_tokens"]}}
    last = json.dumps({{"choices": [], "usage": usage}})
    await response.write(f"data: {{last}}\\n\\ndata: [DONE]\\n\\n".encode())
    return response

async def models(request):
    return web.json_response({{"data": [{{"id": "small"}}]}})

port = int(sys.argv[sys.argv.index("--port") + 1])
app = web.Application()
app.add_routes([web.get("/health", models), web.get("/v1/models", models), web.post("/v1/completions", completions)])
web.run_app(app, host="127.0.0.1", port=port, shutdown_timeout=1)  # of requests that are still answered
"""


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def command(*args: object):
    app = typer.Typer()
    app.command()(rivals.main)
    return CliRunner().invoke(app, [*map(str, args)])


def test_the_table_has_what_the_goals_compare():
    named = {name for goal in GOALS for name in (goal.ours, goal.rival)} | {name for pair in PAIRS for name in pair}
    assert named == {*SYSTEMS}
    assert {goal.row for goal in GOALS} == {*ROWS}
    assert {(goal.ours, goal.rival) for goal in GOALS} <= {*PAIRS}
    ports = [port for system in SYSTEMS.values() for port in (system.port, system.port + 1)]  # HTTP, and our gRPC
    assert len({*ports}) == len(ports)


def test_rivals_get_our_threads_and_their_port():
    given = Given(Path("/v/vllm"), Path("/l/llama-server"), Path("/m"))
    vllm, llama = (SYSTEMS[name].command(given, 7) for name in ("vllm", "llama.cpp"))
    assert vllm[:3] == ["/v/vllm", "serve", "/m"]
    assert vllm[vllm.index("--port") + 1] == llama[llama.index("--port") + 1] == "7"
    assert llama[llama.index("-t") + 1] == str(THREADS)
    assert llama[llama.index("-m") + 1].endswith(".gguf")
    other = [word if word != "bfloat16" else "float32" for word in vllm]
    assert SYSTEMS["vllm-float32"].command(given, 7) == other != vllm


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name.startswith("tercet")])
def test_our_own_specs_are_valid_and_use_two_threads(name):
    _, serve, path, *settings = SYSTEMS[name].command(NOTHING, 18000)
    spec = load_spec(Path(path), settings[1::2])
    assert serve == "serve"
    assert spec.gateway.http.port == 18000
    assert sum(role.replicas * role.threads for role in spec.roles.values()) == THREADS
    assert spec.model.dtype == ("gguf" if name == "tercet-gguf" else "bfloat16")
    if name == "tercet-pd":
        assert spec.roles[Role.PREFILL].cpu_affinity != spec.roles[Role.DECODE].cpu_affinity


def test_a_rival_that_is_not_given_is_named():
    names, left_out = chosen([], NOTHING)
    assert names == ["tercet", "tercet-pd", "tercet-gguf"]
    assert left_out["vllm"] == "no --vllm PATH"
    assert left_out["llama.cpp"] == "no --llama-server PATH"
    assert chosen(["tercet"], NOTHING)[1]["tercet-pd"] == "not asked for"
    with pytest.raises(typer.BadParameter, match="'ollama' is none of tercet, "):
        chosen(["ollama"], NOTHING)
    with pytest.raises(typer.BadParameter, match="vllm is asked for, and there is no --vllm PATH"):
        chosen(["tercet", "vllm"], NOTHING)


def test_medians_are_of_the_clean_and_ratios_of_medians():
    def made(*values: float) -> list[Repetition]:
        return [Repetition(0, value, 0.1) for value in values]

    found = {
        "tercet": {"decode": [*made(70, 75, 80), Repetition(0, 1.0, 0.3)], "ttft": made(900)},
        "vllm": {"decode": made(50), "ttft": [Repetition(0, 1000, 2.0)]},
    }
    middle = medians(found)
    assert middle == {"tercet": {"decode": 75, "ttft": 900}, "vllm": {"decode": 50}}
    assert ratio(middle, "decode", "tercet", "vllm") == 1.5
    assert ratio(middle, "ttft", "tercet", "vllm") is None
    verdicts = list(judged(middle).columns[2].cells)
    assert verdicts == ["met", "not run", "not run", "not run", "not run"]
    cell = rivals.figures(found, {"decode": ROWS["decode"]}, "").columns[1]
    assert list(cell.cells) == ["75.0 (3 + 1)"]


@pytest.mark.parametrize(("ratio", "least", "most"), [(0.94, False, True), (0.95, True, True), (0.96, True, False)])
def test_a_goal_may_be_a_floor_or_a_ceiling(ratio, least, most):
    assert Goal("ttft", "a", "b", 0.95).met(ratio) is least
    assert Goal("ttft", "a", "b", 0.95, most=True).met(ratio) is most


def test_a_dirty_repetition_is_made_again_and_not_for_ever(monkeypatch):
    def made(*others: float) -> list[Repetition]:
        values = iter(others)
        monkeypatch.setattr(rivals, "Others", lambda: type("Fake", (), {"cores": lambda self: next(values)})())
        numbers = count()
        return list(repeat(lambda: float(next(numbers)), 2, number=1))

    assert [r.clean for r in made(0.25, 0.26, 0.0, 0.0)] == [True, False, True]
    assert [r.clean for r in made(*[1.0] * 9)] == [False] * 6


def test_others_are_those_that_are_not_below_us():
    burn = [sys.executable, "-c", "import time; t = time.process_time()\nwhile time.process_time() - t < 0.5: pass"]
    before = machine._own_ticks()
    subprocess.run(burn, check=True)
    assert machine._own_ticks() - before >= 45
    others, before, start = machine.Others(), machine._own_ticks(), time.perf_counter()
    away = "import os, subprocess, sys; subprocess.Popen(sys.argv[1:])"
    subprocess.run([sys.executable, "-c", away, *burn], check=True)
    while (used := others.cores() * (time.perf_counter() - start)) < 0.4:
        assert time.perf_counter() - start < 60, f"saw {used} s of a process that used 0.5 s"
        time.sleep(0.1)
    assert machine._own_ticks() - before < 45


def test_the_command_measures_real_servers(tmp_path, monkeypatch):
    monkeypatch.setattr(rivals, "MOST_OTHERS", 1e9)  # other tests run beside this one
    server, file = script(tmp_path / "server", SERVER), tmp_path / "r.json"
    args = ["--only", "vllm", "--only", "llama.cpp", "--vllm", server, "--llama-server", server, "--hf-model", tmp_path]
    run = command(*args, "--shrink", 16, "--rounds", 2, "--repetitions", 1, "--result", file)
    assert run.exit_code == 0, run.output
    assert "left out: tercet: not asked for" in run.output
    written = json.loads(file.read_text())
    assert written["versions"] == dict.fromkeys(("vllm", "llama.cpp"), "1.2.3 (build 4)")
    assert written["commit"]
    assert written["workloads"]["ttft"]["inputs"] == 1024 // 16
    for name in ("vllm", "llama.cpp"):
        assert {*written["medians"][name]} == {*ROWS}
        assert min(written["medians"][name].values()) > 0
        assert [r["round"] for r in written["repetitions_made"][name]["ttft"]] == [0, 1]
    asked = [sorted(Path(f"{server}.{SYSTEMS[name].port}").read_text().splitlines()) for name in written["medians"]]
    assert asked[0] == asked[1]
    assert len(asked[0]) == len({*asked[0]}) == 2 * 2 * (1 + 1 + 16)  # of each round, warm or counted


def test_a_rival_that_dies_says_its_last_lines(tmp_path):
    dying = script(tmp_path / "dying", "#!/bin/sh\necho 'no such instruction'\nexit 3\n")
    run = command("--only", "llama.cpp", "--llama-server", dying)
    assert run.exit_code == 1
    assert "llama.cpp ended with code 3 before it was ready. Its last lines:\nno such instruction" in run.output


def test_a_port_that_is_taken_is_told_before_the_start(tmp_path, monkeypatch):
    server = script(tmp_path / "server", SERVER)
    given = Given(None, server, tmp_path)
    with rivals_systems.serving("llama.cpp", given, tmp_path):
        again = command("--only", "llama.cpp", "--llama-server", server)
    assert again.exit_code == 1
    assert f"port {SYSTEMS['llama.cpp'].port}" in again.output


def test_a_command_that_is_ended_leaves_no_server_behind(tmp_path):
    server = script(tmp_path / "server", SERVER.replace("0.001", "100"))
    args = ["--only", "llama.cpp", "--llama-server", server]
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.rivals", *args], cwd=Path(rivals.__file__).parents[1])
    until(lambda: answers(SYSTEMS["llama.cpp"].port))
    process.terminate()
    assert process.wait(rivals_systems.END_S + 60) == 143
    assert not answers(SYSTEMS["llama.cpp"].port)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_path_that_is_not_there_is_refused():
    run = command("--vllm", "/nowhere/vllm")
    assert run.exit_code == 2
    assert "/nowhere/vllm" in run.output
