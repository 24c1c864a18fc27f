"""Fixtures of all tests."""

from __future__ import annotations

import functools

import pytest
import torch

from tercet.models.sources import load_model
from tercet.roles import worker

torch.set_num_threads(1)  # two cores, and most tests run several workers
_load_once = functools.cache(load_model)


@pytest.fixture(autouse=True)
def _one_copy_of_the_weights(monkeypatch):
    """In-process workers share the weights, which they only read."""
    monkeypatch.setattr(worker, "load_model", _load_once)
