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

from tercet.core import Loading
from tercet.errors import ModelFileCorrupt, UnsupportedModel
from tercet.kernels.kinds import Kernels
from tercet.kernels.linear import PackedLinear
from tercet.kernels.moe import Experts, pack_experts
from tercet.kernels.native.linear import BLOCK, Quantised, QuantisedLinear, stacked
from tercet.kernels.norm import RmsNorm
from tercet.kernels.packing import LinearPacker, activation_dtype
from tercet.models.config import ModelConfig
from tercet.models.progress import Hear
from tercet.models.vision.config import VisionConfig
from tercet.models.weights import WeightSource

EXACT = ".e_score_correction_bias"  # ends the names of what is float32 whatever the model's dtype


class WeightReader:
    """Reads each weight once, in the model's dtype, and remembers what it has read.

    A rank of a group reads all of them, so that all ranks of all groups of a model have one fingerprint, and keeps its
    share."""

    def __init__(
        self,
        source: WeightSource,
        names: Collection[str],
        config: ModelConfig | VisionConfig,
        dtype: torch.dtype | None,
        kernels: Kernels,
        fan_in: int,
        hear: Hear,
    ) -> None:
        """names: those that must all be read. dtype: None keeps matrices in the blocks that the file has. fan_in: the
        largest of a matrix. hear: is told of each tensor."""
        self._source, self._unread, self._kernels = source, set(names), kernels
        self._hear, self._total = hear, len(names)
        self._dtype, self._in_blocks = dtype or torch.float32, dtype is None
        self.activations = activation_dtype(self._dtype, kernels)
        self.packer = LinearPacker(self._dtype, fan_in, kernels)
        self._digest = hashlib.sha256(json.dumps([asdict(config), str(dtype or "blocks")], sort_keys=True).encode())
        self._contents: dict[str, bytes] = {}  # name -> digest of what was read

    def weight(self, name: str, *shape: int) -> Tensor:
        if name not in self._unread:
            raise ModelFileCorrupt(f"{self._source.path}: has no tensor {name!r}, which its config calls for")
        weight = self._read(name)
        if weight.shape != shape:
            raise ModelFileCorrupt(
                f"{self._source.path}: tensor {name!r} is {[*weight.shape]}, its config says {[*shape]}"
            )
        return weight.to(self._kernels.device)

    def _read(self, name: str) -> Tensor:
        weight = self._source.read(name).to(torch.float32 if name.endswith(EXACT) else self._dtype)
        self._unread.discard(name)
        content = xxhash.xxh3_128_digest(weight.contiguous().view(torch.uint8).numpy().data)
        self._contents[name] = f"{name} {[*weight.shape]} ".encode() + content
        self._hear(Loading("tensors read", len(self._contents), self._total))
        return weight

    def skim(self, prefix: str) -> None:
        """Read what begins so and belongs to other ranks, which check its shapes."""
        for name in [name for name in self._unread if name.startswith(prefix)]:
            self._read(name)

    def linear(
        self, names: Sequence[str], outs: Sequence[int], fan_in: int, bias: bool, rows: Sequence[range] = ()
    ) -> PackedLinear:
        """The matrices of `names`, stacked into one linear layer. rows: those of each that are kept; none: all."""
        kept = rows or [range(out) for out in outs]
        weights = [self.weight(f"{n}.weight", out, fan_in) for n, out in zip(names, outs, strict=True)]
        biases = [self.weight(f"{n}.bias", out) for n, out in zip(names, outs, strict=True)] if bias else []
        added = torch.cat([of[r.start : r.stop] for of, r in zip(biases, kept, strict=True)]) if bias else None
        return self.packed([f"{n}.weight" for n in names], weights, added, rows)

    def row_parallel(
        self, name: str, out: int, fan_in: int, bias: bool, columns: range, *, adds_bias: bool
    ) -> PackedLinear:
        """The columns of a matrix that are here. adds_bias: here, and at no other rank."""
        weight = self.weight(f"{name}.weight", out, fan_in)
        added = self.weight(f"{name}.bias", out) if bias else None
        return self.packed([f"{name}.weight"], [weight], added if adds_bias else None, columns=columns)

    def packed(
        self,
        names: Sequence[str],
        weights: Sequence[Tensor],
        bias: Tensor | None = None,
        rows: Sequence[range] = (),
        columns: range | None = None,
    ) -> PackedLinear:
        """The weights of these names, stacked: as they are, or in the blocks that their file has. rows: those of each
        that are kept, columns: of all; none: all."""
        blocks = self._blocks(names, rows, columns)
        if blocks is not None:
            return QuantisedLinear(blocks, bias)
        if rows:
            weights = [weight[r.start : r.stop] for weight, r in zip(weights, rows, strict=True)]
        if columns is not None:
            weights = [weight[:, columns.start : columns.stop] for weight in weights]
        return self.packer.pack(torch.cat([*weights]) if len(weights) > 1 else weights[0], bias)

    def _blocks(self, names: Sequence[str], rows: Sequence[range], columns: range | None) -> Quantised | None:
        """The matrices in the blocks of their file, if all of them are kept in it in blocks of as many bits."""
        found = [self._source.quantised(name) for name in names] if self._in_blocks else []
        parts = [part for part in found if part is not None]
        if not parts or len(parts) < len(names) or len({part.bits for part in parts}) > 1:
            return None
        if columns is not None and (columns.start % BLOCK or columns.stop % BLOCK):
            raise UnsupportedModel(
                f"{self._source.path}: {names[0]}: a rank's {len(columns)} columns are no whole blocks of {BLOCK}; use "
                "another tensor degree, or model.dtype: bfloat16"
            )
        kept: Sequence[range | None] = rows or [None] * len(parts)
        return stacked([part.share(r, columns) for part, r in zip(parts, kept, strict=True)])

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
        digest = self._digest.copy()
        for name in sorted(self._contents):
            digest.update(self._contents[name])
        return digest.hexdigest()
