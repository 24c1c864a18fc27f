"""What a vision tower is, as numbers. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Family = Literal["qwen2_5_vl", "qwen3_vl", "idefics3"]
Activation = Literal["silu", "gelu", "gelu_tanh"]
Grid = tuple[int, int, int]
"""Tiles of an image, rows and columns of patches of each."""


@dataclass(frozen=True)
class VisionConfig:
    """A transformer over patches, of which each square of `merge` x `merge` becomes one token of the text model.

    qwen2_5_vl  Qwen2.5-VL (arXiv:2502.13923): attention in windows but for some layers, RMSNorm, SwiGLU, axial RoPE
    qwen3_vl    Qwen3-VL (arXiv:2511.21631): learned positions, interpolated, and axial RoPE; DeepStack
                (arXiv:2406.04334)
    idefics3    Idefics3 (arXiv:2408.12637) and SmolVLM: SigLIP over tiles of one size, pixel shuffle, one projection
    """

    family: Family
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    patch: tuple[int, ...]  # channels, frames if there are several, rows and columns of pixels
    merge: int  # patches of a side
    out_size: int  # hidden size of the text model
    activation: Activation
    image_token: int  # id of the token in whose place an embedding stands
    norm_eps: float = 1e-6
    rope_theta: float | None = None  # of axial RoPE
    framed: bool = True  # Idefics3: marks of its own stand around the tokens of an image, and of each of its tiles
    positions: int = 0  # side of the square of learned positions; 0: none
    window: int = 0  # pixels of a side; 0: no windows
    full_layers: tuple[int, ...] = ()  # that attend to the whole tile where others attend to a window
    deepstack_layers: tuple[int, ...] = ()  # their outputs become what is added behind the first text layers

    @property
    def patch_size(self) -> int:
        """Pixels of a side."""
        return self.patch[-1]

    @property
    def patch_values(self) -> int:
        return math.prod(self.patch)

    @property
    def weights(self) -> int:
        """How many there are."""
        hidden, middle, joined = self.hidden_size, self.intermediate_size, self.hidden_size * self.merge**2
        older = self.family == "qwen2_5_vl"  # RMSNorm and SwiGLU; others have LayerNorm and a plain MLP
        norm = 1 if older else 2  # of each value
        mlp = (3 * hidden + 2) * middle + hidden if older else (2 * hidden + 1) * middle + hidden
        block = 4 * (hidden + 1) * hidden + mlp + 2 * norm * hidden
        patch = (self.patch_values + (not older) + self.positions**2 + norm) * hidden  # the merger's norm, too
        if self.family == "idefics3":
            return patch + self.num_layers * block + joined * self.out_size
        merger = (joined + 1) * (joined + self.out_size)
        return patch + self.num_layers * block + merger + len(self.deepstack_layers) * (merger + norm * joined)

    @property
    def levels(self) -> int:
        """Embeddings of a token: the one in its place, and one for each of the first text layers."""
        return 1 + len(self.deepstack_layers)

    def tokens(self, grid: Grid) -> int:
        """That an image takes in the prompt."""
        tiles, rows, columns = grid
        return tiles * (rows // self.merge) * (columns // self.merge)
