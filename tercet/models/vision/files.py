"""An image's file as pixels, the same in the gateway and where it is encoded. Pillow decodes; the time and memory that
it takes, which do not follow from a file's size, are bounded here."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from PIL import Image, ImageOps, UnidentifiedImageError

from tercet.errors import InvalidRequest

if TYPE_CHECKING:
    from PIL.Image import Image as Pixels

KINDS = ("PNG", "JPEG", "WEBP", "GIF")  # BMP's run lengths are decoded in Python: 68 bytes take seconds
MOST_PIXELS = 1 << 24  # of an image, 4,096 x 4,096
MOST_SCANS = 64  # of a JPEG, of which each goes over all pixels in some bytes; progressive ones have about ten
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit, which warns first


def pixels_of(content: bytes) -> int:
    """What the file's head says. Raises InvalidRequest for what is not decoded here."""
    try:
        with Image.open(io.BytesIO(content), formats=KINDS) as opened:
            width, height = opened.size
    except UnidentifiedImageError as error:
        raise InvalidRequest(f"is no image; {', '.join(KINDS)} are taken") from error
    except MemoryError:
        raise
    except Exception as error:  # decoders fail in many ways
        raise InvalidRequest(f"the image cannot be read: {type(error).__name__}: {error}") from error
    if not 0 < width * height <= MOST_PIXELS:
        raise InvalidRequest(f"an image of {width} x {height}; at most {MOST_PIXELS:,} pixels are taken")
    if content.startswith(b"\xff\xd8") and content.count(b"\xff\xda") > MOST_SCANS:
        raise InvalidRequest(f"a JPEG of more than {MOST_SCANS} scans")
    return width * height


def decoded(content: bytes) -> Pixels:
    """Whole, and turned as its EXIF says. Raises InvalidRequest."""
    pixels_of(content)
    try:
        with Image.open(io.BytesIO(content), formats=KINDS) as opened:
            opened.load()
            return ImageOps.exif_transpose(opened)
    except MemoryError:
        raise
    except Exception as error:  # as above
        raise InvalidRequest(f"the image cannot be read: {type(error).__name__}: {error}") from error
