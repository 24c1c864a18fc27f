"""Where images stand in a prompt: a chat template writes one token for each, which becomes as many as the image takes,
with what the model wants around them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

from tercet.core import PromptImage
from tercet.errors import InvalidRequest
from tercet.models.vision.config import VisionConfig
from tercet.models.vision.sizes import ImageSizes

FAKE, WHOLE, TILE = "<fake_token_around_image>", "<global-img>", "<row_{}_col_{}>"  # Idefics3's

Sized = tuple[int, int]  # width, height in pixels


def image_digest(content: bytes, settings: str) -> bytes:
    """Names the embeddings of an image's file. settings: all else that they follow from."""
    return hashlib.sha256(settings.encode() + b"\0" + content).digest()


class ImagePrompts:
    def __init__(
        self, config: VisionConfig, sizes: ImageSizes, encode: Callable[[str], list[int]], image: str, settings: str
    ) -> None:
        """encode: of a text with control tokens. image: the text of the image token. settings: see image_digest."""
        self._config, self._sizes, self._encode, self._image = config, sizes, encode, image
        self._settings = settings

    def expanded(
        self, ids: Sequence[int], images: Sequence[tuple[bytes, Sized]]
    ) -> tuple[tuple[int, ...], tuple[PromptImage, ...]]:
        """ids: of a rendered prompt with an image token for each image; images: their files and sizes. Raises
        InvalidRequest."""
        token = self._config.image_token
        if ids.count(token) != len(images):
            raise InvalidRequest(
                f"messages: the model's chat template shows {ids.count(token)} of {len(images)} images"
            )
        whole: list[int] = []
        shown: list[PromptImage] = []
        coming = iter(images)
        for each in ids:
            if each != token:
                whole.append(each)
                continue
            content, (width, height) = next(coming)
            tiles, rows, columns = self._sizes.grid(width, height)
            inner = self._inner(width, height, rows * columns // self._config.merge**2)
            spans = tuple((len(whole) + first, count) for first, count in _runs(inner, token))
            whole += inner
            grid = (tiles, rows // self._config.merge, columns // self._config.merge)
            shown.append(PromptImage(image_digest(content, self._settings), grid, spans, content))
        return tuple(whole), tuple(shown)

    def lone(self, content: bytes, size: Sized) -> tuple[tuple[int, ...], tuple[PromptImage, ...]]:
        """A prompt of one image and nothing else."""
        return self.expanded((self._config.image_token,), [(content, size)])

    def _inner(self, width: int, height: int, tokens: int) -> list[int]:
        """What stands in the place of an image's token; tokens: of each tile."""
        if self._config.family != "idefics3" or not self._config.framed:
            return [self._config.image_token] * tokens
        down, across = self._sizes.tiles(width, height)
        tile = self._image * tokens
        rows = ("".join(f"{FAKE}{TILE.format(r + 1, c + 1)}{tile}" for c in range(across)) for r in range(down))
        cut = "".join(f"{row}\n" for row in rows)
        between = "\n" if cut else ""
        return self._encode(f"{cut}{between}{FAKE}{WHOLE}{tile}{FAKE}")


def _runs(ids: Sequence[int], token: int) -> Iterator[tuple[int, int]]:
    """First and count of each run of the token."""
    first = None
    for at, each in enumerate([*ids, None]):
        if each == token and first is None:
            first = at
        if each != token and first is not None:
            yield first, at - first
            first = None
