"""What a command shows while something takes its time: bars on a terminal, lines elsewhere; it waits for neither."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import sys
import time

from tests.machine import ROOT

WAITS = """
import time
from tercet.cluster import output
with output.Waiting("starting cluster x") as bars:
    time.sleep(0.3)
    output.report("worker-0 is up")
    time.sleep(0.3)
    bars.stop()
    output.say("ready")
    time.sleep(0.3)
"""


def on_a_terminal(code: str) -> bytes:
    """What it shows."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # what Linux gives at the end of a terminal
        while piece := os.read(ours, 4096):
            shown += piece
    os.close(ours)
    assert process.wait(30) == 0
    return shown


def test_a_terminal_shows_that_it_goes_on_and_the_lines_whole():
    before, _, behind = on_a_terminal(WAITS).partition(b"ready")
    assert b"starting cluster x" in before
    assert b"tercet: worker-0 is up\r\n" in before
    assert b"starting cluster x" not in behind


def test_a_file_has_the_lines_alone():
    done = subprocess.run([sys.executable, "-c", WAITS], capture_output=True, text=True, timeout=30, check=True)
    assert (done.stdout, done.stderr) == ("ready\n", "tercet: worker-0 is up\n")


LOADS = """
from tercet.cluster import output
from tercet.core import Loading
output.SAY_EVERY_S = 0.0
with output.Waiting("starting cluster c") as bars:
    for done in (1, 2, 3):
        bars.loading("decode worker-1", Loading("tensors read", done, 4))
    output.report("Ray has started")
    bars._bars.refresh()
    bars.stop()
    bars.loading("decode worker-2", Loading("tensors read", 1, 4))
    bars.loading("decode worker-2", Loading("tensors read", 2, 4))
"""


def test_a_terminal_shows_a_bar_for_each_worker_that_loads():
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", on_a_terminal(LOADS).decode()).replace("\r", "\n").splitlines()
    assert any("starting cluster c" in line for line in lines)
    assert any("decode worker-1" in line and "━" in line and "3 of 4 tensors read" in line for line in lines)
    assert any("tercet: Ray has started" in line for line in lines)
    assert [line.strip() for line in lines if line.strip()][-1] == "tercet: decode worker-2: 2 of 4 tensors read"


STALLED = """
import sys
from tercet.cluster import output
from tercet.core import Loading
from tercet.spec import LoggingSpec
output.use(LoggingSpec())
output.LINE_S = output._waits_s = 0.01
with output.Waiting("starting") as bars:
    for done in range(400):
        bars.loading(f"decode worker-{done % 8}", Loading("tensors read", done, 400))
        bars._bars.refresh()
        if done % 20 == 0:
            output.report("a member is up")
for number in range(300):
    output.report(f"line {number} of what is told later, and nobody reads it")
    output.say("x" * 60)
open(sys.argv[1], "w").write("through")
"""


def test_a_terminal_that_takes_nothing_stops_nobody(tmp_path):
    ours, theirs = pty.openpty()
    through, environment = tmp_path / "through", os.environ | {"TERM": "xterm"}
    command = [sys.executable, "-c", STALLED, str(through)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    deadline = time.monotonic() + 60
    while not through.exists() or not through.read_text():
        assert process.poll() is None
        assert time.monotonic() < deadline, "it waits for the terminal"
        time.sleep(0.05)
    os.close(ours)
    process.kill()
    process.wait()


def test_elsewhere_a_line_now_and_then_says_how_far_a_worker_is():
    done = subprocess.run([sys.executable, "-c", LOADS], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "tercet: decode worker-1: 2 of 4 tensors read",
        "tercet: decode worker-1: 3 of 4 tensors read",
        "tercet: Ray has started",
        "tercet: decode worker-2: 2 of 4 tensors read",
    ]
