"""What the GPU benchmark measures computes what its rivals compute, and its formulas count what there is to count."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_sizes import CPU, GPU
from benchmarks.gpu_timing import Budget, Least, NotRun, Row, Timer, run_all
from tercet.kernels.kinds import Kernels
from tercet.transfer.transports import table
from tests.machine import ROOT
from tests.triton_interpreter import DEVICE

pytest.importorskip("triton")

from benchmarks import gpu_handover, gpu_kernels, gpu_model  # after the helper

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
CASES = {case.name: case for case in gpu_kernels.cases(CPU)}
INDEPENDENT = ("softmax, sort", "scatter")  # a rival that gives something else, one that gives nothing
RATES = {"bandwidth": 10.0, "gemm": 1000.0}


@pytest.mark.parametrize("name", CASES)
def test_rivals_compute_the_same(name):
    torch.manual_seed(1)
    works = CASES[name].make(DEVICE)
    ours = works.pop("tercet")()
    for rival, work in works.items():
        if not any(word in f"{name}: {rival}" for word in INDEPENDENT):
            torch.testing.assert_close(work(), ours, rtol=2e-4, atol=2e-4, msg=lambda text, who=rival: f"{who}: {text}")


def test_every_kernel_is_there():
    assert {name.split(",")[0] for name in CASES} == {
        "rms_norm", "add_rms_norm", "silu_and_mul", "rope_and_write", "decode_attention", "prefill_attention",
        "shared_prefix_attention", "gather", "scatter", "sample",
    }  # fmt: skip


def test_the_bytes_of_a_decode_are_those_of_its_tensors():
    batch, context = CPU.attended[0]
    pages = gpu_kernels.Pages.random(CPU, torch.device("cpu"), batch, context)
    query = torch.zeros(batch, CPU.config.num_heads, CPU.config.head_dim)
    keys, values = pages.dense()
    least = CASES[f"decode_attention, {batch} x {context}"].least
    assert least.bytes == 2 * query.nbytes + keys.nbytes + values.nbytes
    assert least.flops == 2 * 2 * sum(context * CPU.config.num_heads * CPU.config.head_dim for _ in range(batch))


@pytest.mark.parametrize(("rows", "context"), [(1, 1), (5, 5), (3, 7), (1, 9)])
def test_pairs_are_those_under_the_mask(rows, context):
    mask = torch.ones(context, context).tril()[-rows:]
    assert gpu_kernels.causal_pairs(rows, context) == int(mask.sum())


def test_a_prefix_counts_once():
    batch, prefix, own = CPU.shared
    least = CASES[f"shared_prefix_attention, {batch} x ({prefix} + {own})"].least
    apart = gpu_kernels.attention_least(CPU, batch, batch * (prefix + own), batch * (prefix + own))
    assert apart.bytes - least.bytes == (batch - 1) * gpu_kernels.kv_bytes(CPU, prefix)
    assert apart.flops == least.flops


def test_what_moves_is_read_and_written():
    blocks, half = CPU.moved, CPU.config.num_kv_heads // 2
    packed = torch.zeros(blocks, 2, 16, half, CPU.config.head_dim)
    assert CASES[f"gather, {blocks} blocks, {half} of {2 * half} heads"].least == Least(2 * packed.nbytes)


@pytest.fixture(scope="module")
def model():
    return gpu_model.random_model(CPU.config, CPU.dtype, Kernels("triton", DEVICE))


def weight_bytes(model):
    """Of all matrices that a step multiplies by."""
    layers = model._weights.layers
    halves = [(layer.attention.qkv, layer.attention.output, layer.mlp.gate_up, layer.mlp.down) for layer in layers]
    products = [product for half in halves for product in half]
    return sum(product.weight.nbytes for product in [*products, model._weights.head])


@pytest.mark.parametrize(("batch", "context"), [(1, 16), (4, 40)])
def test_a_decode_step_reads_the_weights_and_the_cache(model, batch, context):
    least = gpu_model.decode_least(CPU, batch, context)
    cache = model.kv_layout(1, 16).total_bytes / 16  # of a token
    assert least.bytes == weight_bytes(model) + batch * context * cache
    scores = 2 * 2 * CPU.config.num_layers * CPU.config.num_heads * CPU.config.head_dim * context
    assert least.flops == batch * (2 * weight_bytes(model) / 4 + scores)


def test_a_prefill_multiplies_every_row_and_the_last_by_the_head(model):
    head, tokens, config = model._weights.head.weight, 24, CPU.config
    pairs = gpu_kernels.causal_pairs(tokens, tokens)
    body = 2 * (weight_bytes(model) - head.nbytes) / 4 * tokens
    scores = 4 * pairs * config.num_layers * config.num_heads * config.head_dim
    assert gpu_model.prefill_least(CPU, tokens).flops == pytest.approx(body + scores + 2 * head.numel())


def test_the_large_model_is_llama_3_8b():
    least = gpu_model.decode_least(GPU, 1, 1024)
    assert least.bytes == 2 * (8_030_261_248 - 128256 * 4096 - 65 * 4096) + 1024 * (128 << 10)  # no embedding, no norms


def test_a_step_that_does_not_fit_is_not_run():
    case = gpu_model.StepCase("decode", None, None, None, 1, tokens=2, holds=1, least=Least())
    with pytest.raises(NotRun, match="KV of 2 tokens, and the cache was made for 1"):
        case.run(None, RATES)


class Recorded:
    """A runner's steps, in order."""

    def __init__(self):
        self.told = []
        self.runner = self  # of its model

    def launch(self, plan, before=None):
        self.told.append(("launch", plan, before))
        return self

    @property
    def tokens(self):
        return len(self.told)

    def result(self):
        self.told.append("result")


def test_a_step_is_launched_before_the_result_of_the_one_before():
    recorded = Recorded()
    case = gpu_model.StepCase("decode", recorded, "first", "later", 3, tokens=1, holds=1, least=Least(bytes=5.0))
    row = case.run(Timer(torch.device("cpu"), 1), RATES)
    once = [("launch", "first", None), ("launch", "later", 1), "result", ("launch", "later", 3), "result", "result"]
    assert recorded.told[:6] == once
    assert row.fraction == pytest.approx(0.5 / row.seconds)


def test_handed_over_are_the_keys_and_values_of_all_layers(model):
    assert gpu_handover.kv_bytes(CPU, 16) == model.kv_layout(1, 16).total_bytes


def test_every_transport_has_a_row():
    assert [case.transport for case in gpu_handover.cases(CPU, "cpu")] == [*table.ALL]


def tcp_case():
    return next(case for case in gpu_handover.cases(CPU, "cpu") if case.transport.name == "tcp")


@pytest.mark.slow  # `make gpu-check` measures so
async def test_workers_hand_over_what_is_timed(tmp_path):
    """Each request's bytes are compared with those of its prompt, on the way."""
    spec = gpu_handover.spec_of(CPU, gpu_handover.save_model(tmp_path, CPU), "cpu", "tcp")
    assert [*await gpu_handover.measured(CPU, spec)] == [*CPU.handovers]


@pytest.mark.parametrize("seconds", [0.25, -0.01])
def test_a_hand_over_counts_as_a_copy(seconds, monkeypatch):
    async def measured(sizes, spec):
        return {64: 0.1, 128: seconds}

    monkeypatch.setattr(gpu_handover, "measured", measured)
    if seconds <= 0:
        with pytest.raises(NotRun, match="lost in the noise"):
            tcp_case().run(None, RATES)
        return
    row = tcp_case().run(None, {"copy": 1e6})
    moved = gpu_handover.kv_bytes(CPU, 128 - 16)  # what one block takes is taken off
    assert row.fraction == pytest.approx(2 * moved / 1e6 / seconds)
    assert row.rivals == {"64 tokens": 0.1}


def test_the_results_name_every_row():
    text = (ROOT / "benchmarks/RESULTS.md").read_text()
    kernels = [case.name for case in gpu_kernels.cases(GPU)]
    steps = [case.name for case in gpu_model.cases(GPU, DEVICE) if case.tokens <= case.holds]
    handovers = [case.name for case in gpu_handover.cases(GPU, "gpu")]
    missing = [name for name in (*kernels, *steps, *handovers) if f"| {name} |" not in text]
    assert missing == []


def test_the_roofline_is_the_slower_of_both():
    assert Least(bytes=50.0, flops=1000.0).seconds(RATES) == 5.0
    assert Least(bytes=50.0, flops=1000.0).bound(RATES) == "bandwidth"
    assert Least(bytes=50.0, flops=9000.0).seconds(RATES) == 9.0
    assert Least(bytes=50.0, flops=9000.0).bound(RATES) == "gemm"


class Fake:
    def __init__(self, name, error=None):
        self.name, self.error = name, error

    def run(self, timer, rates):
        if self.error:
            raise self.error
        return Row(self.name, 1.0, Least(), 0.5, "bandwidth")


def test_rows_that_cannot_be_or_that_fail_are_named_and_the_others_run():
    timer = Timer(torch.device("cpu"), 1)
    cases = [Fake("a"), Fake("b", NotRun("too large")), Fake("c", RuntimeError("broken\nmore")), Fake("d")]
    results = run_all(cases, timer, RATES, Budget(60))
    assert [row.name for row in results.rows] == ["a", "d"]
    assert results.not_run == {"b": "too large"}
    assert results.failed == {"c": "RuntimeError: broken"}


def test_rows_that_come_too_late_are_named():
    results = run_all([Fake("a"), Fake("b")], Timer(torch.device("cpu"), 1), RATES, Budget(0))
    assert results.rows == []
    assert results.not_run == dict.fromkeys("ab", "the time was used up")
