"""The page in a real browser, against a real cluster under Ray, while it is asked: by mouse and by keyboard, light and
dark, wide and narrow; a worker that is killed, a gateway that is gone."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tercet.errors import TercetError
from tercet.roles.gateway.gateway import Gateway
from tercet.spec import GatewaySpec
from tests.fakes.gateway import spec
from tests.fakes.router import FakeRouter
from tests.fakes.tokenizer import MODEL
from tests.machine import Served, free_port, is_ready, new_machine, until

pytestmark = [pytest.mark.deploy, pytest.mark.ray, pytest.mark.timeout(900)]

CHROMIUM = shutil.which("chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
PATIENCE_MS = 60_000
START_S = 300.0  # of a cluster, on a machine that has other things to do
expect.set_options(timeout=PATIENCE_MS)
SHOTS = Path(__file__).parents[2] / "build" / "dashboard"  # looked at by people


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM, "Debian's chromium is not installed: make chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    machine = new_machine()
    try:
        path, port = machine.tiny_spec("shown")
        wanted = yaml.safe_load(path.read_text())
        wanted["roles"]["decode"] = wanted["roles"]["decode"] | {"replicas": 2}
        wanted["ray"]["start_timeout_s"] = START_S
        path.write_text(yaml.safe_dump(wanted, sort_keys=False))
        process = machine.start("tercet", "serve", str(path))
        served = Served(machine, process, "shown", port)
        until(lambda: process.poll() is not None or "ready: " in served.log, START_S)
        assert is_ready(served.client()), served.log
        yield served
    finally:
        machine.clear()


@contextmanager
def traffic(served: Served) -> Iterator[None]:
    """Two users who ask all the time; that some requests fail while a worker is killed is no matter here."""
    stop = threading.Event()

    def ask(number: int) -> None:
        count = 0
        while not stop.is_set():
            count += 1
            try:
                served.client().generate(f"user {number} asks {count} " * 6, max_tokens=40, ignore_eos=True)
            except TercetError:
                stop.wait(0.5)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


class Watched:
    """A page whose complaints and requests are kept."""

    def __init__(self, browser: Browser, url: str, width: int, scheme: str) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page: Page = self.context.new_page()
        self.complaints: list[str] = []
        self.asked: set[str] = set()
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.asked.add(re.match(r"\w+://[^/]*", request.url)[0]))
        self.page.set_default_timeout(PATIENCE_MS)
        self.url = url
        self.page.goto(f"{url}/dashboard")

    def overflows(self) -> bool:
        return self.page.evaluate("document.documentElement.scrollWidth > innerWidth")

    def shot(self, name: str) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SHOTS / f"{name}.png")

    def close(self) -> None:
        self.context.close()


@contextmanager
def watched(browser: Browser, served: Served, width: int = 1280, scheme: str = "light") -> Iterator[Watched]:
    opened = Watched(browser, f"http://127.0.0.1:{served.http}", width, scheme)
    try:
        yield opened
    finally:
        opened.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_shows_the_cluster_and_a_request(browser, served, width, scheme):
    with traffic(served), watched(browser, served, width, scheme) as it:
        page = it.page
        expect(page.locator("#ready")).to_have_text("● ready")
        expect(page.locator("#picture .worker.live")).to_have_count(3)
        expect(page.locator("#picture .link")).to_have_count(2)
        expect(page.locator("#picture .speed").first).to_contain_text("B/s")
        expect(page.locator("#charts canvas")).to_have_count(6)
        expect(page.locator("#charts .values b").first).to_have_text(re.compile("s$"))
        done = page.locator("#list tr.finished")
        expect(done.first).to_be_visible()
        assert not it.overflows()
        it.shot(f"{scheme}-{width}")
        done.first.locator("button").click()
        expect(page.locator("#detail .timeline tr").filter(has_text="prefill")).to_have_count(1)
        expect(page.locator("#detail .timeline tr").filter(has_text="worker-0").first).to_be_visible()
        page.locator("#detail details summary").first.click()
        expect(page.locator("#detail .scores tr.chosen")).to_have_count(1)
        assert not it.overflows()
        it.shot(f"{scheme}-{width}-request")
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == (scheme == "dark")
        assert it.complaints == []
        assert it.asked == {it.url}


def test_a_keyboard_is_enough(browser, served):
    with traffic(served), watched(browser, served) as it:
        page = it.page
        expect(page.locator("#list tbody tr").nth(3)).to_be_visible()
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        for _ in range(12):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.closest('#list') !== null"):
                break
        row = "document.activeElement.closest('tr').dataset.id"
        first = page.evaluate(row)
        page.keyboard.press("ArrowDown")
        second = page.evaluate(row)
        assert second != first
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        page.wait_for_timeout(2500)  # newer requests come above it
        assert page.evaluate(row) == second
        page.keyboard.press("Enter")
        expect(page.locator("#detail")).to_be_visible()
        expect(page.locator("#detail-title")).to_have_text(f"Request {second}")
        expect(page.locator("#detail .timeline")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.locator("#detail")).to_be_hidden()
        assert page.evaluate(row) == second
        assert it.complaints == []


def test_the_theme_can_be_chosen_and_stays(browser, served):
    with watched(browser, served, scheme="light") as it:
        page = it.page
        for wanted in ("Theme: light", "Theme: dark"):
            page.locator("#theme").click()
            expect(page.locator("#theme")).to_have_text(wanted)
        page.reload()
        expect(page.locator("#theme")).to_have_text("Theme: dark")
        assert it.complaints == []


def test_what_a_client_writes_is_no_markup(browser, served):
    client = served.client()
    with pytest.raises(TercetError):
        client.generate("x", model="<img src=x onerror=alert(1)>")
    with watched(browser, served) as it:
        expect(it.page.locator("#ready")).to_have_text("● ready")
        it.page.goto(f"{it.url}/dashboard#%3Cimg%20src%3Dx%3E")
        it.page.reload()
        expect(it.page.locator("#detail-title")).to_have_text("Request <img src=x>")
        expect(it.page.locator("#detail-body")).to_contain_text("not, or no longer")
        assert it.page.locator("#detail img").count() == 0


def test_a_killed_worker_and_a_gateway_that_is_gone(browser, served):
    with watched(browser, served) as it:
        page = it.page
        expect(page.locator("#picture .worker.live")).to_have_count(3)
        workers = served.client().get("/dashboard/state")["workers"]
        victim, pid = next((worker["id"], worker["pid"]) for worker in workers if worker["role"] == "decode")
        with traffic(served):
            os.kill(pid, signal.SIGKILL)
            hurt = page.locator(f'#picture .worker[data-worker="{victim}"]:not(.live)')
            expect(hurt).to_have_count(1)
            assert re.search("lost|starting|unreachable", hurt.locator(".state").text_content())
            it.shot("killed")
            expect(page.locator(f'#picture .worker.live[data-worker="{victim}"]')).to_have_count(
                1, timeout=1e3 * START_S
            )
        assert served.machine.run("tercet", "down", "--name", "shown").returncode == 0
        expect(page.locator("#fault")).to_contain_text("does not answer")
        expect(page.locator("#ready")).to_have_text("✕ unreachable")
        expect(page.locator("#picture .worker")).to_have_count(3)  # as it was
        it.shot("gone")


@contextmanager
def small_gateway(port: int) -> Iterator[None]:
    """A gateway over a fake router, at a port that is known before, on a loop of its own."""
    started, stop = threading.Event(), threading.Event()

    async def work() -> None:
        wanted = spec().model_copy(update={"gateway": GatewaySpec(http={"port": port}, grpc={"port": 0})})
        gateway = Gateway(wanted, "token", FakeRouter(), MODEL)
        await gateway.start()
        started.set()
        while not stop.is_set():
            await asyncio.sleep(0.05)
        await gateway.stop()

    thread = threading.Thread(target=asyncio.run, args=(work(),))
    thread.start()
    try:
        assert started.wait(30)
        yield
    finally:
        stop.set()
        thread.join()


def test_it_recovers_when_the_gateway_is_back(browser):
    port = free_port()
    with small_gateway(port):
        it = Watched(browser, f"http://127.0.0.1:{port}", 1280, "light")
        expect(it.page.locator("#ready")).to_have_text("● ready")
    expect(it.page.locator("#fault")).to_contain_text("does not answer")
    with small_gateway(port):
        expect(it.page.locator("#ready")).to_have_text("● ready")
        expect(it.page.locator("#fault")).to_be_hidden()
        it.page.route("**/dashboard/state*", lambda route: route.fulfill(status=401, body="{}"))
        expect(it.page.locator("#fault")).to_contain_text("asks for an API key")
        it.page.unroute("**/dashboard/state*")
        expect(it.page.locator("#fault")).to_be_hidden()
        it.close()
