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
from tercet.kernels.native.linear import Quantised
from tercet.models.config import ModelConfig
from tercet.models.config_gguf import ROPE_FREQS
from tercet.models.config_hf import read_json
from tercet.models.gguf_blocks import quantised
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
ADAPTER = "adapter_config.json"
BODY = ("embed_tokens.", "layers.", "norm.")  # prefix of all names but the head's
VISION = "vision."  # prefix of the names of what makes embeddings of images
RENAMED = {  # prefix in files of models that see -> here
    "model.language_model.": "model.",
    "model.text_model.": "model.",
    "model.visual.": VISION,
    "visual.": VISION,
    "model.vision_model.": VISION,
    "model.connector.": f"{VISION}connector.",
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class WeightSource(Protocol):
    path: Path

    def names(self) -> set[str]:
        """Every tensor of the file that takes part in the result."""

    def read(self, name: str) -> Tensor:
        """In a floating dtype of the source's choice. The name is one of `names`."""

    def quantised(self, name: str) -> Quantised | None:
        """A matrix in the blocks that the file keeps it in, if it does and the native kernels take them."""


class GgufWeights:
    def __init__(self, file: GgufFile, config: ModelConfig) -> None:
        self.path = file.path
        self._file, self._config = file, config
        self._stored = {_hf_name(name): name for name in file.tensors if name != ROPE_FREQS}

    def names(self) -> set[str]:
        return set(self._stored)

    def read(self, name: str) -> Tensor:
        weight = torch.from_numpy(self._file.read(self._stored[name]))
        return self._uninterleaved(weight) if self._interleaves(name) else weight

    def quantised(self, name: str) -> Quantised | None:
        stored = self._stored[name]
        found = quantised(self._file.rows(stored), self._file.tensors[stored].kind)
        if found is None or not self._interleaves(name):
            return found
        q, scales, leasts = map(self._uninterleaved, (found.q, found.scales, found.leasts))
        return Quantised(q, scales, leasts, found.bits)

    def _interleaves(self, name: str) -> bool:
        return self._config.architecture == "llama" and ("q_proj" in name or "k_proj" in name)

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
        if (directory / ADAPTER).exists():
            raise UnsupportedModel(
                f"{directory / ADAPTER}: adapters are not supported; merge it into the model's weights"
            )
        self._stored = _stored(directory)

    def names(self) -> set[str]:
        return {name for name in self._stored if not name.endswith("rotary_emb.inv_freq")}

    def read(self, name: str) -> Tensor:
        path, stored = self._stored[name]
        try:
            with safe_open(path, framework="pt") as file:
                weight: Tensor = file.get_tensor(stored)
        except SafetensorError as error:
            raise ModelFileCorrupt(f"{path}: tensor {stored!r} cannot be read: {error}; fetch it again") from error
        if weight.dtype not in DTYPES:
            read = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise UnsupportedModel(f"{path}: tensor {stored!r} has dtype {weight.dtype}; {read} are read")
        return weight

    def quantised(self, name: str) -> Quantised | None:
        return None


def _stored(directory: Path) -> dict[str, tuple[Path, str]]:
    """Tensor name -> its file, and its name there: without the prefix `model.` if saved without its head, or with those
    of a model that sees."""
    stored: dict[str, tuple[Path, str]] = {}
    for path in _files(directory):
        for name in _tensor_names(path):
            full = _full_name(name)
            if full in stored and stored[full][1] != name:
                raise ModelFileCorrupt(f"{path}: has tensor {full!r} twice, as {name!r} and {stored[full][1]!r}")
            stored[full] = path, name
    return stored


def _full_name(name: str) -> str:
    if name.startswith(BODY):
        return f"model.{name}"
    prefix = next(filter(name.startswith, RENAMED), "")
    return RENAMED.get(prefix, "") + name.removeprefix(prefix)


def _files(directory: Path) -> list[Path]:
    """In transformers' order: a single file, else those in the index."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        others = sorted(
            path.name for kind in ("*.safetensors", "*.bin", "*.pth", "*.gguf") for path in directory.glob(kind)
        )
        there = f"; {', '.join(others[:3])} is not read: rename or convert it" if others else ""
        raise ModelFileMissing(f"{directory}: has no {single.name} and no {index.name}{there}")
    try:
        return sorted({directory / name for name in read_json(index)["weight_map"].values()})
    except (KeyError, AttributeError, TypeError) as error:
        raise ModelFileCorrupt(f"{index}: has no weight_map of names to files") from error


def _tensor_names(path: Path) -> list[str]:
    if not path.is_file():
        raise ModelFileMissing(f"{path}: there is no such file, and the index names it; fetch it")
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ModelFileCorrupt(f"{path}: is no whole safetensors file: {error}; fetch it again") from error
