"""What the GPU benchmark measures: on a GPU the shapes of an 8B model (Llama 3's), elsewhere as little as tries the
script out."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tercet.models.config import ModelConfig, RopeConfig

BLOCK = 16  # tokens


@dataclass(frozen=True)
class Sizes:
    config: ModelConfig
    dtype: torch.dtype
    copy_bytes: int  # of the measured copy
    side: int  # of the measured product's matrices
    rows: int  # of what is done a row at a time
    attended: tuple[tuple[int, int], ...]  # decode attention: batch, context
    prefilled: tuple[tuple[int, int], ...]  # prefill attention: rows, context
    shared: tuple[int, int, int]  # batch, tokens of the prefix, tokens of each sequence's own
    moved: int  # blocks of a gather and a scatter
    drawn: tuple[int, ...]  # rows of logits
    decodes: tuple[tuple[int, int], ...]  # whole steps: batch, context
    in_a_row: int  # decode steps that are timed together
    prefills: tuple[int, ...]  # whole steps: tokens
    kv_tokens: int  # that the model's cache holds: a decode step that needs more is not run
    handovers: tuple[int, ...]  # tokens of each prompt
    rounds: int


def llama(layers: int, hidden: int, middle: int, heads: int, kv_heads: int, vocab: int, context: int) -> ModelConfig:
    return ModelConfig(
        architecture="llama",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=middle,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        max_context=context,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=500000.0),
        sliding_windows=(None,) * layers,
    )


GPU = Sizes(
    config=llama(32, 4096, 14336, 32, 8, 128256, 32768),
    dtype=torch.bfloat16,
    copy_bytes=2 << 30,
    side=8192,
    rows=8192,
    attended=((1, 32768), (8, 8192), (64, 4096), (256, 1024)),
    prefilled=((2048, 2048), (8192, 8192), (512, 8704)),
    shared=(64, 8192, 512),
    moved=4096,
    drawn=(1, 64),
    decodes=tuple((batch, context) for batch in (1, 8, 64, 256) for context in (1024, 4096, 8192, 32768)),
    in_a_row=8,
    prefills=(512, 2048, 8192),
    kv_tokens=1 << 18,  # 32 GiB
    handovers=(2048, 8192),
    rounds=7,
)
CPU = Sizes(
    config=llama(2, 128, 192, 4, 2, 300, 128),
    dtype=torch.float32,  # the interpreter rounds bfloat16 towards zero
    copy_bytes=1 << 20,
    side=64,
    rows=5,
    attended=((2, 40),),
    prefilled=((24, 24), (8, 40)),
    shared=(3, 32, 9),
    moved=3,
    drawn=(2,),
    decodes=((1, 16), (4, 40), (64, 128)),
    in_a_row=2,
    prefills=(24,),
    kv_tokens=256,
    handovers=(128,),
    rounds=1,
)
SIZES = {"gpu": GPU, "cpu": CPU}
