"""A random Llama so small that thousands of requests take seconds; its directory is made once a test run."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from examples.make_tiny_model import END, VOCAB, save_byte_tokenizer

__all__ = ["CONTEXT", "END", "VOCAB", "save_tiny_model", "tiny_model"]
CONTEXT = 2048


@functools.cache
def tiny_model() -> str:
    """-> a Hugging Face directory with config, weights and a tokenizer whose tokens are bytes."""
    directory = Path(tempfile.mkdtemp(prefix="tercet-tiny-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    save_tiny_model(directory)
    return str(directory)


def save_tiny_model(directory: Path, seed: int = 11, **changes: int) -> None:
    """changes: of its config."""
    torch.manual_seed(seed)
    config = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": None,
        "eos_token_id": None,
        "initializer_range": 0.3,  # so that tokens vary and no two of them tie
    }
    LlamaForCausalLM(LlamaConfig(**(config | changes))).save_pretrained(directory)
    save_byte_tokenizer(directory)
