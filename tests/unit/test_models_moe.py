"""Models with mixtures of experts and latent attention, from tiny random configs, against transformers."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import save_file

from tercet.kernels.kinds import Kernels
from tercet.models.batch import PrefillChunk, StepBatch
from tercet.models.footprint import kv_bytes, weight_count
from tercet.models.sources import load_config, load_model
from tercet.spec import KvSpec, ModelSpec
from tests.unit.test_models_families import saved

BLOCK, BLOCKS, VOCAB = 8, 40, 131
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # sharp attention and routing, so that a wrong mask, angle or choice shows
    "eos_token_id": None,
}
QWEN = SMALL | {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48}
DEEPSEEK = SMALL | {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 48,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 24,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
GROUPS = {"n_group": 4, "topk_group": 2}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "mscale": 0.7,
    "mscale_all_dim": 1.3,
}
V2, V3 = transformers.DeepseekV2Config, transformers.DeepseekV3Config
FAMILIES = {
    "mixtral": transformers.MixtralConfig(**SMALL, num_local_experts=6),
    "mixtral sliding, tied": transformers.MixtralConfig(
        **SMALL, num_local_experts=4, sliding_window=11, tie_word_embeddings=True, num_experts_per_tok=1
    ),
    "qwen3-moe": transformers.Qwen3MoeConfig(**QWEN, head_dim=32),
    "qwen3-moe normalised, some dense": transformers.Qwen3MoeConfig(
        **QWEN, norm_topk_prob=True, mlp_only_layers=[1], attention_bias=True
    ),
    "qwen3-moe sparse step, sliding": transformers.Qwen3MoeConfig(
        **QWEN, decoder_sparse_step=2, use_sliding_window=True, sliding_window=9
    ),
    "qwen3-moe yarn": transformers.Qwen3MoeConfig(**QWEN, rope_parameters=YARN),
    "qwen3-moe without experts": transformers.Qwen3MoeConfig(**QWEN | {"num_experts": 0}),
    "deepseek-v2": V2(**DEEPSEEK),
    "deepseek-v2 groups, scaled, biases": V2(
        **DEEPSEEK,
        **GROUPS,
        topk_method="group_limited_greedy",
        routed_scaling_factor=1.7,
        attention_bias=True,
        mlp_bias=True,
        rms_norm_eps=1e-3,
    ),
    "deepseek-v2 no query rank, yarn": V2(**DEEPSEEK | {"q_lora_rank": None}, rope_parameters=YARN),
    "deepseek-v3": V3(**DEEPSEEK, **GROUPS),
    "deepseek-v3 yarn, biases, eps": V3(
        **DEEPSEEK, **GROUPS, rope_parameters=YARN, attention_bias=True, rms_norm_eps=1e-3, norm_topk_prob=False
    ),
    "deepseek-v3 in halves, one group, no query rank": V3(
        **DEEPSEEK | {"q_lora_rank": None, "first_k_dense_replace": 0}, n_group=1, topk_group=1, rope_interleave=False
    ),
    "deepseek-v3 dense": V3(**DEEPSEEK | {"first_k_dense_replace": 3}, **GROUPS, tie_word_embeddings=True),
}
KERNELS = {"torch": Kernels(), "native": Kernels("native")}
TABLES = torch.randperm(BLOCKS - 1, generator=torch.Generator().manual_seed(4)).view(3, 13)  # of three sequences


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """-> a directory, and transformers' model of it."""
    directory = tmp_path_factory.mktemp("model")
    return directory, saved_with_bias(FAMILIES[request.param], directory)


def saved_with_bias(config, directory, seed=0):
    """With a bias of DeepSeek-V3's choice that changes it."""
    if config.model_type != "deepseek_v3":
        return saved(config, directory, seed)
    reference = saved(config, directory, seed)
    for name, buffer in reference.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.uniform_(buffer, -0.3, 0.3)
    reference.save_pretrained(directory)
    return reference


def loaded(directory, kernels="torch", dtype="float32"):
    return load_model(ModelSpec(source=str(directory), dtype=dtype), KERNELS[kernels])


def logits_of(reference, ids):
    with torch.no_grad():
        return reference(ids.unsqueeze(0)).logits[0]


def close(logits, expected):
    """To 1e-4 of their spread, which is above 1 with weights as large as these."""
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))


def batch_of(decodes, chunks, ids):
    """decodes: (sequence, context); chunks: (sequence, start, stop). All rows' logits are wanted."""
    parts = [(s, context - 1, context) for s, context in decodes] + chunks
    at = [torch.arange(start, stop) for _, start, stop in parts]
    slots = [TABLES[s][p // BLOCK] * BLOCK + p % BLOCK for (s, _, _), p in zip(parts, at, strict=True)]
    width = max((-(-context // BLOCK) for _, context in decodes), default=0)
    tables = torch.zeros(len(decodes), width, dtype=torch.int64)
    for row, (s, context) in enumerate(decodes):
        tables[row, : -(-context // BLOCK)] = TABLES[s][: -(-context // BLOCK)]
    planned, row = [], len(decodes)
    for s, start, stop in chunks:
        planned.append(PrefillChunk(row, stop - start, stop, TABLES[s][: -(-stop // BLOCK)]))
        row += stop - start
    return StepBatch(
        torch.cat([ids[s][p] for (s, _, _), p in zip(parts, at, strict=True)]),
        torch.cat(at),
        torch.cat(slots),
        len(decodes),
        tables,
        torch.tensor([context for _, context in decodes], dtype=torch.int64),
        tuple(planned),
        torch.arange(row),
        torch.tensor([*(c.start_row for c in planned), row, *(c.context for c in planned)]),
    )


def empty_cache(model):
    """What nobody has written is NaN."""
    return torch.full(model.kv_layout(BLOCKS, BLOCK).shape, float("nan"), dtype=model.dtype, device=model.device)


def fields_of(directory):
    return json.loads((directory / "config.json").read_text())


def write_fields(directory, fields):
    (directory / "config.json").write_text(json.dumps(fields))


def same_logits(directory, reference):
    ids = torch.randint(VOCAB, (3, 72))
    model = loaded(directory).model
    close(model.forward(batch_of([], [(0, 0, 20)], ids), empty_cache(model)), logits_of(reference, ids[0][:20]))


STEPS = [  # decodes, chunks; each step goes on from the cache of the ones before
    ([], [(0, 0, 19), (1, 0, 1)]),
    ([(1, 2)], [(0, 19, 35), (2, 0, 70)]),
    ([(0, 36), (1, 3), (2, 71)], []),
    ([(2, 72), (0, 37)], [(1, 3, 40)]),
    ([(1, 41)], []),
]


@pytest.mark.parametrize("kernels", KERNELS)
def test_logits(family, kernels):
    """Of chunks and decodes of three sequences at once, over one cache."""
    directory, reference = family
    model, ids = loaded(directory, kernels).model, torch.randint(VOCAB, (3, 72))
    expected = [logits_of(reference, row) for row in ids]
    assert all((each.std(-1) > 0.1).all() for each in expected)
    cache, told = empty_cache(model), []
    for decodes, chunks in STEPS:
        rows = [(s, context - 1, context) for s, context in decodes] + chunks
        wanted = torch.cat([expected[s][start:stop] for s, start, stop in rows])
        close(model.forward(batch_of(decodes, chunks, ids), cache, told.append), wanted)
    assert told == [0, 1, 2] * len(STEPS)
    assert model.layers_done == len(told)


def greedy(reference, ids):
    """All tokens with the 24 that follow, which transformers' own generation chooses."""
    mask = torch.ones_like(ids)
    return reference.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False, pad_token_id=0)[0].tolist()


@pytest.mark.parametrize("kernels", KERNELS)
def test_greedy_tokens(family, kernels):
    directory, reference = family
    model, ids = loaded(directory, kernels).model, torch.randint(VOCAB, (1, 11))
    expected = greedy(reference, ids)
    cache, said = empty_cache(model), ids[0].tolist()
    step = batch_of([], [(0, 0, len(said))], ids)
    while len(said) < len(expected):
        said.append(int(model.forward(step, cache)[-1].argmax()))
        step = batch_of([(0, len(said))], [], torch.tensor([said]))
    assert said == expected


def test_weights_and_cache_are_counted(family):
    directory, reference = family
    config, model = load_config(ModelSpec(source=str(directory))), loaded(directory).model
    parameters = {id(parameter): parameter.numel() for parameter in reference.parameters()}
    biases = sum(b.numel() for name, b in reference.named_buffers() if name.endswith("e_score_correction_bias"))
    assert weight_count(config) == sum(parameters.values()) + biases
    spec = KvSpec(blocks=BLOCKS, block_size=BLOCK)
    assert kv_bytes(config, spec, "float32") == model.kv_layout(BLOCKS, BLOCK).total_bytes


@pytest.mark.parametrize("kernels", KERNELS)
def test_bfloat16(family, kernels):
    """The tokens' logits are those of the same weights in float32, as far as bfloat16 goes. Many tokens, since the
    first ones have little context, and where rounding decides which experts they get, their logits are others."""
    directory, reference = family
    model, ids = loaded(directory, kernels, "bfloat16").model, torch.randint(VOCAB, (3, 72))
    logits = model.forward(batch_of([], [(row, 0, 72) for row in range(3)], ids), empty_cache(model))
    rounded = copy.deepcopy(reference).bfloat16().float()
    expected = torch.cat([logits_of(rounded, row) for row in ids])
    assert torch.nn.functional.cosine_similarity(logits, expected).median() > 0.98
    assert logits.isfinite().all()


def test_a_step_that_wants_no_logits(family):
    directory, _ = family
    model, ids = loaded(directory).model, torch.zeros(3, 72, dtype=torch.int64)
    batch = batch_of([], [(0, 0, 5)], ids)
    none = StepBatch(*[getattr(batch, n) for n in list(batch.__dataclass_fields__)[:7]], torch.arange(0))
    assert model.forward(none, empty_cache(model)).shape == (0, VOCAB)


def test_all_experts_in_one_tensor(family, tmp_path):
    """As transformers has them in memory."""
    directory, reference = family
    write_fields(tmp_path, fields_of(directory))
    weights = {name: weight.clone() for name, weight in reference.state_dict().items()}
    fused = any(name.endswith("experts.gate_up_proj") for name in weights)
    assert fused == (load_config(ModelSpec(source=str(tmp_path))).mixture is not None)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    same_logits(tmp_path, reference)


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_step_of_no_rows(family, kernels):
    """As a rank has that has nothing to do while others of its group do."""
    directory, _ = family
    model, none = loaded(directory, kernels).model, torch.zeros(0, dtype=torch.int64)
    batch, told = StepBatch(none, none, none, 0, none.view(0, 0), none, (), none), []
    assert model.forward(batch, empty_cache(model), told.append).shape == (0, VOCAB)
    assert told == [0, 1, 2]
