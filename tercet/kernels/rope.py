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
    """cos and signed sin of every position, [max_context, 1, D] float32.

    A row's position is one number, or three of which each pair turns by one (M-RoPE, arXiv:2409.12191)."""

    def __init__(
        self, inv_freq: Tensor, max_context: int, scale: float, device: torch.device, axes: Tensor | None = None
    ) -> None:
        """inv_freq [D/2] in radians per position; `scale` multiplies cos and sin (YaRN), which are computed on the CPU:
        the same on every device. axes [D/2] int64: of a position of three, the one that a pair turns by."""
        angles = torch.outer(torch.arange(max_context, dtype=torch.float32), inv_freq)
        cos, sin = angles.cos() * scale, angles.sin() * scale
        self._cos = torch.cat((cos, cos), -1).unsqueeze(1).to(device)
        self._sin = torch.cat((-sin, sin), -1).unsqueeze(1).to(device)
        self._axes = None if axes is None else axes.to(device)

    @property
    def device(self) -> torch.device:
        return self._cos.device

    def halves(self) -> tuple[Tensor, Tensor]:
        """cos and sin of each pair's angle, [max_context, D/2] float32, contiguous."""
        half = self._cos.shape[-1] // 2
        return self._cos[:, 0, :half].contiguous(), self._sin[:, 0, half:].contiguous()

    def rows(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions [T] or [3, T] -> cos and signed sin, [T, 1, D] each: what one step needs, for all its layers."""
        if positions.dim() == 1:
            return self._cos[positions].to(dtype), self._sin[positions].to(dtype)
        cos, sin = self.turns(positions)
        return torch.cat((cos, cos), -1).unsqueeze(1).to(dtype), torch.cat((-sin, sin), -1).unsqueeze(1).to(dtype)

    def turns(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [T] or [3, T] -> cos and sin of each pair's angle, [T, D/2] float32, contiguous."""
        half = self._cos.shape[-1] // 2
        cos, sin = self._cos[:, 0, :half], self._sin[:, 0, half:]
        if positions.dim() == 1:
            return cos[positions], sin[positions]
        assert self._axes is not None, "positions of three numbers take M-RoPE"
        at = positions[self._axes]  # [D/2, T]
        pairs = torch.arange(half, device=at.device).unsqueeze(1)
        return cos[at, pairs].t().contiguous(), sin[at, pairs].t().contiguous()


def apply_rope(x: Tensor, cos: Tensor, signed_sin: Tensor, out: Tensor) -> None:
    """x [T, H, D], cos and signed sin as `RopeTable.rows` gives them; `out` [T, H, D] may be x."""
    torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin, out=out)
