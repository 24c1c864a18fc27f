"""Images that a client sends, as its messages have them. Each is decoded once, so that one that is broken, huge or of
another kind is refused by its place in the messages before anything is computed."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tercet.errors import InvalidRequest, UserError
from tercet.models.vision.files import decoded, pixels_of
from tercet.roles.gateway.fetch_rules import ADDRESS

MOST_IMAGES = 64  # of a request
MOST_IN_ALL = 1 << 26  # pixels of a request: a second's work
DATA_URI = re.compile(r"data:[\w.+-]+/[\w.+-]+(;[\w.+-]+=[^;,]*)*;base64,", re.ASCII | re.IGNORECASE)
UUID_CHARS = 256  # some clients name an image by its address
UUID = re.compile(rf"[!-~]{{1,{UUID_CHARS}}}")
PARTS = ("image_url", "input_image")  # types of a content part that is an image


@dataclass
class ImagePart:
    where: str  # messages[1].content[0]
    url: str = ""  # a data URI or an address, until the file is there
    uuid: str = ""  # the client's own name for it; it may come alone
    content: bytes | None = None
    same: ImagePart | None = None  # the part that has the file

    @property
    def is_named_only(self) -> bool:
        return not self.url and self.content is None

    @property
    def is_remote(self) -> bool:
        return ADDRESS.match(self.url) is not None

    def take(self) -> bytes:
        """The file; a URL, which is larger, is let go. Raises InvalidRequest."""
        if self.same is not None:
            return self.same.take()
        if self.content is None:
            self.content = self._unpacked()
            self.url = ""
        return self.content

    def _unpacked(self) -> bytes:
        head = DATA_URI.match(self.url[:256])
        if head is None:
            told = self.url.partition(":")[0][:20]
            raise InvalidRequest(
                f"{self.where}: must be a data URI (data:image/png;base64,...) or an http(s) address, not {told!r}"
            )
        try:
            return base64.b64decode(self.url[head.end() :], validate=True)
        except (binascii.Error, ValueError) as error:
            raise InvalidRequest(f"{self.where}: the data URI is no base64: {error}") from error


def image_part(part: dict[str, Any], where: str) -> ImagePart:
    """Its image_url is a URL or an object with one, as in the OpenAI API; the file itself, over gRPC; or nothing, if
    there is a uuid, as in vLLM. Raises InvalidRequest."""
    given, uuid = part.get("image_url"), part.get("uuid")
    if uuid is not None and not (isinstance(uuid, str) and UUID.fullmatch(uuid)):
        raise InvalidRequest(f"{where}.uuid must be 1 to {UUID_CHARS} printable ASCII characters without spaces")
    if isinstance(given, bytes):
        return ImagePart(where, uuid=uuid or "", content=given)
    if isinstance(given, dict) and given.get("uuid") is not None:
        raise InvalidRequest(f"{where}.image_url.uuid: a uuid stands beside image_url, not in it")
    url = given.get("url") if isinstance(given, dict) else given
    if uuid and url in (None, ""):
        return ImagePart(where, uuid=uuid)
    if not isinstance(url, str) or not url:
        raise InvalidRequest(f"{where}.image_url must have a url, got {type(url).__name__ if url else 'none'}")
    return ImagePart(where, url, uuid or "")


def sizes_of(parts: Sequence[ImagePart], contents: Sequence[bytes]) -> list[tuple[int, int]]:
    """Width and height in pixels of each, decoded whole: equal ones once, and none if all have too many pixels. Raises
    InvalidRequest."""
    whole = 0
    for part, content in zip(parts, contents, strict=True):
        with named(part):
            whole += pixels_of(content)
            if whole > MOST_IN_ALL:
                raise InvalidRequest(f"more than {MOST_IN_ALL:,} pixels in all images together")
    sizes: dict[bytes, tuple[int, int]] = {}
    for part, content in zip(parts, contents, strict=True):
        if content not in sizes:
            with named(part):
                sizes[content] = decoded(content).size
    return [sizes[content] for content in contents]


@contextmanager
def named(part: ImagePart) -> Iterator[None]:
    """What is wrong with it is told with its place."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{part.where}: {error}") from error
