"""Pixels to patches, by the model's own transformers image processor, which does without torchvision.

An image is decoded by Pillow; who does that with a stranger's bytes bounds them first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoImageProcessor

from tercet.errors import UnsupportedModel
from tercet.models.vision.config import VisionConfig
from tercet.models.vision.sizes import ImageSizes, processor_settings
from tercet.models.vision.tower import Patches

if TYPE_CHECKING:
    from PIL import Image


class ImageProcessor:
    def __init__(self, directory: Path, config: VisionConfig) -> None:
        """Raises ModelFileMissing, UnsupportedModel."""
        ImageSizes(config, processor_settings(directory), directory)  # the gateway counts on it
        self._config = config
        load: Any = AutoImageProcessor.from_pretrained  # it has no types
        self._processor = load(directory, backend="pil", local_files_only=True)
        self._converts = bool(getattr(self._processor, "do_convert_rgb", False))
        if not type(self._processor).__name__.endswith("Pil"):
            raise UnsupportedModel(f"{directory}: {type(self._processor).__name__} takes torchvision")

    def patches(self, image: Image.Image) -> Patches:
        """Transparency is put on white, as transformers does."""
        if not self._converts:
            image = image.convert("RGB")
        out = self._processor(images=[image], return_tensors="pt")
        if self._config.family != "idefics3":
            tiles, rows, columns = out["image_grid_thw"][0].tolist()
            return Patches(out["pixel_values"].float(), (tiles, rows, columns))
        return self._tiles(out["pixel_values"][0].float())

    def _tiles(self, pixels: torch.Tensor) -> Patches:
        """[tiles, channels, height, width] -> patches in the order of grid.py."""
        tiles, channels, height, width = pixels.shape
        side, merge = self._config.patch_size, self._config.merge
        rows, columns = height // side, width // side
        split = pixels.view(tiles, channels, rows // merge, merge, side, columns // merge, merge, side)
        values = split.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(-1, channels * side**2)
        return Patches(values, (tiles, rows, columns))
