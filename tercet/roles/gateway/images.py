"""Images that a client sends: bytes in a data URI, decoded once, so that one that is broken, huge or of another kind is
refused by its place in the messages before anything is computed."""

from __future__ import annotations

import base64
import binascii
import io
import re
from dataclasses import dataclass
from typing import Any

from PIL import Image, UnidentifiedImageError

from tercet.errors import InvalidRequest

KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MOST_IMAGES = 64  # of a request
MOST_PIXELS = 1 << 25  # of an image, decoded: 100 MB as RGB
DATA_URI = re.compile(r"data:[\w.+-]+/[\w.+-]+(;[\w.+-]+=[^;,]*)*;base64,", re.ASCII | re.IGNORECASE)
PARTS = ("image_url", "input_image")  # types of a content part that is an image


@dataclass(frozen=True)
class ImagePart:
    where: str  # messages[1].content[0]
    url: str

    def content(self) -> bytes:
        """The file. Raises InvalidRequest."""
        head = DATA_URI.match(self.url[:256])
        if head is None:
            told = self.url.partition(":")[0][:20]
            raise InvalidRequest(
                f"{self.where}: must be a data URI (data:image/png;base64,...); {told!r} addresses are not fetched here"
            )
        try:
            return base64.b64decode(self.url[head.end() :], validate=True)
        except (binascii.Error, ValueError) as error:
            raise InvalidRequest(f"{self.where}: the data URI is no base64: {error}") from error


def image_part(part: dict[str, Any], where: str) -> ImagePart:
    """Raises InvalidRequest."""
    given = part.get("image_url")
    url = given.get("url") if isinstance(given, dict) else given
    if not isinstance(url, str):
        raise InvalidRequest(f"{where}.image_url must have a url, got {type(url).__name__}")
    if part.get("uuid") is not None:
        raise InvalidRequest(f"{where}.uuid is not built; send the image")
    return ImagePart(where, url)


def size_of(content: bytes, where: str) -> tuple[int, int]:
    """Width and height in pixels, of an image that can be decoded whole. Raises InvalidRequest."""
    try:
        with Image.open(io.BytesIO(content), formats=KINDS) as opened:
            width, height = opened.size
            if not 0 < width * height <= MOST_PIXELS:
                raise InvalidRequest(
                    f"{where}: an image of {width} x {height}; at most {MOST_PIXELS:,} pixels are taken"
                )
            opened.load()
    except UnidentifiedImageError as error:
        raise InvalidRequest(f"{where}: is no image; {', '.join(KINDS)} are taken") from error
    except InvalidRequest:
        raise
    except Exception as error:  # decoders fail in many ways
        raise InvalidRequest(f"{where}: the image cannot be read: {type(error).__name__}: {error}") from error
    return width, height
