"""From patches to embeddings: one transformer for all families, of parts that differ (`config.py` says which).

N patches of all images   T their tokens   E hidden size   H heads   D head dimension   O hidden size of the text model
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tercet.kernels.linear import PackedLinear
from tercet.kernels.rope import apply_rope
from tercet.models.vision import grid as geometry
from tercet.models.vision.config import Grid, VisionConfig
from tercet.models.vision.grid import Ints

Operation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Patches:
    """Of one image, as the model's processor gives them."""

    values: Tensor  # [N, patch_values] float32, in the order of `grid.py`
    grid: Grid


@dataclass(frozen=True)
class Block:
    attention_norm: Operation
    qkv: PackedLinear  # E -> 3 E
    output: PackedLinear
    mlp_norm: Operation
    mlp: Operation


@dataclass(frozen=True)
class Merger:
    """Makes a token's embedding of merge * merge patches that follow each other."""

    norm: Operation
    joins_first: bool  # the norm is that of the joined patches
    project: Operation

    def __call__(self, x: Tensor, patches: int) -> Tensor:
        """[N, E] -> [T, O]."""
        joined = (len(x) // patches, -1)
        return self.project(self.norm(x.view(joined)) if self.joins_first else self.norm(x).view(joined))


@dataclass(frozen=True)
class TowerWeights:
    patch: PackedLinear  # patch_values -> E
    positions: Tensor | None  # [positions * positions, E]
    blocks: tuple[Block, ...]
    merger: Merger
    deepstack: tuple[Merger, ...]


@dataclass(frozen=True)
class _Layout:
    """What all blocks share."""

    cos: Tensor | None  # [N, 1, D]
    signed_sin: Tensor | None
    whole: list[Tensor]  # rows that attend to each other, [groups, patches of each]
    windows: list[Tensor]


class VisionTower:
    def __init__(self, config: VisionConfig, weights: TowerWeights, dtype: torch.dtype, device: torch.device) -> None:
        """dtype: of activations."""
        self.config = config
        self._weights, self._dtype, self._device = weights, dtype, device
        self.layers_done = 0  # so far, over all passes: it grows as long as one gets on

    @torch.inference_mode()
    def encode(self, images: Sequence[Patches]) -> list[Tensor]:
        """-> of each image, [levels, tokens, O]. Images do not see each other."""
        config, weights = self.config, self._weights
        grids = [image.grid for image in images]
        x = weights.patch.linear(torch.cat([image.values for image in images]).to(self._device, self._dtype))
        if weights.positions is not None:
            x = x + self._positions(weights.positions, grids)
        layout = self._layout(grids)
        deeper = []
        for i, block in enumerate(weights.blocks):
            windows = config.window and i not in config.full_layers
            x = x + self._attend(block, x, layout, layout.windows if windows else layout.whole)
            x = x + block.mlp(block.mlp_norm(x))
            self.layers_done += 1
            deeper += [
                merger(x, config.merge**2)
                for at, merger in zip(config.deepstack_layers, weights.deepstack, strict=True)
                if at == i
            ]
        levels = torch.stack([weights.merger(x, config.merge**2), *deeper])
        return list(torch.split(levels, [config.tokens(grid) for grid in grids], 1))

    def _positions(self, table: Tensor, grids: Sequence[Grid]) -> Tensor:
        """-> [N, E]."""
        merge, side = self.config.merge, self.config.positions
        if self.config.family == "idefics3":
            nearest = [geometry.nearest_positions(grid, merge, side) for grid in grids]
            return table[self._sent(torch.cat([torch.from_numpy(each) for each in nearest]))]
        found = [geometry.interpolated_positions(grid, merge, side) for grid in grids]
        taps, weights = (torch.cat([torch.from_numpy(each[i]) for each in found]) for i in (0, 1))
        return (table[self._sent(taps)] * self._sent(weights).unsqueeze(-1)).sum(1).to(self._dtype)

    def _layout(self, grids: Sequence[Grid]) -> _Layout:
        config = self.config
        side = config.window // config.patch_size // config.merge * config.merge
        whole = self._groups([geometry.tile_of(grid) for grid in grids])
        windows = (
            self._groups([geometry.window_of(grid, config.merge, side) for grid in grids]) if config.window else []
        )
        if config.rope_theta is None:
            return _Layout(None, None, whole, windows)
        at = torch.cat([torch.from_numpy(geometry.coordinates(grid, config.merge)) for grid in grids], 1).float()
        spatial = config.hidden_size // config.num_heads // 2
        frequencies = 1.0 / config.rope_theta ** (torch.arange(0, spatial, 2, dtype=torch.float32) / spatial)
        angles = (at.unsqueeze(-1) * frequencies).movedim(0, 1).flatten(1)  # rows, then columns
        cos, sin = torch.cat((angles.cos(),) * 2, -1), torch.cat((-angles.sin(), angles.sin()), -1)
        return _Layout(self._sent(cos.unsqueeze(1)), self._sent(sin.unsqueeze(1)), whole, windows)

    def _groups(self, labels: Sequence[Ints]) -> list[Tensor]:
        """Of labels that each image has for its own."""
        shifted, first = [], 0
        for each in labels:
            shifted.append(torch.from_numpy(each + first))
            first += int(each.max()) + 1
        return [self._sent(torch.from_numpy(group)) for group in geometry.groups(torch.cat(shifted).numpy())]

    def _attend(self, block: Block, x: Tensor, layout: _Layout, groups: Sequence[Tensor]) -> Tensor:
        """[N, E] -> [N, E]."""
        qkv = block.qkv.linear(block.attention_norm(x)).view(len(x), 3, self.config.num_heads, -1)
        query, key, value = qkv.unbind(1)
        if layout.cos is not None and layout.signed_sin is not None:
            for rotary in (query, key):
                apply_rope(
                    rotary.float(), layout.cos, layout.signed_sin, out=(turned := torch.empty_like(rotary.float()))
                )
                rotary.copy_(turned)
        attended = torch.empty_like(query)
        for rows in groups:
            q, k, v = (each[rows].transpose(1, 2) for each in (query, key, value))
            attended[rows] = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return block.output.linear(attended.flatten(1))

    def _sent(self, values: Tensor) -> Tensor:
        return values.to(self._device)
