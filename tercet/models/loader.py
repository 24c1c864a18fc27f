"""From weights on disk to a `Transformer`: each tensor is read, checked, cast, digested and packed before the next.

At its peak the process holds the packed model and one float32 matrix. Called by `sources.load_model`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import xxhash
from torch import Tensor

from tercet.errors import ModelFileCorrupt, UnsupportedModel
from tercet.kernels.kinds import Kernels
from tercet.kernels.linear import PackedLinear
from tercet.kernels.native.linear import Quantised, QuantisedLinear
from tercet.kernels.norm import RmsNorm
from tercet.kernels.packing import LinearPacker, activation_dtype
from tercet.models.config import ModelConfig
from tercet.models.layers import Layer
from tercet.models.transformer import Transformer, Weights
from tercet.models.weights import WeightSource


@dataclass(frozen=True)
class LoadedModel:
    model: Transformer
    config: ModelConfig
    fingerprint: str  # sha256 of config, dtype and every weight's bytes: equal models are interchangeable


def build_model(config: ModelConfig, source: WeightSource, dtype: torch.dtype | None, kernels: Kernels) -> LoadedModel:
    """dtype: of weights and KV cache. None: matrices stay in the blocks that the file has, which takes native kernels;
    what is in no such blocks is float32, and the cache bfloat16.

    Raises ModelFileCorrupt for a tensor that is missing or has another shape than the config says, UnsupportedModel
    for one that the config has no place for."""
    _check_heads(source, config)
    reader = _WeightReader(source, config, dtype, kernels)
    with torch.inference_mode():
        weights = _weights(reader, config)
    reader.refuse_unused()
    return LoadedModel(Transformer(config, weights, kernels, dtype or torch.bfloat16), config, reader.fingerprint())


class _WeightReader:
    """Reads each weight once, in the model's dtype, and remembers what it has read."""

    def __init__(self, source: WeightSource, config: ModelConfig, dtype: torch.dtype | None, kernels: Kernels) -> None:
        self._source, self._config, self._kernels = source, config, kernels
        self._dtype, self._in_blocks = dtype or torch.float32, dtype is None
        self._unread = source.names()
        self.packer = LinearPacker(
            self._dtype, max(config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim), kernels
        )
        self._digest = hashlib.sha256(json.dumps([asdict(config), str(dtype or "blocks")], sort_keys=True).encode())

    def weight(self, name: str, *shape: int) -> Tensor:
        if name not in self._unread:
            raise ModelFileCorrupt(f"{self._source.path}: has no tensor {name!r}, which its config calls for")
        weight = self._source.read(name).to(self._dtype)
        if weight.shape != shape:
            raise ModelFileCorrupt(
                f"{self._source.path}: tensor {name!r} is {[*weight.shape]}, its config says {[*shape]}"
            )
        self._unread.discard(name)
        content = xxhash.xxh3_128_digest(weight.contiguous().view(torch.uint8).numpy().data)
        self._digest.update(f"{name} {[*shape]} ".encode() + content)
        return weight.to(self._kernels.device)

    def norm(self, name: str, size: int) -> RmsNorm:
        return self.norm_of(self.weight(f"{name}.weight", size))

    def norm_of(self, weight: Tensor) -> RmsNorm:
        return RmsNorm(weight.to(activation_dtype(self._dtype, self._kernels)), self._config.rms_norm_eps)

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

    def has(self, name: str) -> bool:
        return name in self._unread

    def refuse_unused(self) -> None:
        if self._unread:
            raise UnsupportedModel(
                f"{self._source.path}: tensor {min(self._unread)!r} has no place in {self._config.architecture}"
            )

    def fingerprint(self) -> str:
        return self._digest.hexdigest()


def _check_heads(source: WeightSource, config: ModelConfig) -> None:
    if config.num_heads % config.num_kv_heads:
        raise ModelFileCorrupt(
            f"{source.path}: {config.num_heads} heads cannot share {config.num_kv_heads} heads of KV"
        )
    if config.head_dim % 2 or config.head_dim < 2:
        raise ModelFileCorrupt(f"{source.path}: heads of {config.head_dim} dimensions cannot be rotated in pairs")


def _weights(reader: _WeightReader, config: ModelConfig) -> Weights:
    embedding = reader.weight("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
    layers = tuple(_layer(reader, config, f"model.layers.{i}.") for i in range(config.num_layers))
    norm = reader.norm("model.norm", config.hidden_size)
    if config.tie_word_embeddings and not reader.has("lm_head.weight"):  # used if there is one, as in transformers
        return Weights(embedding, layers, norm, reader.packed(["model.embed_tokens.weight"], [embedding]))
    return Weights(embedding, layers, norm, reader.linear(["lm_head"], [config.vocab_size], config.hidden_size, False))


def _layer(reader: _WeightReader, config: ModelConfig, at: str) -> Layer:
    hidden, middle = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    mlp, projections = f"{at}mlp.", [f"{at}self_attn.{n}_proj" for n in "qkv"]
    return Layer(
        attention_norm=reader.norm(f"{at}input_layernorm", hidden),
        qkv=reader.linear(projections, [queries, keys, keys], hidden, config.qkv_bias),
        qk_norm=_qk_norm(reader, config, at) if config.qk_norm else None,
        output=reader.linear([f"{at}self_attn.o_proj"], [hidden], queries, config.output_bias),
        mlp_norm=reader.norm(f"{at}post_attention_layernorm", hidden),
        gate_up=reader.linear([f"{mlp}gate_proj", f"{mlp}up_proj"], [middle, middle], hidden, config.mlp_bias),
        down=reader.linear([f"{mlp}down_proj"], [hidden], middle, config.mlp_bias),
    )


def _qk_norm(reader: _WeightReader, config: ModelConfig, at: str) -> RmsNorm:
    """One norm over queries and keys together; weight [H + Hkv, D]."""
    query = reader.weight(f"{at}self_attn.q_norm.weight", config.head_dim).expand(config.num_heads, -1)
    key = reader.weight(f"{at}self_attn.k_norm.weight", config.head_dim).expand(config.num_kv_heads, -1)
    return reader.norm_of(torch.cat((query, key)))
