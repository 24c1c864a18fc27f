"""What a model is, as numbers: one frozen config for all families. Imports no torch.

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
class MixtureConfig:
    """The layers whose MLP is a mixture of experts, and how a token gets its experts (kernels/moe.py: Routing)."""

    layers: tuple[int, ...]
    experts: int
    top_k: int
    intermediate_size: int  # of one expert
    shared_size: int = 0  # intermediate size of the shared experts together; 0: there are none
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = False
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    choice_bias: bool = False  # added to the scores for the choice alone


@dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): a token's keys and values of all heads
    are made of one latent vector, beside one rotary key that all heads share. Both are what the cache holds."""

    rank: int  # of the latent
    query_rank: int | None  # of what queries are made of; None: the hidden state itself
    plain_dim: int  # of a query or key head, without rotation
    rotary_dim: int  # of a query or key head, rotated
    value_dim: int
    softmax_scale: float
    interleaved: bool = True  # pairs of the rotary part are neighbours, not the two halves


@dataclass(frozen=True)
class ModelConfig:
    """A decoder: RMSNorm, rotary attention, SwiGLU. Attention is grouped-query, or latent; MLPs are dense, or mixtures
    of experts."""

    architecture: str  # a key of config_hf.ARCHITECTURES
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int  # that the cache holds; latent attention: 1
    head_dim: int  # of what the cache holds; latent attention: latent and rotary key
    max_context: int  # tokens; the smaller of the model's own and the spec's
    rms_norm_eps: float
    rope: RopeConfig
    sliding_windows: tuple[int | None, ...]  # of each layer; w: a token sees itself and the w - 1 before it
    qkv_bias: bool = False  # latent attention: of the projections to lower ranks
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm of every query and key head before RoPE
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    vision: VisionConfig | None = None  # of a model that sees
    mixture: MixtureConfig | None = None
    latent: LatentConfig | None = None
    unused_layers: int = 0  # that files have behind the last one: they predict further tokens (MTP), and are not run

    @property
    def kv_parts(self) -> int:
        """Keys and values, or the latent alone."""
        return 2 if self.latent is None else 1

    @property
    def rotary_dim(self) -> int:
        """Of a query head, what is rotated."""
        return self.head_dim if self.latent is None else self.latent.rotary_dim
