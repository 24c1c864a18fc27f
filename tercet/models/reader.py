"""Reads weights one by one: each is checked, cast, digested and packed before the next.

At its peak the process holds the packed model and one float32 matrix, or the experts of one layer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import asdict

import torch
import xxhash
from torch import Tensor

from tercet.errors import ModelFileCorrupt, UnsupportedModel
from tercet.kernels.kinds import Kernels
from tercet.kernels.linear import PackedLinear
from tercet.kernels.moe import Experts, pack_experts
from tercet.kernels.native.linear import Quantised, QuantisedLinear
from tercet.kernels.norm import RmsNorm
from tercet.kernels.packing import LinearPacker, activation_dtype
from tercet.models.config import ModelConfig
from tercet.models.vision.config import VisionConfig
from tercet.models.weights import WeightSource


class WeightReader:
    """Reads each weight once, in the model's dtype, and remembers what it has read."""

    def __init__(
        self,
        source: WeightSource,
        names: Collection[str],
        config: ModelConfig | VisionConfig,
        dtype: torch.dtype | None,
        kernels: Kernels,
        fan_in: int,
    ) -> None:
        """names: those that must all be read. dtype: None keeps matrices in the blocks that the file has. fan_in: the
        largest of a matrix."""
        self._source, self._unread, self._kernels = source, set(names), kernels
        self._dtype, self._in_blocks = dtype or torch.float32, dtype is None
        self.activations = activation_dtype(self._dtype, kernels)
        self.packer = LinearPacker(self._dtype, fan_in, kernels)
        self._digest = hashlib.sha256(json.dumps([asdict(config), str(dtype or "blocks")], sort_keys=True).encode())

    def weight(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """dtype: other than the model's."""
        if name not in self._unread:
            raise ModelFileCorrupt(f"{self._source.path}: has no tensor {name!r}, which its config calls for")
        weight = self._source.read(name).to(dtype or self._dtype)
        if weight.shape != shape:
            raise ModelFileCorrupt(
                f"{self._source.path}: tensor {name!r} is {[*weight.shape]}, its config says {[*shape]}"
            )
        self._unread.discard(name)
        content = xxhash.xxh3_128_digest(weight.contiguous().view(torch.uint8).numpy().data)
        self._digest.update(f"{name} {[*shape]} ".encode() + content)
        return weight.to(self._kernels.device)

    def linear(self, names: Sequence[str], outs: Sequence[int], fan_in: int, bias: bool) -> PackedLinear:
        """The matrices of `names`, stacked into one linear layer."""
        weights = [self.weight(f"{n}.weight", out, fan_in) for n, out in zip(names, outs, strict=True)]
        biases = [self.weight(f"{n}.bias", out) for n, out in zip(names, outs, strict=True)] if bias else []
        return self.packed([f"{n}.weight" for n in names], weights, torch.cat(biases) if bias else None)

    def packed(self, names: Sequence[str], weights: Sequence[Tensor], bias: Tensor | None = None) -> PackedLinear:
        """The weights of these names, stacked: as they are, or in the blocks that their file has."""
        found = [self._source.quantised(name) for name in names] if self._in_blocks else []
        blocks = [part for part in found if part is not None]
        if blocks and len(blocks) == len(names) and len({part.bits for part in blocks}) == 1:
            q, scales, leasts = (torch.cat([getattr(b, f) for b in blocks]) for f in ("q", "scales", "leasts"))
            return QuantisedLinear(Quantised(q, scales, leasts, blocks[0].bits), bias)
        return self.packer.pack(torch.cat([*weights]) if len(weights) > 1 else weights[0], bias)

    def norm(self, name: str, width: int, eps: float) -> RmsNorm:
        return RmsNorm(self.weight(f"{name}.weight", width).to(self.activations), eps)

    def empty(self, *shape: int) -> Tensor:
        """Where weights are gathered."""
        return torch.empty(shape, dtype=self._dtype, device=self._kernels.device)

    def experts(self, gate_up: Tensor, down: Tensor) -> Experts:
        """gate_up [n, 2 I, E], down [n, E, I]."""
        return pack_experts(gate_up, down, self._dtype, self._kernels)

    def has(self, name: str) -> bool:
        return name in self._unread

    def refuse_unused(self, architecture: str) -> None:
        if self._unread:
            raise UnsupportedModel(f"{self._source.path}: tensor {min(self._unread)!r} has no place in {architecture}")

    def fingerprint(self) -> str:
        """sha256 of config, dtype and every weight's bytes."""
        return self._digest.hexdigest()
