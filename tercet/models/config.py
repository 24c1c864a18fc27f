"""What a model is, as numbers: one frozen config for the whole Llama family. Imports no torch.

`config_hf.py` and `config_gguf.py` fill it from files and refuse by name what it cannot say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tercet.models.vision.config import VisionConfig

RopeKind = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (arXiv:2104.09864) and how it is stretched to a longer context."""

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0  # linear, llama3, yarn: how many times the context was stretched
    original_context: int = 0  # llama3, yarn: tokens of the context before it was stretched
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn (arXiv:2309.00071): rotations above which a dimension stays as it was
    beta_slow: float = 1.0  # yarn: rotations below which a dimension is interpolated in full
    truncate: bool = True  # yarn: whole dimensions as the ends of the ramp
    attention_factor: float = 1.0  # yarn: multiplies cos and sin
    sections: tuple[int, ...] = ()  # M-RoPE: pairs of a head that turn by time, by row, by column
    interleaved: bool = False  # M-RoPE: pairs by turns, as long as there are any, and not one section behind the other
    freq_factors: tuple[float, ...] = ()  # GGUF `rope_freqs.weight`: divides each frequency; empty is all ones


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama family: RMSNorm, rotary grouped-query attention, SwiGLU."""

    architecture: str  # llama | mistral | qwen2 | qwen3
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int  # tokens; the smaller of the model's own and the spec's
    rms_norm_eps: float
    rope: RopeConfig
    sliding_windows: tuple[int | None, ...]  # of each layer; w: a token sees itself and the w - 1 before it
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm of every query and key head before RoPE
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    vision: VisionConfig | None = None  # of a model that sees
