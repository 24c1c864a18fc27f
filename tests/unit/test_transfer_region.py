"""The host memory of a KV cache."""

from __future__ import annotations

import errno
import os

import pytest

from tercet.errors import UnsupportedSpec
from tercet.roles.memory import _host_region
from tercet.transfer.memory import region
from tercet.transfer.memory.layout import KvLayout
from tercet.transfer.memory.region import Region
from tercet.transfer.mover.receiver import KvReceiver
from tercet.transfer.transports.tcp import TcpTransport
from tests.movers import config

LAYOUT = KvLayout(2, 64, 16, 4, 32, "float32")


@pytest.fixture
def made():
    made = Region(LAYOUT)
    yield made
    made.close()


def taken(made: Region) -> int:
    return os.fstat(made.fd).st_blocks * 512


def test_all_pages_are_taken_at_once_and_hold_zeros(made):
    assert taken(made) == 0
    made.populate()
    if taken(made) == 0:
        pytest.skip("this kernel takes pages one by one")
    assert taken(made) >= made.num_bytes
    assert not any(made.view)


def test_an_older_kernel_takes_them_when_they_are_written(made, monkeypatch):
    monkeypatch.setattr(region, "MADV_POPULATE_WRITE", 1 << 20)  # no advice that a kernel knows
    made.populate()
    assert taken(made) == 0
    made.view[:4] = b"word"
    assert 0 < taken(made) < made.num_bytes


def test_memory_that_is_not_there_is_named(monkeypatch):
    """And the worker's thread keeps its own cores."""
    cores = os.sched_getaffinity(0)
    made = _host_region(LAYOUT, [min(cores)])
    assert os.sched_getaffinity(0) == cores
    made.close()
    monkeypatch.setattr(region.mmap, "mmap", lambda *_: Full(LAYOUT.total_bytes + region.SCRATCH))
    with pytest.raises(UnsupportedSpec, match=r"kv\.blocks: no 0\.0 GB for 64 blocks of KV in this machine's memory"):
        _host_region(LAYOUT, [min(cores)])
    assert os.sched_getaffinity(0) == cores


class Full(bytearray):
    """A mapping for whose pages there is no memory."""

    def madvise(self, option, start, length):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")


def test_a_receiver_that_never_started_stops(made):
    """As in a worker that fails while it starts."""
    KvReceiver(config("d"), 1, made, [TcpTransport()], print).stop()
