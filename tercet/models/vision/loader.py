"""From weights on disk to a `VisionTower`, tensor by tensor as the text model's (`models/reader.py`)."""

from __future__ import annotations

import hashlib

import torch
import xxhash
from torch.nn import functional

from tercet.kernels.activation import silu_and_mul
from tercet.kernels.kinds import Kernels
from tercet.kernels.linear import PackedLinear
from tercet.kernels.norm import RmsNorm
from tercet.models.progress import Hear
from tercet.models.reader import WeightReader
from tercet.models.vision.config import Activation, VisionConfig
from tercet.models.vision.tower import Block, Merger, Operation, TowerWeights, VisionTower
from tercet.models.weights import VISION, WeightSource

ACTIVATE: dict[Activation, Operation] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


def build_tower(
    config: VisionConfig, source: WeightSource, dtype: torch.dtype, kernels: Kernels, hear: Hear
) -> VisionTower:
    """Raises as `loader.build_model` does."""
    fan_in = max(config.patch_values, config.intermediate_size, config.hidden_size * config.merge**2)
    names = {name for name in source.names() if name.startswith(VISION)}
    reader = WeightReader(source, names, config, dtype, kernels, fan_in, hear)
    build = _Builder(config, reader)
    with torch.inference_mode():
        weights = build.idefics3() if config.family == "idefics3" else build.qwen()
    reader.refuse_unused(config.family)
    return VisionTower(config, weights, reader.activations, kernels.device)


def tower_digest(source: WeightSource) -> str:
    """sha256 of every weight's name and bytes, as they are in the files: of workers that have the tower, and of those
    that take what it makes."""
    digest = hashlib.sha256()
    for name in sorted(name for name in source.names() if name.startswith(VISION)):
        weight = source.read(name).contiguous().view(torch.uint8).numpy()
        digest.update(f"{name} {weight.size} ".encode() + xxhash.xxh3_128_digest(weight.data))
    return digest.hexdigest()


class _Builder:
    def __init__(self, config: VisionConfig, reader: WeightReader) -> None:
        self._config, self._reader, self._dtype = config, reader, reader.activations

    def qwen(self) -> TowerWeights:
        config, reader = self._config, self._reader
        newer = config.family == "qwen3_vl"
        positions = None
        if newer:
            positions = reader.weight(f"{VISION}pos_embed.weight", config.positions**2, config.hidden_size).float()
        deeper = [f"{VISION}deepstack_merger_list.{i}." for i in range(len(config.deepstack_layers))]
        return TowerWeights(
            self._patch(f"{VISION}patch_embed.proj", biased=newer),
            positions,
            tuple(self._qwen_block(f"{VISION}blocks.{i}.", newer) for i in range(config.num_layers)),
            self._qwen_merger(f"{VISION}merger.", newer, joins_first=False),
            tuple(self._qwen_merger(at, newer, joins_first=True) for at in deeper),
        )

    def _qwen_block(self, at: str, newer: bool) -> Block:
        hidden, norm = self._config.hidden_size, self._layer_norm if newer else self._rms_norm
        return Block(
            norm(f"{at}norm1", hidden),
            self._reader.linear([f"{at}attn.qkv"], [3 * hidden], hidden, True),
            self._reader.linear([f"{at}attn.proj"], [hidden], hidden, True),
            norm(f"{at}norm2", hidden),
            self._mlp(f"{at}mlp.linear_fc1", f"{at}mlp.linear_fc2") if newer else self._gated_mlp(f"{at}mlp."),
        )

    def _qwen_merger(self, at: str, newer: bool, joins_first: bool) -> Merger:
        config, joined = self._config, self._config.hidden_size * self._config.merge**2
        names = [f"{at}linear_fc1", f"{at}linear_fc2"] if newer else [f"{at}mlp.0", f"{at}mlp.2"]
        first = self._reader.linear(names[:1], [joined], joined, True)
        second = self._reader.linear(names[1:], [config.out_size], joined, True)
        width = joined if joins_first else config.hidden_size
        norm = self._layer_norm(f"{at}norm", width) if newer else self._rms_norm(f"{at}ln_q", width)
        return Merger(norm, joins_first, lambda x: second.linear(functional.gelu(first.linear(x))))

    def idefics3(self) -> TowerWeights:
        config, reader = self._config, self._reader
        hidden, joined = config.hidden_size, config.hidden_size * config.merge**2
        patch = self._patch(f"{VISION}embeddings.patch_embedding", biased=True)
        positions = reader.weight(f"{VISION}embeddings.position_embedding.weight", config.positions**2, hidden)
        blocks = tuple(self._idefics3_block(f"{VISION}encoder.layers.{i}.") for i in range(config.num_layers))
        projection = reader.linear([f"{VISION}connector.modality_projection.proj"], [config.out_size], joined, False)
        merger = Merger(self._layer_norm(f"{VISION}post_layernorm", hidden), False, projection.linear)
        return TowerWeights(patch, positions.to(self._dtype), blocks, merger, ())

    def _idefics3_block(self, at: str) -> Block:
        hidden = self._config.hidden_size
        projections = [f"{at}self_attn.{name}_proj" for name in "qkv"]
        return Block(
            self._layer_norm(f"{at}layer_norm1", hidden),
            self._reader.linear(projections, [hidden] * 3, hidden, True),
            self._reader.linear([f"{at}self_attn.out_proj"], [hidden], hidden, True),
            self._layer_norm(f"{at}layer_norm2", hidden),
            self._mlp(f"{at}mlp.fc1", f"{at}mlp.fc2"),
        )

    def _patch(self, name: str, biased: bool) -> PackedLinear:
        """A convolution whose steps are as long as its kernel is a product with each patch's values."""
        hidden = self._config.hidden_size
        kernel = self._reader.weight(f"{name}.weight", hidden, *self._config.patch)
        bias = self._reader.weight(f"{name}.bias", hidden) if biased else None
        return self._reader.packed([f"{name}.weight"], [kernel.flatten(1)], bias)

    def _mlp(self, first: str, second: str) -> Operation:
        config, activate = self._config, ACTIVATE[self._config.activation]
        up = self._reader.linear([first], [config.intermediate_size], config.hidden_size, True)
        down = self._reader.linear([second], [config.hidden_size], config.intermediate_size, True)
        return lambda x: down.linear(activate(up.linear(x)))

    def _gated_mlp(self, at: str) -> Operation:
        config, outs = self._config, [self._config.intermediate_size] * 2
        both = self._reader.linear([f"{at}gate_proj", f"{at}up_proj"], outs, config.hidden_size, True)
        down = self._reader.linear([f"{at}down_proj"], [config.hidden_size], config.intermediate_size, True)
        return lambda x: down.linear(silu_and_mul(both.linear(x)))

    def _rms_norm(self, name: str, width: int) -> Operation:
        return RmsNorm(self._reader.weight(f"{name}.weight", width).to(self._dtype), self._config.norm_eps)

    def _layer_norm(self, name: str, width: int) -> Operation:
        weight, bias = (self._reader.weight(f"{name}.{kind}", width).to(self._dtype) for kind in ("weight", "bias"))
        return lambda x: functional.layer_norm(x, (width,), weight, bias, self._config.norm_eps)
