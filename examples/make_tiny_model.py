"""Make a tiny random model of a family, to try a cluster with in seconds: its answers mean nothing, and are the same
wherever they are computed.

    python -m examples.make_tiny_model mixtral build/tiny-mixtral [--seed 0]

It is a Hugging Face directory with config, float32 weights (a few MB) and a tokenizer whose tokens are bytes. Heads,
key-value heads and experts divide by 2 and by 4, so that ranks can share them. Takes the packages of `make setup`.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import tokenizers
import torch
import typer
from tokenizers import decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

END = "<end>"
VOCAB = 257  # the bytes, and the end
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.3,  # so that tokens vary and no two of them tie
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 8,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
}


class Family(StrEnum):
    LLAMA = "llama"
    MIXTRAL = "mixtral"
    QWEN3_MOE = "qwen3-moe"
    DEEPSEEK_V2 = "deepseek-v2"
    DEEPSEEK_V3 = "deepseek-v3"


CONFIGS: dict[Family, Callable[[], PreTrainedConfig]] = {
    Family.LLAMA: lambda: LlamaConfig(**SHAPE),
    Family.MIXTRAL: lambda: MixtralConfig(**SHAPE, num_local_experts=8),
    Family.QWEN3_MOE: lambda: Qwen3MoeConfig(**SHAPE, **EXPERTS, num_experts=8, head_dim=16, norm_topk_prob=True),
    Family.DEEPSEEK_V2: lambda: DeepseekV2Config(**SHAPE | EXPERTS | LATENT, topk_method="group_limited_greedy"),
    Family.DEEPSEEK_V3: lambda: DeepseekV3Config(**SHAPE | EXPERTS | LATENT, num_nextn_predict_layers=0),
}


def make(family: Family, directory: Path, seed: int = 0) -> PreTrainedModel:
    """-> the model that the directory now holds."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.uniform_(buffer, -0.2, 0.2)
    model.save_pretrained(directory)
    save_byte_tokenizer(directory)
    return model


def save_byte_tokenizer(directory: Path) -> None:
    """Its token n is the nth of the characters that stand for bytes; the one behind them all ends a text."""
    bytes_ = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(bytes_, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, chat_template=template).save_pretrained(directory)


def main(
    family: Annotated[Family, typer.Argument(help="of the model")],
    directory: Annotated[Path, typer.Argument(help="where it is written; made if need be")],
    seed: Annotated[int, typer.Option(help="equal seeds make equal models")] = 0,
) -> None:
    """Make a tiny random model."""
    model = make(family, directory, seed)
    print(f"{directory}: {family} of {model.num_parameters():,} weights; set model.source to it")


if __name__ == "__main__":
    typer.run(main)
