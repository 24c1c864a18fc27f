"""Standard input, output and error as they may come: closed, or with nobody left who reads."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import sys
import time

import pytest

from tests.machine import BIN, ROOT


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_no_other_file_gets_the_number_of_one_that_came_closed(closed):
    code = (
        "import os, sys; from tercet.cluster import output; output.open_closed(); "
        "opened = os.open('/dev/null', 0); print('ok'); print('ok', file=sys.stderr); sys.exit(0 if opened > 2 else 9)"
    )
    done = subprocess.run(["bash", "-c", f'exec {sys.executable} -c "{code}" {closed}'], cwd=ROOT, check=False)
    assert done.returncode == 0


def test_a_fault_is_an_exit_code_also_where_nobody_hears_it():
    for closed in ("2>&-", "2>/dev/full"):
        command = f"exec {BIN}/tercet validate none.yaml {closed}"
        assert subprocess.run(["bash", "-c", command], cwd=ROOT, check=False).returncode == 2


@pytest.mark.parametrize("gone", ["full disk", "no reader"])
def test_what_cannot_be_written_is_not_raised(gone):
    if gone == "no reader":
        reader, where = os.pipe()
        os.close(reader)
    else:
        where = os.open("/dev/full", os.O_WRONLY)
    code = "from tercet.cluster import output; output.say('one'); output.report('two'); raise SystemExit(4)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=where, stderr=where, check=False)
    os.close(where)
    assert done.returncode == 4


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
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    done = subprocess.Popen([sys.executable, "-c", LOADS], cwd=ROOT, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    told = b""
    with contextlib.suppress(OSError):  # what Linux gives at the end of a terminal
        while part := os.read(ours, 4096):
            told += part
    assert done.wait(30) == 0
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", told.decode()).replace("\r", "\n").splitlines()
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
