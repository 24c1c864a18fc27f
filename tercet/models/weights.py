"""Where a model's weights are read from, one tensor at a time, under their Hugging Face names.

GgufWeights         a GGUF file: names translated, quantisation undone, llama's query and key rows put back in order
SafetensorsWeights  *.safetensors of a directory, one file or several with an index
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tercet.errors import ModelFileCorrupt, ModelFileMissing, UnsupportedModel
from tercet.models.config import ModelConfig
from tercet.models.config_gguf import ROPE_FREQS
from tercet.models.config_hf import read_json
from tercet.models.gguf_file import GgufFile

GGUF_NAMES = {  # part of a GGUF name -> of a Hugging Face name
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class WeightSource(Protocol):
    path: Path

    def names(self) -> set[str]:
        """Every tensor of the file that takes part in the result."""

    def read(self, name: str) -> Tensor:
        """In a floating dtype of the source's choice. The name is one of `names`."""


class GgufWeights:
    def __init__(self, file: GgufFile, config: ModelConfig) -> None:
        self.path = file.path
        self._file, self._config = file, config
        self._stored = {_hf_name(name): name for name in file.tensors if name != ROPE_FREQS}

    def names(self) -> set[str]:
        return set(self._stored)

    def read(self, name: str) -> Tensor:
        weight = torch.from_numpy(self._file.read(self._stored[name]))
        if self._config.architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            return self._uninterleaved(weight)
        return weight

    def _uninterleaved(self, weight: Tensor) -> Tensor:
        """GGUF keeps llama's rotary pairs as neighbouring rows; here they are the two halves of a head."""
        pairs = weight.view(-1, self._config.head_dim // 2, 2, *weight.shape[1:])
        return pairs.transpose(1, 2).reshape(weight.shape)


def _hf_name(name: str) -> str:
    *layer, part, kind = name.split(".")
    prefix = f"model.layers.{layer[1]}." if len(layer) == 2 else ""
    return f"{prefix}{GGUF_NAMES.get(part, part)}.{kind}"


class SafetensorsWeights:
    def __init__(self, directory: Path) -> None:
        self.path = directory
        self._file_of = _file_of(directory)

    def names(self) -> set[str]:
        return {name for name in self._file_of if not name.endswith("rotary_emb.inv_freq")}

    def read(self, name: str) -> Tensor:
        path = self._file_of[name]
        try:
            with safe_open(path, framework="pt") as file:
                weight: Tensor = file.get_tensor(name)
        except SafetensorError as error:
            raise ModelFileCorrupt(f"{path}: tensor {name!r} cannot be read: {error}; fetch it again") from error
        if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise UnsupportedModel(
                f"{path}: tensor {name!r} has dtype {weight.dtype}; float32, float16, bfloat16 are read"
            )
        return weight


def _file_of(directory: Path) -> dict[str, Path]:
    """Tensor name -> its file."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return dict.fromkeys(_tensor_names(directory / "model.safetensors"), directory / "model.safetensors")
    try:
        files = {directory / name for name in read_json(index)["weight_map"].values()}
    except (KeyError, AttributeError, TypeError) as error:
        raise ModelFileCorrupt(f"{index}: has no weight_map of names to files") from error
    return {name: path for path in sorted(files) for name in _tensor_names(path)}


def _tensor_names(path: Path) -> list[str]:
    if not path.is_file():
        raise ModelFileMissing(f"{path}: there is no such file; a model directory holds *.safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ModelFileCorrupt(f"{path}: is no whole safetensors file: {error}; fetch it again") from error
