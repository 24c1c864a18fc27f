"""Images by uuid, over HTTP and gRPC: the gateway keeps what a client has named, for that client alone."""

from __future__ import annotations

import asyncio

import pytest

from tercet.roles.gateway.clients import anybody
from tercet.roles.gateway.image_files import ENTRY_BYTES
from tercet.wire.gen import inference_pb2 as pb
from tests.fakes.images import moved, picture
from tests.image_requests import UNCACHED, WRONG, asking, by_file, by_url, by_uuid, refused

MISSING = "messages[0].content[0]: no image is cached for uuid 'mine'; send the image with it"


@pytest.mark.parametrize("nothing", [None, {"url": None}, {"url": ""}, ""])
async def test_a_repeat_sends_the_uuid_alone(nothing):
    async with asking() as asked:
        await refused(asked.files(by_uuid("mine", nothing)), UNCACHED, MISSING)
        assert await asked.files(by_file(picture(5), "mine")) == [picture(5)]
        assert await asked.files(by_file(picture(6)), by_uuid("mine", nothing)) == [picture(6), picture(5)]
        assert await asked.files({"type": "input_image", "uuid": "mine"}) == [picture(5)]
        assert await asked.metric('tercet_image_uuids_total{result="hit"}') == 2
        assert await asked.metric('tercet_image_uuids_total{result="miss"}') == 1
        assert await asked.metric("tercet_image_cache_bytes") > len(picture(5))


async def test_over_grpc():
    async with asking() as asked:
        alone = pb.ImagePart(uuid="mine")
        await refused(asked.grpc_files(alone), UNCACHED, MISSING)
        assert await asked.grpc_files(pb.ImagePart(file=picture(5), uuid="mine")) == [picture(5)]
        assert await asked.grpc_files(alone, files=[picture(6)]) == [picture(6), picture(5)]
        await refused(asked.grpc_files(pb.ImagePart()), WRONG, "messages[0].content[0].image_url must have a url")
        await refused(asked.grpc_files(pb.ImagePart(uuid="a b")), WRONG, "messages[0].content[0].uuid must be")


async def test_a_client_is_the_same_over_http_and_grpc():
    async with asking() as asked:
        await asked.files(by_file(picture(5), "mine"))
        key = [("authorization", "Bearer one")]
        assert await asked.grpc_files(pb.ImagePart(uuid="mine"), metadata=key) == [picture(5)]


async def test_no_client_gets_another_ones_image():
    async with asking() as asked:
        await asked.files(by_file(picture(5), "mine"))
        await refused(asked.files(by_uuid("mine"), client=asked.other), UNCACHED, MISSING)
        await refused(asked.grpc_files(pb.ImagePart(uuid="mine")), UNCACHED, MISSING)  # without a key: by its address
        await asked.files(by_file(picture(6), "mine"), client=asked.other)
        assert await asked.files(by_uuid("mine")) == [picture(5)]
        assert await asked.files(by_uuid("mine"), client=asked.other) == [picture(6)]


async def test_another_image_under_the_same_uuid_counts_from_then_on():
    async with asking() as asked:
        await asked.files(by_file(picture(5), "mine"))
        one, two, alone = by_file(picture(6), "mine"), by_file(picture(7), "mine"), by_uuid("mine")
        assert await asked.files(alone, one, alone, two, alone) == [picture(n) for n in (5, 6, 6, 7, 7)]
        assert await asked.files(alone) == [picture(7)]


async def test_an_image_that_was_asked_for_does_not_come_back_over_a_newer_one():
    async with asking() as asked:
        await asked.files(by_file(picture(5), "mine"))
        asked.server.pages["/slow"] = page = asyncio.Event()

        async def answer(request):
            await page.wait()
            return await moved("/a.png")(request)

        asked.server.pages["/slow"] = answer
        old = asyncio.create_task(asked.files(by_uuid("mine"), by_url(asked.server.url("/slow"))))
        while not asked.server.reading:
            await asyncio.sleep(0.01)
        await asked.files(by_file(picture(6), "mine"))
        page.set()
        assert await old == [picture(5), picture(1)]
        assert await asked.files(by_uuid("mine")) == [picture(6)]


async def test_an_address_with_a_uuid_is_fetched_once():
    async with asking() as asked:
        url = asked.server.url("/a.png")
        assert await asked.files(by_url(url, url), by_uuid(url)) == [picture(1)] * 2
        asked.server.pages["/a.png"] = picture(9)
        assert await asked.files(by_uuid(url)) == [picture(1)]
        assert len(asked.server.asked) == 1
        assert await asked.files(by_url(url, url)) == [picture(9)]  # it may be another image by now
        assert await asked.files(by_uuid(url)) == [picture(9)]


async def test_what_could_not_be_decoded_is_not_kept():
    async with asking() as asked:
        await asked.files(by_file(picture(5), "mine"))
        broken = by_file(picture(6, (300, 300))[:-40], "mine")
        await refused(asked.files(broken), WRONG, "messages[0].content[0]: the image cannot be read")
        await refused(asked.files(by_file(picture(7), "good"), broken), WRONG, "messages[0].content[1]: ")
        assert await asked.files(by_uuid("mine")) == [picture(5)]
        await refused(asked.files(by_uuid("good")), UNCACHED, "messages[0].content[0]: no image is cached")


async def test_the_cache_has_a_budget():
    """Three images, of which the one that was not asked for goes first."""
    entry = len(picture()) + len(anybody(b"Bearer one", "").client) + 1 + ENTRY_BYTES
    async with asking({"cache_bytes": 3 * entry}) as asked:
        for name in "abc":
            await asked.files(by_file(picture(5), name))
        await asked.files(by_uuid("a"))
        await asked.files(by_file(picture(6), "d"))
        await refused(asked.files(by_uuid("b")), UNCACHED, "messages[0].content[0]: no image is cached for uuid 'b'")
        assert await asked.files(*map(by_uuid, "acd")) == [picture(5), picture(5), picture(6)]
        assert await asked.metric("tercet_image_cache_bytes") == 3 * entry


async def test_it_may_be_off():
    async with asking({"cache_bytes": 0}) as asked:
        assert await asked.files(by_file(picture(5), "mine")) == [picture(5)]
        await refused(asked.files(by_uuid("mine")), UNCACHED, MISSING)
