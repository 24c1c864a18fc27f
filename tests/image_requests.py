"""Chats with images, over HTTP and gRPC, before a router that remembers what it is given."""

from __future__ import annotations

import base64
import re
from contextlib import asynccontextmanager

import aiohttp
import grpc
import openai
import pytest

from tercet.roles.gateway.fetching import Fetcher
from tercet.spec import GatewayImagesSpec
from tercet.wire.gen import inference_pb2 as pb
from tercet.wire.gen import inference_pb2_grpc
from tests.fakes.gateway import running
from tests.fakes.images import HOST, SEEING, Names, pictures
from tests.fakes.router import FakeRouter

HOSTS = (HOST, "inside.test", "127.0.0.2")
UNFETCHED, UNCACHED, WRONG = "image_not_fetched", "image_not_cached", "invalid_request"


class Asked:
    """A gateway, its clients, and the files that reached its router."""

    def __init__(self, router, gateway, info, server):
        self.router, self.gateway, self.server = router, gateway, server
        self.url = info.http_url
        self.client = openai.AsyncOpenAI(base_url=f"{info.http_url}/v1", api_key="one", max_retries=0)
        self.other = openai.AsyncOpenAI(base_url=f"{info.http_url}/v1", api_key="other", max_retries=0)
        self.channel = grpc.aio.insecure_channel(info.grpc_address)
        self.stub = inference_pb2_grpc.InferenceStub(self.channel)

    async def files(self, *parts, client=None, **options):
        """Over HTTP. -> the files of the images."""
        messages = [{"role": "user", "content": [*parts]}]
        asked = (client or self.client).chat.completions.create
        await asked(model="fake-model", messages=messages, max_tokens=1, **options)
        return [image.content for image in self.router.requests[-1].images]

    async def grpc_files(self, *parts, files=(), **options):
        chat = pb.Chat(messages=[pb.Message(role="user", content="?", images=files, image_parts=parts)])
        request = pb.GenerateRequest(chat=chat, sampling=pb.Sampling(max_tokens=1))
        assert [answer async for answer in self.stub.Generate(request, **options)]
        return [image.content for image in self.router.requests[-1].images]

    async def metric(self, name):
        async with aiohttp.ClientSession() as session, session.get(f"{self.url}/metrics") as answer:
            found = re.search(rf"^{re.escape(name)} (\S+)", await answer.text(), re.MULTILINE)
        return float(found[1]) if found else 0.0


@asynccontextmanager
async def asking(images=None, model=SEEING, **limits):
    """The address of the server of pictures is as good as a public one."""
    names, router = Names(pictures_test=[["127.0.0.1"]], inside_test=[["127.0.0.2"]]), FakeRouter()
    async with pictures() as server:
        given = {"allowed_media_domains": [f"{host}:{server.port}" for host in HOSTS], "fetch_timeout_s": 1.0} | (
            images or {}
        )

        def fetcher(metrics):
            return Fetcher(GatewayImagesSpec(**given), metrics, names, lambda address: address == "127.0.0.1")

        async with running(router, model=model, images=given, fetcher=fetcher, **limits) as (gateway, info):
            asked = Asked(router, gateway, info, server)
            try:
                yield asked
            finally:
                await asked.client.close()
                await asked.other.close()
                await asked.channel.close()


def by_url(url, uuid=None):
    return {"type": "image_url", "image_url": {"url": url}} | ({"uuid": uuid} if uuid else {})


def by_file(content, uuid=None):
    return by_url(f"data:image/png;base64,{base64.b64encode(content).decode()}", uuid)


def by_uuid(uuid, nothing=None):
    return {"type": "image_url", "image_url": nothing, "uuid": uuid}


async def refused(answer, code, told):
    """However it was asked."""
    with pytest.raises((openai.APIStatusError, grpc.aio.AioRpcError)) as raised:
        await answer
    if isinstance(raised.value, openai.APIStatusError):
        assert 400 <= raised.value.status_code < 500
        assert raised.value.status_code == (404 if code == UNCACHED else 400)
        got, message = raised.value.body["code"], raised.value.body["message"]
    else:
        statuses = grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT
        assert raised.value.code() is statuses[code != UNCACHED]
        got, _, message = raised.value.details().partition(": ")
    assert (got, message[: len(told)]) == (code, told)
    assert "secret" not in message
    return message
