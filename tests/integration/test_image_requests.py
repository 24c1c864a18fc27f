"""Images by address, over HTTP and gRPC: what a model gets, and what is refused by its place."""

from __future__ import annotations

import asyncio
import io
import struct
import time
import zlib

import openai
import pytest
from PIL import Image

from tercet.wire.gen import inference_pb2 as pb
from tests.fakes.gateway import running
from tests.fakes.images import SEEING, moved, picture, pictures, streamed
from tests.fakes.router import FakeRouter
from tests.fakes.tokenizer import MODEL
from tests.image_requests import HOSTS, UNCACHED, UNFETCHED, WRONG, Asked, asking, by_file, by_url, by_uuid, refused


async def test_addresses():
    async with asking() as asked:
        url = asked.server.url
        assert await asked.files(by_url(url("/a.png")), by_file(picture(9)), by_url(url("/b.png"))) == [
            *(picture(1), picture(9), picture(2))
        ]
        assert await asked.files({"type": "input_image", "image_url": url("/a.png")}) == [picture(1)]
        parts = [pb.ImagePart(url=url("/b.png")), pb.ImagePart(file=picture(8)), pb.ImagePart(url=by_file(b"")["type"])]
        assert await asked.grpc_files(*parts[:2], files=[picture(7)]) == [picture(7), picture(2), picture(8)]
        await refused(asked.grpc_files(*parts), WRONG, "messages[0].content[2]: must be a data URI")


async def test_equal_addresses_are_fetched_once():
    async with asking() as asked:
        one, two = asked.server.url("/a.png"), asked.server.url("/b.png")
        files = [picture(1), picture(2), picture(1), picture(1)]
        assert await asked.files(*map(by_url, (one, two, one, one))) == files
        assert sorted(request.path for request in asked.server.asked) == ["/a.png", "/b.png"]


async def test_it_is_off_by_default():
    router = FakeRouter()
    async with running(router, model=SEEING) as (gateway, info), pictures() as server:
        asked = Asked(router, gateway, info, server)
        told = (
            "messages[0].content[1]: images are not fetched here, since gateway.images.allowed_media_domains is empty"
        )
        parts = [by_file(picture()), by_url(server.url("/a.png"))]
        await refused(asked.files(*parts), UNFETCHED, told)
        await refused(asked.grpc_files(pb.ImagePart(url=server.url("/a.png")), files=[b""]), UNFETCHED, told)
        await asked.client.close()
        await asked.channel.close()
    assert server.asked == []


async def test_a_model_that_takes_none_has_none_fetched():
    async with asking(model=MODEL) as asked:
        told = "messages[0].content[0]: the model fake-model takes no images"
        await refused(asked.files(by_url(asked.server.url("/a.png"))), WRONG, told)
        assert asked.server.asked == []


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "0.0.0.0", "2130706433", "0x7f000001", "127.1", "017700000001"]
)
async def test_production_refuses_what_is_inside(host):
    """The gateway as it is served: its own names, its own judgement, each host among the allowed ones."""
    router = FakeRouter()
    async with pictures() as server:
        listed = [] if host == "[::1]" else [f"{host}:{server.port}"]
        images = {"allowed_media_domains": [*listed, "example.com"]}
        async with running(router, model=SEEING, images=images) as (gateway, info):
            asked = Asked(router, gateway, info, server)
            url = server.url("/a.png", host)
            for answer in (asked.files(by_url(url)), asked.grpc_files(pb.ImagePart(url=url))):
                await refused(answer, UNFETCHED, "messages[0].content[0]: ")
            assert await asked.metric('tercet_image_fetches_total{result="refused"}') == 2
            await asked.client.close()
            await asked.channel.close()
        assert server.asked == []


async def test_a_redirect_to_what_is_inside():
    async with asking() as asked:
        for host in HOSTS[1:]:
            asked.server.pages["/x"] = moved(asked.server.url("/a.png", host))
            told = f"messages[0].content[0]: {host} is at no public address"
            await refused(asked.files(by_url(asked.server.url("/x"))), UNFETCHED, told)
        assert [request.path for request in asked.server.asked] == ["/x", "/x"]


def head(width, height):
    """Of a PNG whose content does not follow."""
    first = b"IHDR" + struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    chunks = [
        struct.pack(">I", len(each) - 4) + each + struct.pack(">I", zlib.crc32(each)) for each in (first, b"IDAT")
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def bomb():
    file = io.BytesIO()
    Image.new("1", (9000, 9000)).save(file, "PNG")
    return file.getvalue()


FILES = {
    "bomb": (bomb(), "an image of 9000 x 9000"),
    "truncated": (picture(size=(300, 300))[:-40], "the image cannot be read"),
    "0 x 0": (head(0, 0), ""),
    "100,000 x 100,000": (head(100_000, 100_000), "an image of 100000 x 100000"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is no image; PNG"),
    "html": (b"<!doctype html><title>the secret of this page</title>", "is no image; PNG"),
    "tiff": (picture(kind="TIFF"), "is no image; PNG"),
    "bmp": (picture(kind="BMP"), "is no image; PNG"),
    "nothing": (b"", "is no image; PNG"),
}


@pytest.mark.parametrize("kind", FILES)
async def test_files_that_are_refused_however_they_come(kind):
    content, told = FILES[kind]
    told = f"messages[0].content[1]: {told}"
    async with asking() as asked:
        asked.server.pages["/x"] = content
        whole, url = by_file(picture()), asked.server.url("/x")
        for part in (by_file(content), by_url(url), by_file(content, "mine"), by_url(url, "mine")):
            if content or part["image_url"]["url"] == url:
                await refused(asked.files(whole, part), WRONG, told)
        for part in (pb.ImagePart(file=content), pb.ImagePart(url=url), pb.ImagePart(file=content, uuid="mine")):
            await refused(asked.grpc_files(part, files=[picture()]), WRONG, told)
        await refused(asked.grpc_files(files=[picture(), content]), WRONG, told)
        await refused(asked.files(by_uuid("mine")), UNCACHED, "messages[0].content[0]: no image is cached")
        assert asked.router.requests == []


@pytest.mark.parametrize(
    ("page", "told"),
    [
        (streamed(b"x" * 65536), "the image has more than 1,000,000 bytes (gateway.images.max_fetch_bytes)"),
        (streamed(b"x", pause_s=0.05), "the image did not come within 1 s (gateway.images.fetch_timeout_s)"),
        (moved("/x"), "more than 3 redirects (gateway.images.max_redirects)"),
        (moved("/x", 404), "pictures.test answered with status 404"),
    ],
)
async def test_servers_that_do_wrong(page, told):
    async with asking({"max_fetch_bytes": 1_000_000}) as asked:
        asked.server.pages["/x"] = page
        url = asked.server.url("/x")
        await refused(asked.files(by_file(picture()), by_url(url)), UNFETCHED, f"messages[0].content[1]: {told}")
        await refused(asked.grpc_files(pb.ImagePart(url=url)), UNFETCHED, f"messages[0].content[0]: {told}")
        assert await asked.files(by_url(asked.server.url("/a.png"))) == [picture(1)]


async def test_a_thousand_images():
    async with asking() as asked:
        url = asked.server.url("/a.png")
        told = "messages[0].content[64]: messages take at most 64 images in all, got 1000"
        await refused(asked.files(*[by_url(url)] * 1000), WRONG, told)
        await refused(asked.grpc_files(*[pb.ImagePart(url=url)] * 1000), WRONG, told)
        assert asked.server.asked == []


async def test_a_client_that_goes_ends_its_fetches():
    async with asking({"fetch_timeout_s": 60.0}) as asked:
        asked.server.pages["/x"] = streamed(b"x", pause_s=0.01)
        parts = [by_url(asked.server.url(f"/x?{i}")) for i in range(3)]
        for ask in (asked.files(*parts), asked.grpc_files(*(pb.ImagePart(url=p["image_url"]["url"]) for p in parts))):
            going = asyncio.create_task(ask)
            while asked.server.reading < 3:
                await asyncio.sleep(0.01)
            assert asked.gateway.status()["inflight"] == 1
            going.cancel()
            async with asyncio.timeout(5):
                while asked.server.reading or asked.gateway.status()["inflight"]:
                    await asyncio.sleep(0.01)
        assert asked.router.requests == []
        assert asked.gateway._images.all_held == 0


async def test_the_first_failure_ends_the_other_fetches():
    async with asking({"fetch_timeout_s": 60.0}) as asked:
        asked.server.pages["/x"] = streamed(b"x", pause_s=0.01)
        parts, began = [by_url(asked.server.url(path)) for path in ("/x", "/none", "/x?2")], time.monotonic()
        await refused(asked.files(*parts), UNFETCHED, "messages[0].content[1]: pictures.test answered with status 404")
        async with asyncio.timeout(5):
            while asked.server.reading:
                await asyncio.sleep(0.01)
        assert time.monotonic() - began < 5


async def test_a_request_ends_at_its_deadline_while_it_fetches():
    async with asking({"fetch_timeout_s": 60.0}) as asked:
        asked.server.pages["/x"] = streamed(b"x", pause_s=0.01)
        url, began = asked.server.url("/x"), time.monotonic()
        with pytest.raises(openai.APIStatusError) as raised:
            await asked.files(by_url(url), extra_body={"timeout": 0.3})
        assert (raised.value.status_code, raised.value.body["code"]) == (504, "deadline_exceeded")
        assert time.monotonic() - began < 5


async def test_what_is_fetched_is_held_in_bounded_memory():
    """By all requests together, while it comes and until the answer's end."""
    async with asking({"max_fetch_bytes": 1 << 20}, max_held_bytes=1 << 20, max_body_bytes=1 << 16) as asked:
        asked.router.gate = asyncio.Event()
        body = picture() + bytes(700_000)  # what follows a picture's end is not read
        asked.server.pages |= {"/x": body, "/y": body + b"y"}
        first = asyncio.create_task(asked.files(by_url(asked.server.url("/x"))))
        while not asked.router.requests:
            await asyncio.sleep(0.01)
        with pytest.raises(openai.InternalServerError) as raised:
            await asked.files(by_url(asked.server.url("/y")))
        assert (raised.value.status_code, raised.value.body["code"]) == (503, "overloaded")
        assert "messages[0].content[0]: images of" not in str(raised.value)
        asked.router.gate.set()
        assert await first == [body]
        assert await asked.files(by_url(asked.server.url("/y"))) == [body + b"y"]
        assert asked.gateway._images.all_held == 0


async def test_a_request_has_no_more_bytes_than_a_worker_takes():
    async with asking({"max_fetch_bytes": 9 << 20}, max_held_bytes=1 << 30) as asked:
        asked.server.pages["/x"] = picture() + bytes(8 << 20)
        told = "the images of a request have at most 33,554,432 bytes in all"
        url = asked.server.url("/x")
        assert len(await asked.files(*[by_url(url)] * 3)) == 3
        await refused(asked.files(*[by_url(url)] * 4), WRONG, told)
        await refused(asked.files(*(by_url(f"{url}?{i}") for i in range(4))), WRONG, "messages[0].content[")
        assert asked.gateway._images.all_held == 0


async def test_fetches_are_counted():
    async with asking() as asked:
        await asked.files(by_url(asked.server.url("/a.png")))
        await refused(
            asked.files(by_url(asked.server.url("/none"))), UNFETCHED, "messages[0].content[0]: pictures.test"
        )
        assert await asked.metric('tercet_image_fetches_total{result="fetched"}') == 1
        assert await asked.metric('tercet_image_fetches_total{result="failed"}') == 1
        assert await asked.metric("tercet_image_fetches_running") == 0
        assert await asked.metric(f'tercet_request_failure_total{{code="{UNFETCHED}"}}') == 1
