"""Fixtures of all tests."""

from __future__ import annotations

import functools
import os
import sys

import pytest
import torch

from tercet.models.progress import unheard
from tercet.models.sources import load_model
from tercet.roles import worker
from tercet.transfer.transports.nixl import BUILDS

torch.set_num_threads(1)  # two cores, and most tests run several workers
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton, whose own functions depend on it
_STATUS = pytest.StashKey[int]()
_load_once = functools.cache(load_model)


def _load_model(spec, kernels=None, ranks=None, hear=unheard):
    """A rank's share is its own, and ends with it."""
    return _load_once(spec, kernels) if ranks is None else load_model(spec, kernels, ranks, hear)


@pytest.fixture(autouse=True)
def _one_copy_of_the_weights(monkeypatch):
    """In-process workers share the weights, which they only read."""
    monkeypatch.setattr(worker, "load_model", _load_model)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[_STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """NIXL bundles libnl, and where the system's is loaded too, the C library's exit handlers crash in it. That would
    turn a good run into a failure, so they are passed over (docs/decisions/009)."""
    if any(f"{build}._bindings" in sys.modules for build in BUILDS):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash[_STATUS])
