"""Images that a client sends: bytes in a data URI, decoded once, so that one that is broken, huge or of another kind is
refused by its place in the messages before anything is computed."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tercet.errors import InvalidRequest
from tercet.models.vision.files import decoded, pixels_of

MOST_IMAGES = 64  # of a request
MOST_IN_ALL = 1 << 26  # pixels of a request: a second's work
DATA_URI = re.compile(r"data:[\w.+-]+/[\w.+-]+(;[\w.+-]+=[^;,]*)*;base64,", re.ASCII | re.IGNORECASE)
PARTS = ("image_url", "input_image")  # types of a content part that is an image


@dataclass
class ImagePart:
    where: str  # messages[1].content[0]
    url: str

    def take(self) -> bytes:
        """The file; the URL, which is larger, is let go. Raises InvalidRequest."""
        head = DATA_URI.match(self.url[:256])
        if head is None:
            told = self.url.partition(":")[0][:20]
            raise InvalidRequest(
                f"{self.where}: must be a data URI (data:image/png;base64,...); {told!r} addresses are not fetched here"
            )
        try:
            content = base64.b64decode(self.url[head.end() :], validate=True)
        except (binascii.Error, ValueError) as error:
            raise InvalidRequest(f"{self.where}: the data URI is no base64: {error}") from error
        self.url = ""
        return content


def data_uri(content: bytes) -> str:
    return f"data:image/any;base64,{base64.b64encode(content).decode()}"


def image_part(part: dict[str, Any], where: str) -> ImagePart:
    """Raises InvalidRequest."""
    given = part.get("image_url")
    url = given.get("url") if isinstance(given, dict) else given
    if not isinstance(url, str):
        raise InvalidRequest(f"{where}.image_url must have a url, got {type(url).__name__}")
    if part.get("uuid") is not None:
        raise InvalidRequest(f"{where}.uuid is not built; send the image")
    return ImagePart(where, url)


def sizes_of(parts: Sequence[ImagePart], contents: Sequence[bytes]) -> list[tuple[int, int]]:
    """Width and height in pixels of each, decoded whole: equal ones once, and none if all have too many pixels. Raises
    InvalidRequest."""
    whole = 0
    for part, content in zip(parts, contents, strict=True):
        with _named(part):
            whole += pixels_of(content)
            if whole > MOST_IN_ALL:
                raise InvalidRequest(f"more than {MOST_IN_ALL:,} pixels in all images together")
    sizes: dict[bytes, tuple[int, int]] = {}
    for part, content in zip(parts, contents, strict=True):
        if content not in sizes:
            with _named(part):
                sizes[content] = decoded(content).size
    return [sizes[content] for content in contents]


@contextmanager
def _named(part: ImagePart) -> Iterator[None]:
    try:
        yield
    except InvalidRequest as error:
        raise InvalidRequest(f"{part.where}: {error}") from error
