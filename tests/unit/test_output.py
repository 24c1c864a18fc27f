"""Standard input, output and error as they may come: closed, or with nobody left who reads."""

from __future__ import annotations

import os
import subprocess
import sys

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
