"""What images in a prompt mean for its steps: which tokens can be computed, what a block's hash must tell apart, which
rows take embeddings, and where rotary positions go. Pure."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tercet.core import PromptImage
from tercet.models.vision.grid import ImageSpan, Ints, rope_positions


class Overlap(NamedTuple):
    """Tokens of an image that lie in a range of the prompt."""

    image: int  # its number in the prompt
    start: int  # the first of them, in the prompt
    tokens: int
    offset: int  # of the image's tokens, the first of them


def overlaps(images: Sequence[PromptImage], start: int, end: int) -> Iterator[Overlap]:
    """Those in start .. end, in order."""
    for number, image in enumerate(images):
        offset = 0
        for first, count in image.spans:
            low, high = max(start, first), min(end, first + count)
            if low < high:
                yield Overlap(number, low, high - low, offset + low - first)
            offset += count


def told_apart(images: Sequence[PromptImage], start: int, end: int) -> bytes:
    """What the tokens start .. end do not say of the images among them."""
    return b"".join(
        images[each.image].digest
        + struct.pack("<6Q", each.start - start, each.tokens, each.offset, *images[each.image].grid)
        for each in overlaps(images, start, end)
    )


def computable(images: Sequence[PromptImage], here: set[int], done: int, length: int) -> int:
    """How many tokens can be computed, with the embeddings of the images `here`; done: of those that already are."""
    missing = (i for number, i in enumerate(images) if number not in here and i.end > done)
    return max(done, min((image.start for image in missing), default=length))


def shift_at(images: Sequence[PromptImage], start: int) -> int:
    """M-RoPE's number of a text's token at `start`, less its place: an image takes as many numbers as its longer side
    has tokens."""
    return sum(max(image.grid[1:]) - image.tokens for image in images if image.start < start)


def positions_of(images: Sequence[PromptImage], length: int) -> Ints:
    """M-RoPE's three numbers of each token, [3, length]."""
    return rope_positions(length, [ImageSpan(image.start, image.grid) for image in images], 1)
