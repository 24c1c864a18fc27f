"""Ours listen where they were told to, over every transport; and a mover that was stopped lets its process end well."""

from __future__ import annotations

import ipaddress
import subprocess
import sys

import pytest

from tests.movers import CLASSES


@pytest.mark.parametrize("name", CLASSES)
def test_a_mover_listens_on_its_own_address_and_ends_well(name):
    if (why := CLASSES[name].missing()) is not None:
        pytest.skip(why)
    ran = subprocess.run(
        [sys.executable, "-m", "tests.field.listening", name], capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr
    addresses = [line.split()[1] for line in ran.stdout.splitlines() if line.startswith("listens ")]
    assert addresses
    assert [a for a in addresses if not ipaddress.ip_address(a).is_loopback] == []
