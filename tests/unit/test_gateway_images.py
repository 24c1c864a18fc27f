"""Images in messages: what is taken, what is refused and by which words, and what becomes of a prompt."""

from __future__ import annotations

import base64
import io

import pytest
from PIL import Image

from tercet.errors import InvalidRequest
from tercet.models.vision.files import MOST_SCANS
from tercet.roles.gateway import images as module
from tercet.roles.gateway.images import ImagePart, image_part, sizes_of
from tercet.roles.gateway.openai_messages import messages_of


def file_of(kind="PNG", size=(6, 4), mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, size, 3).save(file, kind)
    return file.getvalue()


def size_of(content, where):
    [size] = sizes_of([ImagePart(where, "")], [content])
    return size


def uri(content, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


NO_UUID = r"content\[0\].uuid must be 1 to 256 printable ASCII characters"


def user(*parts):
    return [{"role": "user", "content": [*parts]}]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_kinds_that_are_taken(kind):
    part = image_part({"type": "image_url", "image_url": {"url": uri(file_of(kind)), "detail": "low"}}, "m")
    assert part.take() == file_of(kind)
    assert part.url == ""
    assert size_of(file_of(kind), "m") == (6, 4)


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "1", "CMYK"])
def test_modes_that_are_taken(mode):
    assert size_of(file_of("TIFF" if mode == "none" else "PNG" if mode != "CMYK" else "JPEG", mode=mode), "m") == (6, 4)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("file:///etc/passwd", "address, not 'file'"),
        ("data:image/png,abc", "must be a data URI .*, not 'data'"),
        ("http:example.com", "address, not 'http'"),
        ("//example.com/a.png", "must be a data URI"),
        ("data:image/png;base64,ab$c", "no base64"),
        ("data:image/png;base64,abc", "no base64"),
        ("data:image/png;base64,é", "no base64"),
    ],
)
def test_urls_that_are_refused(url, told):
    with pytest.raises(InvalidRequest, match=told) as raised:
        ImagePart("messages[0].content[1]", url).take()
    assert str(raised.value).startswith("messages[0].content[1]: ")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is no image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is no image; PNG, JPEG, WEBP, GIF are taken"),
        (file_of("TIFF"), "is no image"),
        (file_of("BMP"), "is no image"),  # 68 bytes of run lengths take seconds in Python
        (file_of(size=(400, 300))[:-30], "cannot be read"),
        (file_of("JPEG", size=(400, 300))[:300], "cannot be read"),
    ],
)
def test_files_that_are_refused(content, told):
    with pytest.raises(InvalidRequest, match=told) as raised:
        size_of(content, "messages[0].content[1]")
    assert str(raised.value).startswith("messages[0].content[1]: ")


def test_a_bomb_is_refused_by_its_size_and_never_decoded(monkeypatch):
    content = file_of(size=(9000, 9000), mode="1")
    assert len(content) < 100_000
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(InvalidRequest, match="an image of 9000 x 9000; at most"):
        size_of(content, "m")


def header(width, height):
    """Of a PNG whose content does not follow."""
    import struct
    import zlib

    chunk = b"IHDR" + struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


@pytest.mark.parametrize(("width", "height"), [(0, 0), (0, 5), (100_000, 100_000), (2**31 - 1, 1), (1, 2**31 - 1)])
def test_sizes_that_no_image_has(width, height):
    with pytest.raises(InvalidRequest, match=r"m: "):
        size_of(header(width, height), "m")


def test_messages_keep_the_order_of_their_parts():
    one, two = uri(file_of()), uri(file_of("GIF"))
    first = user({"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": one}}, "b")
    last = user({"type": "input_image", "image_url": two}, {"type": "text", "text": "d"})
    messages, images = messages_of([*first, {"role": "assistant", "content": "c"}, *last])
    assert [m["content"] for m in messages] == [
        [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}],
        "c",
        [{"type": "image"}, {"type": "text", "text": "d"}],
    ]
    assert images == (ImagePart("messages[0].content[1]", one), ImagePart("messages[2].content[0]", two))


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ({"type": "image_url"}, r"content\[0\].image_url must have a url"),
        ({"type": "image_url", "image_url": {"url": 3}}, "must have a url, got int"),
        ({"type": "image_url", "image_url": ""}, "must have a url, got none"),
        ({"type": "image_url", "image_url": [3], "uuid": "a"}, "must have a url, got list"),
        ({"type": "image_url", "image_url": None}, "must have a url, got none"),
        ({"type": "image_url", "image_url": {"url": None}, "uuid": None}, "must have a url, got none"),
        *(({"type": "image_url", "image_url": "data:", "uuid": uuid}, NO_UUID) for uuid in ("", "a b", "é", "x" * 257)),
        *(({"type": "input_image", "uuid": uuid}, NO_UUID) for uuid in (3, ["x"], {}, "a\n")),
        ({"type": "input_audio"}, "must be a text or an image part, got 'input_audio'"),
    ],
)
def test_parts_that_are_refused(part, told):
    with pytest.raises(InvalidRequest, match=told):
        messages_of(user(part))


def test_a_thousand_images_are_too_many():
    part = {"type": "image_url", "image_url": {"url": uri(file_of())}}
    with pytest.raises(InvalidRequest, match=f"at most {module.MOST_IMAGES} images in all, got 1000") as raised:
        messages_of(user(*[part] * 1000))
    assert str(raised.value).startswith(f"messages[0].content[{module.MOST_IMAGES}]: ")


@pytest.mark.parametrize("nothing", [{}, {"image_url": None}, {"image_url": {"url": None}}, {"image_url": ""}])
def test_a_uuid_may_come_alone(nothing):
    part = image_part({"type": "image_url", "uuid": "https://example.com/a.png"} | nothing, "m")
    assert part == ImagePart("m", uuid="https://example.com/a.png")
    assert part.is_named_only


def test_a_jpeg_of_thousands_of_scans_is_never_decoded(monkeypatch):
    file = io.BytesIO()
    Image.new("L", (64, 64), 9).save(file, "JPEG", progressive=True)
    whole = file.getvalue()
    assert size_of(whole, "m") == (64, 64)
    last = whole.rindex(b"\xff\xda")
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(InvalidRequest, match=f"more than {MOST_SCANS} scans"):
        size_of(whole[:-2] + whole[last:-2] * MOST_SCANS + whole[-2:], "m")


def test_many_large_ones_are_refused_before_any_is_decoded(monkeypatch):
    parts, content = (
        [ImagePart(f"messages[0].content[{i}]", "") for i in range(9)],
        file_of(size=(4000, 4000), mode="1"),
    )
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(InvalidRequest, match=r"^messages\[0\]\.content\[4\]: more than .* in all images together"):
        sizes_of(parts, [content] * 9)


def test_equal_ones_are_decoded_once(monkeypatch):
    opened = []
    load = Image.Image.load
    monkeypatch.setattr(Image.Image, "load", lambda self: opened.append(1) or load(self))
    parts = [ImagePart("m", "") for _ in range(5)]
    assert sizes_of(parts, [file_of()] * 5) == [(6, 4)] * 5
    once = len(opened)
    opened.clear()
    sizes_of(parts[:1], [file_of()])
    assert once == len(opened)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_it_is_turned_as_its_exif_says(orientation):
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (6, 4), 3).save(file, "JPEG", exif=exif)
    assert size_of(file.getvalue(), "m") == ((4, 6) if orientation > 4 else (6, 4))


def test_a_uuid_in_the_wrong_place_is_not_lost():
    """It would not be kept, and the one who repeats it would be told for ever to send the image."""
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "uuid": "mine"}}
    with pytest.raises(InvalidRequest, match=r"messages\[0\].content\[1\].image_url.uuid: a uuid stands beside"):
        image_part(part, "messages[0].content[1]")
