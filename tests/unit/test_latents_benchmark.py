"""The benchmark of latents, tried on a tiny model."""

from __future__ import annotations

import pytest
import torch

from benchmarks import latents
from tercet.kernels.native import trial


@pytest.mark.skipif(trial.missing() is not None, reason=str(trial.missing()))
def test_figures():
    tiny = latents.SHAPE | {"vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 2, "n_routed_experts": 8}
    found = latents.measure(tiny, sequences=2, context=20, threads=1, calls=1)
    assert [*found] == ["transformers", "torch", "native"]
    assert all(len(each) == 2 and min(each) > 0 for each in found.values())


def test_wrong_logits_get_no_figures():
    with pytest.raises(SystemExit, match=r"off by 0\.5"):
        latents._check(torch.tensor([1.5]), torch.ones(1))
