"""What a command shows while something takes its time: on a terminal, and nowhere else."""

import os
import pty
import subprocess
import sys

WAITS = """
import time
from tercet.cluster import output
with output.waiting("starting cluster x") as stands:
    time.sleep(0.3)
    output.report("worker-0 is up")
    time.sleep(0.3)
    stands()
    output.say("ready")
    time.sleep(0.3)
"""


def test_a_terminal_shows_that_it_goes_on_and_the_lines_whole():
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, "-c", WAITS], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    assert process.wait(30) == 0
    before, _, behind = shown.partition(b"ready")
    assert b"starting cluster x" in before
    assert b"tercet: worker-0 is up\r\n" in before
    assert b"starting cluster x" not in behind


def test_a_file_has_the_lines_alone():
    done = subprocess.run([sys.executable, "-c", WAITS], capture_output=True, text=True, timeout=30, check=True)
    assert (done.stdout, done.stderr) == ("ready\n", "tercet: worker-0 is up\n")
