"""How many patches an image gets, from its size alone: what the model's image processor will make of it. The gateway
asks, so this imports neither torch nor transformers; tests hold it to transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tercet.errors import InvalidRequest, ModelFileCorrupt, ModelFileMissing, UnsupportedModel
from tercet.models.config_hf import read_json
from tercet.models.vision.config import Grid, VisionConfig

FILES = ("preprocessor_config.json", "processor_config.json")
MOST_ASPECT = 200  # of Qwen's images
MOST_SIDE = 4096  # pixels of a side that Idefics3's processor makes


def processor_settings(directory: Path) -> Mapping[str, Any]:
    """Raises ModelFileMissing, ModelFileCorrupt."""
    for name in FILES:
        if (directory / name).exists():
            settings = read_json(directory / name)
            return settings.get("image_processor", settings)  # type: ignore[no-any-return]  # JSON
    raise ModelFileMissing(f"{directory}: has no {FILES[0]}, which says how pixels become patches")


class ImageSizes:
    def __init__(self, config: VisionConfig, settings: Mapping[str, Any], path: Path) -> None:
        """Raises UnsupportedModel, ModelFileCorrupt."""
        self._config = config
        for name in ("do_resize", "do_rescale", "do_normalize"):
            if settings.get(name, True) is not True:
                raise UnsupportedModel(f"{path}: {name} = {settings[name]!r} of the image processor is not supported")
        size = settings.get("size") or {}
        try:
            if config.family == "idefics3":
                self._longest = int(size.get("longest_edge", 4 * 364))
                self._tile = int(settings.get("max_image_size", {"longest_edge": 364})["longest_edge"])
                self._splits = bool(settings.get("do_image_splitting", True))
                ours = {"max_image_size": (self._tile, config.positions * config.patch_size)}
            else:
                self._least = int(settings.get("min_pixels") or size.get("shortest_edge", 56 * 56))
                self._most = int(settings.get("max_pixels") or size.get("longest_edge", 28 * 28 * 1280))
                ours = {
                    "patch_size": (settings.get("patch_size", 14), config.patch_size),
                    "merge_size": (settings.get("merge_size", 2), config.merge),
                }
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ModelFileCorrupt(f"{path}: the image processor's sizes cannot be read: {error!r}") from error
        if not config.framed and self._splits:
            raise UnsupportedModel(
                f"{path}: do_image_splitting: a tower that stands apart takes images whole; use false"
            )
        for name, (its, wanted) in ours.items():
            if its != wanted:
                raise ModelFileCorrupt(f"{path}: {name} of the image processor is {its}, the model's is {wanted}")

    def grid(self, width: int, height: int) -> Grid:
        """Tiles, and rows and columns of patches of each. Raises InvalidRequest for a shape that cannot be taken."""
        if self._config.family != "idefics3":
            rows, columns = self._resized(height, width)
            return 1, rows // self._config.patch_size, columns // self._config.patch_size
        down, across = self.tiles(width, height)
        return down * across + 1, self._config.positions, self._config.positions

    def tiles(self, width: int, height: int) -> tuple[int, int]:
        """Idefics3: rows and columns of tiles, beside the whole; 0, 0 for an image that is not cut."""
        if not self._splits:
            return 0, 0
        height, width = _longest_side_as(height, width, self._longest)
        height, width = _at_most(height, width)
        height, width = self._whole_tiles(height, width)
        if height <= self._tile and width <= self._tile:
            return 0, 0
        return height // self._tile, width // self._tile

    def _whole_tiles(self, height: int, width: int) -> tuple[int, int]:
        tile, aspect = self._tile, width / height
        if width >= height:
            width = math.ceil(width / tile) * tile
            return math.ceil(int(width / aspect) / tile) * tile, width
        height = math.ceil(height / tile) * tile
        return height, math.ceil(int(height * aspect) / tile) * tile

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Qwen2-VL's: sides of whole tokens, about the same shape, pixels within bounds."""
        if max(height, width) / min(height, width) > MOST_ASPECT:
            raise InvalidRequest(f"one side of an image is more than {MOST_ASPECT} times the other: {width} x {height}")
        side = self._config.patch_size * self._config.merge
        rows, columns = round(height / side) * side, round(width / side) * side
        if rows * columns > self._most:
            shrink = math.sqrt(height * width / self._most)
            rows, columns = (max(side, math.floor(each / shrink / side) * side) for each in (height, width))
        elif rows * columns < self._least:
            grow = math.sqrt(self._least / (height * width))
            rows, columns = (math.ceil(each * grow / side) * side for each in (height, width))
        return rows, columns


def _longest_side_as(height: int, width: int, longest: int) -> tuple[int, int]:
    aspect = width / height
    if width >= height:
        other = int(longest / aspect)
        return max(1, other + other % 2), longest
    other = int(longest * aspect)
    return longest, max(1, other + other % 2)


def _at_most(height: int, width: int) -> tuple[int, int]:
    aspect = width / height
    if width >= height and width > MOST_SIDE:
        return max(1, int(MOST_SIDE / aspect)), MOST_SIDE
    if height > width and height > MOST_SIDE:
        return MOST_SIDE, max(1, int(MOST_SIDE * aspect))
    return height, width
