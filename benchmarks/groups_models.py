"""Models with random weights for measuring groups of ranks: about as large as SmolLM2-135M, and divisible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3MoeConfig

from examples.make_tiny_model import save_byte_tokenizer

SHAPE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
}
EXPERTS: dict[str, Any] = {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 256}


def llama() -> PreTrainedConfig:
    """119 million weights."""
    return LlamaConfig(**SHAPE, vocab_size=49152, num_hidden_layers=30)


def qwen3_moe() -> PreTrainedConfig:
    """85 million weights, 75 of them experts'."""
    return Qwen3MoeConfig(**SHAPE, **EXPERTS, vocab_size=8192, num_hidden_layers=6, norm_topk_prob=True)


def save(config: PreTrainedConfig, directory: Path) -> None:
    """In bfloat16."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(directory)
    save_byte_tokenizer(directory)
