"""The benchmark against a real gateway with a fake router, and its arithmetic on outcomes made by hand."""

import asyncio
import gzip
import json
import math
import re

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from benchmarks.serving import Outcome, Target, first_model, main, parse_goodput, report, run
from benchmarks.workload import paced, random_requests, trace_requests
from tercet.errors import WorkerLost
from tests.fakes.gateway import running
from tests.fakes.router import FakeRouter


def test_figures_of_outcomes_made_by_hand():
    outcomes = [
        Outcome(10, sent=0.0, ttft=0.1, e2el=0.5, itl=[0.2, 0.2], output_len=3),
        Outcome(20, sent=0.5, ttft=0.3, e2el=1.5, itl=[1.2], output_len=2),
        Outcome(5, sent=0.1, error="gone"),
    ]
    result = report(outcomes, {"ttft": 200, "e2el": 1000})
    assert (result["completed"], result["failed"]) == (2, 1)
    assert result["duration"] == 2.0
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (30, 5)
    assert (result["request_throughput"], result["output_throughput"]) == (1.0, 2.5)
    assert result["total_token_throughput"] == 17.5
    assert result["request_goodput"] == 0.5  # the second one is late
    assert result["mean_ttft_ms"] == pytest.approx(200)
    assert result["median_itl_ms"] == pytest.approx(200)
    assert result["mean_tpot_ms"] == pytest.approx((200 + 1200) / 2)
    assert result["p99_e2el_ms"] == pytest.approx(1490)
    assert result["errors"] == ["", "", "gone"]


def test_arrivals_have_the_rate_and_the_burstiness():
    requests = random_requests(4000, (2, 2), 0.0, 0, 100, seed=0)
    for burstiness in (0.25, 1.0, 16.0):
        gaps = np.diff([0.0] + [r.at for r in paced(requests, 5.0, burstiness, seed=1)])
        assert gaps.mean() == pytest.approx(1 / 5.0, rel=0.1)
        assert gaps.std() / gaps.mean() == pytest.approx(1 / math.sqrt(burstiness), rel=0.15)


def test_random_prompts_have_their_lengths_and_prefix():
    requests = random_requests(200, (50, 20), 0.5, 8, 100, seed=3)
    assert {r.prompt[:8] for r in requests} == {requests[0].prompt[:8]}
    assert {25, 75} & {len(r.prompt) - 8 for r in requests}
    assert all(25 <= len(r.prompt) - 8 <= 75 and 10 <= r.output_len <= 30 for r in requests)
    assert requests == random_requests(200, (50, 20), 0.5, 8, 100, seed=3)


def test_traces_in_their_three_forms(tmp_path):
    mooncake = tmp_path / "trace.jsonl.gz"
    rows = [
        {"timestamp": 3000, "input_length": 1000, "output_length": 5, "hash_ids": [7, 8]},
        {"timestamp": 4500, "input_length": 900, "output_length": 6, "hash_ids": [7, 9]},
    ]
    with gzip.open(mooncake, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    first, second = trace_requests(mooncake, 10, 800, 100, seed=0)
    assert (first.at, second.at, len(first.prompt), second.output_len) == (0.0, 1.5, 800, 6)
    assert first.prompt[:512] == second.prompt[:512]
    assert first.prompt[512:] != second.prompt[512:]
    azure = tmp_path / "azure.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,4,44\n2023-11-16 18:15:47.6805900,3,1\n"
    )
    assert [(r.at, len(r.prompt), r.output_len) for r in trace_requests(azure, 9, 800, 100, 0)] == [
        (0, 4, 44),
        (1, 3, 1),
    ]
    lengths = tmp_path / "lengths.csv"
    lengths.write_text("num_prefill_tokens,num_decode_tokens\n74,918\n")
    assert [(len(r.prompt), r.output_len) for r in trace_requests(lengths, 9, 800, 100, 0)] == [(74, 918)]


async def test_closed_loop_against_the_gateway():
    router = FakeRouter("x" * 50, delay_s=0.001)
    most = 0

    def script(_):
        nonlocal most
        most = max(most, router.running)
        return b"x" * 50

    router.script = script
    async with running(router) as (_, info):
        requests = random_requests(12, (10, 8), 0.0, 0, 256, seed=0)
        outcomes = await run(Target(f"{info.http_url}/v1/completions", "fake-model", True), requests, 3, 30)
    assert most == 3
    assert [r.token_ids for r in router.requests] == [r.prompt for r in requests]
    for outcome in outcomes:
        assert outcome.error == ""
        assert outcome.output_len == 8
        assert len(outcome.itl) == 7
        assert 0 < outcome.ttft < outcome.e2el
        assert sum(outcome.itl) == pytest.approx(outcome.e2el - outcome.ttft)


@pytest.mark.parametrize("after", [0, 3])
async def test_failures_are_counted_not_measured(after):
    router = FakeRouter()
    router.error, router.error_after = WorkerLost("gone"), after
    async with running(router) as (_, info):
        requests = random_requests(2, (10, 8), 0.0, 0, 256, seed=0)
        outcomes = await run(Target(f"{info.http_url}/v1/completions", "fake-model", True), requests, None, 30)
    assert all("gone" in outcome.error for outcome in outcomes)
    assert report(outcomes, {})["failed"] == 2


async def test_the_command_writes_json(tmp_path):
    async with running(FakeRouter()) as (_, info):
        app = typer.Typer()
        app.command()(main)
        args = ["--base-url", info.http_url, "--num-prompts", "5", "--input-len", "10", "--output-len", "4"]
        args += ["--vocab-size", "256", "--request-rate", "200", "--goodput", "ttft:5000"]
        args += ["--result", str(tmp_path / "r.json")]
        outcome = await asyncio.to_thread(CliRunner().invoke, app, args)
    assert outcome.exit_code == 0, outcome.output
    assert "TTFT" in outcome.output
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["completed"], result["model_id"], result["total_output_tokens"]) == (5, "fake-model", 20)
    assert result["request_goodput"] == result["request_throughput"]


@pytest.mark.parametrize("server", ["nobody", "no OpenAI"])
async def test_without_a_server_it_ends_in_a_line(server):
    async with running(FakeRouter()) as (_, info):
        url = "http://127.0.0.1:1" if server == "nobody" else f"{info.http_url}/health?"
        with pytest.raises(SystemExit, match=f"{re.escape(url)} names no model") as ended:
            await first_model(url)
    assert "\n" not in str(ended.value)


@pytest.mark.parametrize("pair", ["ttft", "ttft:soon", "itl:5"])
def test_a_goodput_that_is_none_is_refused(pair):
    with pytest.raises(typer.BadParameter, match=pair):
        parse_goodput([pair])
