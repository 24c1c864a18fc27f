"""The config of a model in a GGUF file. Imports no torch.

Key names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
from typing import Any

from tercet.errors import ModelFileCorrupt, UnsupportedModel
from tercet.models.config import ModelConfig, RopeConfig
from tercet.models.gguf_file import GgufFile

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # Mistral and SmolLM2 are stored as llama
ROPE_FREQS = "rope_freqs.weight"  # how GGUF stores Llama 3's stretched RoPE
ENDS = frozenset(  # tokens that end a turn or a text, whatever the file says of them
    {"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "<|end|>", "<end_of_turn>"}
    | {"<end_of_utterance>", "</s>", "<eos>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]"}
)
# Keys that change results and that only these values leave as they are.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.clamp_kqv": (0.0,),
    "attention.scale": (0.0,),
    "attention.causal": (True,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scale_linear": (0.0, 1.0),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "attention.sliding_window_pattern": (),  # which layers slide
    "nextn_predict_layers": (0,),
}


def config_from_gguf(file: GgufFile, max_context: int) -> ModelConfig:
    """Raises UnsupportedModel naming the key that cannot be run, ModelFileCorrupt for one that is missing."""
    arch = file.architecture
    experts = file.scalar(f"{arch}.expert_count", 0)
    if arch.endswith("moe") or experts:
        raise UnsupportedModel(
            f"{file.path}: architecture {arch!r} with expert_count {experts}: a mixture of experts is run from a "
            "Hugging Face directory, not from GGUF"
        )
    if arch not in ARCHITECTURES:
        raise UnsupportedModel(f"{file.path}: architecture {arch!r} is not supported; {', '.join(ARCHITECTURES)} are")
    _refuse_unsupported(file)
    heads, hidden = file.count(f"{arch}.attention.head_count"), file.count(f"{arch}.embedding_length")
    head_dim = file.count(f"{arch}.attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        value = file.scalar(f"{arch}.{key}", head_dim)
        if value != head_dim:
            raise UnsupportedModel(f"{file.path}: {arch}.{key} is {value}; only the head dimension {head_dim} is run")
    return ModelConfig(
        architecture=arch,
        vocab_size=file.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in file.tensors else 0,
        hidden_size=hidden,
        intermediate_size=file.count(f"{arch}.feed_forward_length"),
        num_layers=file.count(f"{arch}.block_count"),
        num_heads=heads,
        num_kv_heads=file.count(f"{arch}.attention.head_count_kv", heads),
        head_dim=head_dim,
        max_context=min(max_context, file.count(f"{arch}.context_length")),
        rms_norm_eps=file.number(f"{arch}.attention.layer_norm_rms_epsilon"),
        rope=_rope(file),
        sliding_windows=_windows(file),
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors,
        qk_norm=arch == "qwen3",
        tie_word_embeddings="output.weight" not in file.tensors,
        bos_token_id=file.scalar("tokenizer.ggml.bos_token_id"),
        eos_token_ids=eos_token_ids(file),
    )


def _refuse_unsupported(file: GgufFile) -> None:
    for key, allowed in NEUTRAL.items():
        name = f"{file.architecture}.{key}"
        if name in file.metadata and file.scalar(name) not in allowed:
            raise UnsupportedModel(f"{file.path}: {name} = {file.scalar(name)} is not supported")


def _windows(file: GgufFile) -> tuple[int | None, ...]:
    """Of each layer; the file may say one for all of them."""
    layers, key = file.count(f"{file.architecture}.block_count"), f"{file.architecture}.attention.sliding_window"
    value = file.metadata.get(key)
    windows = value if isinstance(value, list) else [value] * layers
    if len(windows) != layers:
        raise ModelFileCorrupt(f"{file.path}: {key} names {len(windows)} layers, there are {layers}")
    if not all(window is None or isinstance(window, int) for window in windows):
        raise ModelFileCorrupt(f"{file.path}: {key} is {value!r:.60}, no number of tokens")
    return tuple(window or None for window in windows)


def _rope(file: GgufFile) -> RopeConfig:
    prefix = f"{file.architecture}.rope."
    theta = file.number(f"{prefix}freq_base", 10000.0)
    kind = file.scalar(f"{prefix}scaling.type", "none")
    factor = file.number(f"{prefix}scaling.factor", 1.0)
    if ROPE_FREQS in file.tensors:
        if kind != "none":
            raise UnsupportedModel(
                f"{file.path}: has {ROPE_FREQS} and rope.scaling.type {kind!r}; only one is supported"
            )
        return RopeConfig(theta, freq_factors=tuple(file.read(ROPE_FREQS).tolist()))
    if kind == "none":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, "linear", factor)
    if kind == "yarn":
        return _yarn(file, theta, factor, f"{prefix}scaling.")
    raise UnsupportedModel(f"{file.path}: rope.scaling.type {kind!r} is not supported; none, linear and yarn are")


def _yarn(file: GgufFile, theta: float, factor: float, prefix: str) -> RopeConfig:
    return RopeConfig(
        theta,
        "yarn",
        factor,
        file.count(f"{prefix}original_context_length"),
        beta_fast=file.number(f"{prefix}yarn_beta_fast", 32.0),
        beta_slow=file.number(f"{prefix}yarn_beta_slow", 1.0),
        attention_factor=0.1 * math.log(factor) + 1.0,
    )


def eos_token_ids(file: GgufFile) -> tuple[int, ...]:
    """What ends an answer: by key, and by the text of the token, as in llama.cpp, since many files lack the key."""
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    named = [file.metadata[key] for key in keys if key in file.metadata]
    ids = [i for value in named for i in (value if isinstance(value, list) else [value])]
    if not all(isinstance(i, int) for i in ids):
        raise ModelFileCorrupt(f"{file.path}: tokenizer.ggml names {ids!r:.60} as ends, which are no ids")
    tokens = file.array("tokenizer.ggml.tokens") if "tokenizer.ggml.tokens" in file.metadata else []
    return tuple(dict.fromkeys([*ids, *(i for i, token in enumerate(tokens) if token in ENDS)]))
