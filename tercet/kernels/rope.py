"""Rotary position embedding (arXiv:2104.09864) on the two halves of a head, as Hugging Face stores weights.

T rows   H heads   D head dimension
"""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, H, D]; cos and sin [T, D/2], of the angle of each pair (x[i], x[i + D/2])."""
    first, second = x.chunk(2, -1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class RopeTable:
    """cos and signed sin of every position, [max_context, 1, D] float32."""

    def __init__(self, inv_freq: Tensor, max_context: int, scale: float, device: torch.device) -> None:
        """inv_freq [D/2] in radians per position; `scale` multiplies cos and sin (YaRN), which are computed on the CPU:
        the same on every device."""
        angles = torch.outer(torch.arange(max_context, dtype=torch.float32), inv_freq)
        cos, sin = angles.cos() * scale, angles.sin() * scale
        self._cos = torch.cat((cos, cos), -1).unsqueeze(1).to(device)
        self._sin = torch.cat((-sin, sin), -1).unsqueeze(1).to(device)

    def halves(self) -> tuple[Tensor, Tensor]:
        """cos and sin of each pair's angle, [max_context, D/2] float32, contiguous."""
        half = self._cos.shape[-1] // 2
        return self._cos[:, 0, :half].contiguous(), self._sin[:, 0, half:].contiguous()

    def rows(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions [T] -> cos and signed sin, [T, 1, D] each: what one step needs, for all its layers."""
        return self._cos[positions].to(dtype), self._sin[positions].to(dtype)


def apply_rope(x: Tensor, cos: Tensor, signed_sin: Tensor, out: Tensor) -> None:
    """x [T, H, D], cos and signed sin as `RopeTable.rows` gives them; `out` [T, H, D] may be x."""
    torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin, out=out)
