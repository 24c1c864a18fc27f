"""What the gateway records of requests and tells of the cluster, over HTTP and in the terminal."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import subprocess
import sys
import threading
import time
from pathlib import Path

import aiohttp
import pytest
from typer.testing import CliRunner, Result

from tercet.cluster.cli import app
from tercet.core import PairState, Role, WorkerInfo
from tercet.errors import ClusterError, NoWorkers, UnknownRequest, WorkerLost
from tercet.roles.gateway import shared
from tercet.roles.gateway.dashboard import LISTED
from tercet.roles.gateway.gateway import Gateway
from tercet.roles.gateway.records import CANCELLED, FAILED, MOST_CHOICES, MOST_NOTES, Records
from tercet.roles.router.effects import AttemptEnd
from tercet.roles.router.record import again, decision_of
from tercet.spec import GatewaySpec, ListenSpec
from tests.fakes.gateway import running
from tests.fakes.router import FakeRouter
from tests.helpers import TOKEN, cluster, spec_of
from tests.tiny import tiny_model

TERCET = Path(sys.executable).parent / "tercet"
COMPLETIONS = "/v1/completions"
SECRET = "xyzzy is what they wrote"


async def until(condition):
    while not (found := await condition()):
        await asyncio.sleep(0.02)
    return found


class Asked:
    """A client of the gateway's HTTP port."""

    def __init__(self, http):
        self.http = http

    async def get(self, path):
        async with self.http.get(path) as answer:
            assert answer.status == 200, await answer.text()
            return await answer.json()

    async def requests(self):
        return (await self.get("/dashboard/requests"))["requests"]

    async def complete(self, **fields):
        async with self.http.post(COMPLETIONS, json={"prompt": SECRET, **fields}) as answer:
            return answer, await answer.text()


@pytest.fixture
async def router():
    return FakeRouter()


@pytest.fixture
def fresh(monkeypatch):
    """Who asks is told what is so now, not what others were told."""
    monkeypatch.setattr(shared, "FRESH_S", 0.0)


@pytest.fixture
async def asked(router, fresh):
    async with running(router) as (_, info), aiohttp.ClientSession(info.http_url) as session:
        yield Asked(session)


async def test_a_finished_request_is_kept_without_its_text(asked):
    answer, text = await asked.complete(max_tokens=5)
    assert answer.status == 200
    (one,) = await asked.requests()
    assert one["id"] == answer.headers["X-Request-Id"]
    assert (one["state"], one["prompt_tokens"], one["output_tokens"]) == ("finished", len(SECRET), 5)
    assert one["client"] == "address-127.0.0.1"
    whole = await asked.get(f"/dashboard/requests/{one['id']}")
    assert {bar["stage"] for bar in whole["stages"]} >= {"queue", "prefill", "transfer", "first_decode"}
    ends = [bar["at_s"] + bar["seconds"] for bar in whole["stages"]]
    assert [bar["at_s"] for bar in whole["stages"]][1:] == pytest.approx(ends[:-1])
    assert json.loads(text)["timings"]["kv_bytes"] == whole["timings"]["kv_bytes"]
    assert "xyzzy" not in json.dumps(whole)
    assert whole == await asked.get(f"/dashboard/requests/{one['id'].partition('-')[2][:8]}")


async def test_a_request_that_runs_is_there_and_one_that_was_left(asked, router):
    router.gate = asyncio.Event()
    task = asyncio.create_task(asked.complete(max_tokens=5))
    (one,) = await until(asked.requests)
    assert one["state"] in ("running", "waiting")
    task.cancel()
    states = lambda: asked.requests()  # noqa: E731
    while (await states())[0]["state"] != CANCELLED:
        await asyncio.sleep(0.02)


async def test_a_failed_request_says_why_and_a_wrong_one_quotes_nothing(asked, router):
    router.error, router.error_after = WorkerLost("decode-1 was lost"), 2
    answer, _ = await asked.complete(max_tokens=5)
    assert answer.status == 502
    (lost,) = await asked.requests()
    assert (lost["state"], lost["code"], lost["message"]) == (FAILED, "worker_lost", "decode-1 was lost")
    assert lost["output_tokens"] == 2
    answer, _ = await asked.complete(prompt=SECRET * 20)
    assert answer.status == 400
    wrong, _ = await asked.requests()
    assert (wrong["state"], wrong["code"], wrong["message"]) == (FAILED, "context_too_long", "")


async def test_notes_and_choices_are_bounded(asked, router):
    answer, _ = await asked.complete(max_tokens=2, n=4, prompt=["a", "b", "c", "d", "e"])
    assert answer.status == 200
    router.gate = asyncio.Event()
    task = asyncio.create_task(asked.complete(max_tokens=2))
    while (await asked.requests())[0]["choices"] != 1 or not router.running:
        await asyncio.sleep(0.02)
    for number in range(100):
        router.watcher(router.requests[-1], AttemptEnd(time.monotonic(), "rejected", "d", "", f"number {number}"))
    router.gate.set()
    await task
    newest, many = await asked.requests()
    assert many["choices"] == 20
    assert len((await asked.get(f"/dashboard/requests/{many['id']}"))["told"]) == MOST_CHOICES
    (choice,) = (await asked.get(f"/dashboard/requests/{newest['id']}"))["told"]
    said = [note["message"] for note in choice["notes"]]
    assert len(said) == MOST_NOTES == 100 - choice["notes_left_out"]
    assert (said[0], said[-1]) == ("number 0", "number 99")


async def test_what_the_page_is_made_of(asked):
    for path, kind in (
        ("/dashboard", "text/html"),
        ("/dashboard/static/main.js", "text/javascript"),
        ("/dashboard/static/style.css", "text/css"),
        ("/dashboard/static/vendor/uPlot.iife.min.js", "text/javascript"),
    ):
        async with asked.http.get(path) as answer:
            assert (answer.status, answer.content_type) == (200, kind)
            policy = answer.headers["Content-Security-Policy"]
            assert "default-src 'self'" in policy
            assert "unsafe" not in policy
            assert (
                "http" not in (await answer.text()).split("<body>")[0].replace("http://www.w3.org", "")
                or "uPlot" in path
            )
    async with asked.http.get("/dashboard/", allow_redirects=True) as answer:
        assert answer.url.path == "/dashboard"
    for path in ("/dashboard/static/../gateway.py", "/dashboard/static/%2e%2e/gateway.py", "/dashboard/static/none"):
        async with asked.http.get(path) as answer:
            assert answer.status == 404
    async with asked.http.get("/dashboard/state?since=nan") as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (400, "invalid_request")
    async with asked.http.get("/dashboard/requests/nothing") as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (404, UnknownRequest.code())


async def test_members_and_pairs_are_told(router):
    states = {"transport": "shm", "bandwidth": 5e9, "latency_s": 1e-5}
    load = router.loads()["decode-1"]
    router.loads = lambda: {"decode-1": load, "prefill-0": type(load)(pairs=(PairState("decode-1", **states),))}
    infos = [WorkerInfo(n, Role(n.partition("-")[0]), 1, "", "", "", 7, "here") for n in ("decode-1", "prefill-0")]
    async with running(router) as (gateway, info), aiohttp.ClientSession(info.http_url) as session:
        await gateway.set_workers(infos)
        lost = {"role": "decode", "state": "lost", "epoch": 3, "reason": "killed", "experts": ["many"]}
        gateway.members_told({"prefill": 1, "decode": 2}, {"decode-2": lost})
        asked = Asked(session)
        await asked.complete(max_tokens=3)
        await until(lambda: asked.get("/dashboard/state"))
        state = await asked.get("/dashboard/state")
        while not state["points"] or not any(point["finished"] for point in state["points"]):
            await asyncio.sleep(0.1)
            state = await asked.get("/dashboard/state")
        workers = {worker["id"]: worker for worker in state["workers"]}
        assert workers["decode-1"]["state"] == "live"
        assert workers["decode-1"]["load"]["kv_use"] == pytest.approx(0.6)
        assert (workers["decode-2"]["state"], workers["decode-2"]["reason"]) == ("lost", "killed")
        assert "experts" not in workers["decode-2"]
        (pair,) = state["pairs"]
        assert (pair["from"], pair["to"], pair["bytes"], pair["transport"]) == ("prefill-0", "decode-1", 4096, "shm")
        assert pair["bytes_per_s"] > 0
        assert sum(point["tokens_out"] for point in state["points"]) > 0
        assert await asked.get(f"/dashboard/state?since={state['now']}") is not None
        newer = (await asked.get(f"/dashboard/state?since={state['points'][-1]['t']}"))["points"]
        assert all(point["t"] > state["points"][-1]["t"] for point in newer)


async def test_the_newest_are_listed_unless_more_are_asked_for(asked):
    for _ in range(LISTED + 2):
        await asked.complete(max_tokens=1)
    newest = await asked.requests()
    everyone = (await asked.get("/dashboard/requests?limit=512"))["requests"]
    assert (len(newest), len(everyone)) == (LISTED, LISTED + 2)
    assert newest == everyone[:LISTED]
    assert (await asked.get("/dashboard/requests?limit=3"))["requests"] == everyone[:3]


async def test_who_asks_without_end_holds_up_nothing(router, monkeypatch):
    """All are told from one rendering, and while that is on its way, the loop does what else there is."""
    go, lines, rendered = threading.Event(), Records.lines, []

    def slow(records):
        work = lines(records)
        rendered.append(records)
        return lambda: (go.wait(20), work())[1]

    monkeypatch.setattr(Records, "lines", slow)
    async with running(router) as (_, info), aiohttp.ClientSession(info.http_url) as session:
        asked = Asked(session)
        ask = [asyncio.create_task(asked.get(f"/dashboard/requests?limit={limit}")) for limit in range(20)]
        await until(lambda: asyncio.sleep(0, rendered))
        ask[0].cancel()  # it began the rendering
        answer, text = await asked.complete(max_tokens=20, stream=True)
        assert (answer.status, text.count("data: ") > 20) == (200, True)
        async with session.get("/v1/models") as answer:
            assert answer.status == 200
        assert not ask[1].done()
        go.set()
        assert all(told["requests"] == [] for told in await asyncio.gather(*ask[1:]))
        assert len(rendered) == 1


# ---- over real workers


def command(*args: str, columns: str = "100") -> Result:
    return CliRunner().invoke(app, args, env={"COLUMNS": columns})


async def test_each_decision_of_real_workers_is_made_again_and_explained():
    async with cluster(spec_of("pd", decoders=2, prefills=2, source=tiny_model())) as made:
        anywhere = GatewaySpec(http=ListenSpec(port=0), grpc=ListenSpec(port=0))
        gateway = Gateway(made.spec.model_copy(update={"gateway": anywhere}), TOKEN, made.router)
        info = await gateway.start()
        try:
            async with aiohttp.ClientSession(info.http_url) as session:
                await gateway.set_workers(list(made.infos.values()))
                asked = Asked(session)
                await asyncio.gather(*(asked.complete(max_tokens=20, ignore_eos=True) for _ in range(12)))
                listed = await asked.requests()
                wholes = [await asked.get(f"/dashboard/requests/{one['id']}") for one in listed]
            decisions = [decision_of(n) for w in wholes for n in w["told"][0]["notes"] if n["kind"] == "choice"]
            assert len(decisions) >= 12
            assert [again(decision) for decision in decisions] == decisions
            assert {decision.decode for decision in decisions} == {"decode-0", "decode-1"}
            for whole, decision in zip(wholes, decisions, strict=False):
                assert whole["timings"]["workers"] == {"prefill": decision.prefill, "decode": decision.decode}
            await asyncio.to_thread(_in_the_terminal, info.http_url, wholes[0])
        finally:
            await gateway.stop()


def _in_the_terminal(url: str, whole: dict[str, object]) -> None:
    told = command("explain", whole["id"], "--url", url)
    assert told.exit_code == 0, told.output
    pair = f"{whole['timings']['workers']['prefill']} → {whole['timings']['workers']['decode']}"
    for words in (f"attempt 1: {pair}", f"✓ {pair}", "first decode", "the policy makes the same choices"):
        assert words in told.stdout
    found = json.loads(command("explain", whole["id"].partition("-")[2][:8], "--url", url, "--json").stdout)
    assert found["recomputed"] == [True]
    assert found["id"] == whole["id"]
    assert len(json.loads(command("explain", "--url", url, "--json").stdout)) == 12
    assert command("explain", "--url", url).stdout.count("finished") == 12
    unknown = command("explain", "nothing", "--url", url).exception
    assert isinstance(unknown, UnknownRequest)
    assert "no request 'nothing' is known" in str(unknown)
    state = json.loads(command("top", "--json", "--url", url).stdout)
    assert {worker["id"] for worker in state["workers"]} == {"prefill-0", "prefill-1", "decode-0", "decode-1"}
    for columns in ("40", "80", "140"):
        once = command("top", "--once", "--url", url, columns=columns).stdout
        assert "decode-0" in once
        assert max(map(len, once.splitlines())) <= int(columns)
    _watch_until_q(url)


def _watch_until_q(url: str) -> None:
    """`tercet top` in a terminal, until q is typed."""
    ours, theirs = pty.openpty()
    with subprocess.Popen([TERCET, "top", "--url", url], stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        while b"decode-0" not in shown:
            shown += os.read(ours, 65536)
        os.write(ours, b"q")
        try:
            while os.read(ours, 65536):
                pass
        except OSError:  # the terminal's other end is closed
            pass
        os.close(ours)
        assert process.wait(20) == 0


def test_who_asks_nobody_is_told_so():
    for args in (("explain", "x"), ("top", "--once"), ("top",)):
        none = command(*args, "--url", "http://127.0.0.1:1").exception
        assert isinstance(none, NoWorkers)
        assert "cannot reach http://127.0.0.1:1" in str(none)
        missing = command(*args, "--name", "nobody").exception
        assert isinstance(missing, ClusterError)
        assert "no cluster named nobody is served on this machine" in str(missing)
