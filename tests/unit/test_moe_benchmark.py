"""The benchmark of experts, tried on tiny ones."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_timing import Timer
from tests import triton_interpreter  # noqa: F401 # before Triton: without a GPU, its kernels are then interpreted

pytest.importorskip("triton")

from benchmarks import moe  # after the helper
from tercet.kernels.native import trial

TINY = moe.Shape("tiny", 4, 2, 16, 8)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_rows(device, monkeypatch):
    """Of a GPU's kinds too, on the CPU."""
    if device == "cpu" and trial.missing() is not None:
        pytest.skip(str(trial.missing()))
    monkeypatch.setattr(moe, "SPIN_S", 0)
    rows = moe.measure(TINY, torch.float32, [1, 5], device, Timer(torch.device("cpu"), 2), 1)
    assert [row.tokens for row in rows] == [1, 5]
    for row in rows:
        assert set(row.seconds) == {*moe.KINDS[device], moe.LOOP, moe.COUNT}
        assert min(row.seconds.values()) > 0
    assert rows[0].read_bytes == 2 * 3 * 16 * 8 * 4  # two experts of a token
    assert moe.table(rows, device, 1e9, "").row_count == 2


@pytest.mark.parametrize("computed", [1.2, float("nan")])
def test_wrong_experts_get_no_figures(computed):
    moe.check("native", torch.tensor([1.01]), torch.ones(1))
    with pytest.raises(SystemExit, match="native experts give something else"):
        moe.check("native", torch.tensor([computed]), torch.ones(1))
