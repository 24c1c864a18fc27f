"""The rotation frequencies of a config: plain, linear, llama3, YaRN, or with factors from a GGUF file."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tercet.kernels.rope import RopeTable
from tercet.models.config import ModelConfig, RopeConfig


def rope_table(config: ModelConfig, device: torch.device) -> RopeTable:
    rope = config.rope
    frequencies = inverse_frequencies(rope, config.rotary_dim)
    return RopeTable(frequencies, config.max_context, rope.attention_factor, device, _axes(rope))


def _axes(rope: RopeConfig) -> Tensor | None:
    """M-RoPE: which of time, row and column each pair turns by."""
    if not rope.sections:
        return None
    axes = torch.repeat_interleave(torch.arange(3), torch.tensor(rope.sections))
    if rope.interleaved:
        axes = torch.zeros_like(axes)
        for axis in (1, 2):
            axes[axis : 3 * rope.sections[axis] : 3] = axis
    return axes


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """[head_dim / 2] float32, radians per position."""
    plain = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.freq_factors:
        return plain / torch.tensor(rope.freq_factors)
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    if rope.kind == "yarn":
        return _yarn(rope, plain, head_dim)
    return plain


def _llama3(rope: RopeConfig, plain: Tensor) -> Tensor:
    """Llama 3.1: long wavelengths are scaled, short ones kept, others interpolated by rotations in the old context."""
    rotations = rope.original_context * plain / (2 * math.pi)
    kept = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = kept.clamp(0, 1)
    return (1 - kept) * plain / rope.factor + kept * plain


def _yarn(rope: RopeConfig, plain: Tensor, head_dim: int) -> Tensor:
    """arXiv:2309.00071, section 3.2: a linear ramp between the dimensions that turn beta_slow and beta_fast times."""

    def dimension(rotations: float) -> float:
        return head_dim * math.log(rope.original_context / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2) - low) / max(high - low, 0.001)
    stretched = ramp.clamp(0, 1)
    return stretched * plain / rope.factor + (1 - stretched) * plain
