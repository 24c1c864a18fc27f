"""An engine with Triton's kernels gives the tokens that one with torch's gives; and when those kernels are refused."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys

import pytest
import torch

from tercet.core import SamplingParams
from tercet.engine import sampler
from tercet.errors import UnsupportedSpec
from tercet.kernels import kinds
from tercet.kernels.kinds import Kernels, choose_kernels
from tercet.kernels.linear import PackedLinear
from tercet.kernels.packing import LinearPacker, activation_dtype
from tercet.kernels.triton import trial
from tercet.models.sources import load_model
from tercet.spec import ModelSpec
from tests.engines import Running
from tests.machine import ROOT
from tests.tiny import VOCAB, tiny_model
from tests.triton_interpreter import DEVICE

pytest.importorskip("triton")

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
rng = random.Random(8)
PROMPTS = [[rng.randrange(VOCAB) for _ in range(n)] for n in (1, 15, 16, 17, 33, 50)]
GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=4, temperature=0.8, top_p=0.9, seed=3, frequency_penalty=0.3, ignore_eos=True)


@pytest.fixture
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def tokens_of(kind):
    """Prompts are computed in chunks of a few tokens, beside the decodes of those before."""
    spec = ModelSpec(source=tiny_model(), dtype="float32")
    running = Running(load_model(spec, Kernels(kind, DEVICE)), budget=24, blocks=160, max_running=4, prefix=True)
    added = [running.add(n, prompt, DRAWN if n % 3 == 2 else GREEDY) for n, prompt in enumerate(PROMPTS)]
    done = dict(running.done.get(timeout=60) for _ in PROMPTS)
    running.stop()
    return [done[sequence] for sequence in added]


def test_an_engine_gives_the_same_tokens(monkeypatch):
    expected = tokens_of("torch")
    assert all(len(tokens) == 4 for tokens in expected), expected
    monkeypatch.setattr(sampler, "_draw", None)  # the host draws nothing
    assert tokens_of("triton") == expected


def test_all_kernels_agree_with_their_references():
    assert trial.missing(DEVICE) is None


def test_a_kernel_that_is_wrong_is_named(monkeypatch):
    from tercet.kernels.triton import prefill

    real = prefill.prefill_attention
    monkeypatch.setattr(prefill, "prefill_attention", lambda *args, **options: real(*args, **options) * 1.2)
    reason = trial.missing.__wrapped__(DEVICE)
    assert reason.startswith("prefill_attention (torch.float32, window None) gives wrong values on this device")


def test_a_kernel_that_does_not_compile_is_named(monkeypatch):
    from tercet.kernels.triton import rms_norm

    def fail(*_):
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(rms_norm, "rms_norm", fail)
    assert trial.missing.__wrapped__(DEVICE) == "they cannot be run here: RuntimeError: no C compiler"


def test_without_triton_the_reason_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "tercet.kernels.triton.activation", None)
    assert trial.missing.__wrapped__(DEVICE).startswith("Triton cannot be imported: ")


def test_auto_on_a_gpu(monkeypatch, no_interpreter, caplog):
    """Triton's kernels if their trial goes well, or torch's, and the log says why."""
    monkeypatch.setattr(kinds.triton_trial, "missing", lambda device: None)
    assert choose_kernels("auto", CUDA) == Kernels("triton", CUDA)
    assert choose_kernels("triton", CUDA) == Kernels("triton", CUDA)
    assert str(Kernels("triton", CUDA)) == "triton (cuda)"
    assert choose_kernels("torch", CUDA) == Kernels("torch", CUDA)
    assert choose_kernels("auto", CPU).kind != "triton"
    monkeypatch.setattr(kinds.triton_trial, "missing", lambda device: f"not on {device}")
    with caplog.at_level(logging.WARNING):
        assert choose_kernels("auto", CUDA) == Kernels("torch", CUDA)
    assert "no triton kernels, torch's are used, which are slower: not on cuda:0" in caplog.text
    with pytest.raises(UnsupportedSpec, match="kernels: triton: not on cuda:0"):
        choose_kernels("triton", CUDA)


def test_on_a_cpu_they_are_refused(no_interpreter):
    with pytest.raises(UnsupportedSpec, match="kernels: triton: they are for GPUs, and this worker computes on cpu"):
        choose_kernels("triton", CPU)
    with pytest.raises(UnsupportedSpec, match="kernels: native: they are for CPUs, and this worker computes on cuda"):
        choose_kernels("native", CUDA)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="nothing is interpreted here")
def test_on_a_cpu_they_are_interpreted_if_that_is_asked_for():
    assert choose_kernels("triton", CPU) == Kernels("triton", CPU)
    assert choose_kernels("auto", CPU).kind != "triton"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_and_products_keep_the_weights_dtype(dtype):
    kernels = Kernels("triton", DEVICE)
    assert activation_dtype(dtype, kernels) == dtype
    linear = LinearPacker(dtype, 8, kernels).pack(torch.ones(4, 8, dtype=dtype), torch.ones(4, dtype=dtype))
    assert type(linear) is PackedLinear
    assert linear.linear(torch.ones(1, 8, dtype=dtype)).dtype == dtype


def test_other_kernels_do_without_triton():
    """A CPU's worker where it cannot be imported, up to its tokens."""
    script = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import tercet.roles.worker\n"
        "from tercet.kernels.kinds import choose_kernels\n"
        "from tercet.models.sources import load_model\n"
        "from tercet.spec import ModelSpec\n"
        "from tests.engines import Running\n"
        "for kind in ('auto', 'torch'):\n"
        "    running = Running(load_model(ModelSpec(source=sys.argv[1], dtype='float32'), choose_kernels(kind)))\n"
        "    running.add(0, [1, 2, 3])\n"
        "    print(len(running.done.get(timeout=60)[1]))\n"
        "    running.stop()\n"
    )
    path = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, "-c", script, tiny_model()],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["2", "2"], done.stdout + done.stderr
