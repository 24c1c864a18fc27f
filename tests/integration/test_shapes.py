"""configs/local-vision.yaml through real workers and a gateway: right answers about pictures that the training of its
tower did not see, with the text model's weights in every form that they may have."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from examples.ask_shapes import is_right, message
from examples.shapes.pictures import HELD_OUT, seen
from examples.shapes.questions import QUESTIONS
from tercet.client import Client
from tercet.cluster.spec_file import load_spec
from tercet.errors import InvalidRequest
from tercet.roles.gateway.gateway import Gateway
from tests.few import few
from tests.helpers import TOKEN, cluster
from tests.machine import ROOT

FIRST = HELD_OUT + 1000


class Seeing:
    """A client of a gateway over real workers, in this process."""

    def __init__(self, *settings, spec="local-vision"):
        anywhere = ("gateway.http.port=0", "gateway.grpc.port=0")
        self._spec = load_spec(ROOT / f"configs/{spec}.yaml", [*anywhere, *settings])

    async def __aenter__(self):
        self._cluster = cluster(self._spec)
        made = await self._cluster.__aenter__()
        self._gateway = Gateway(self._spec, TOKEN, made.router)
        return Client((await self._gateway.start()).http_url)

    async def __aexit__(self, *raised):
        await self._gateway.stop()
        await self._cluster.__aexit__(*raised)


@pytest.mark.parametrize(("dtype", "count"), few([("float32", 4), ("float32", 10), ("bfloat16", 10), ("gguf", 10)], 1))
async def test_answers_are_right(dtype, count, monkeypatch):
    monkeypatch.chdir(ROOT)
    pictures = range(FIRST, FIRST + count)
    async with Seeing(f"model.dtype={dtype}") as client:
        asked = [(kind, seed) for kind in QUESTIONS for seed in pictures]
        right = dict(zip(asked, [await asyncio.to_thread(is_right, client, *each) for each in asked], strict=True))
    for kind in QUESTIONS:
        assert sum(right[kind, seed] for seed in pictures) >= count - count // 10, (kind, right)


async def test_a_text_is_answered_as_without_the_tower(monkeypatch):
    monkeypatch.chdir(ROOT)
    question, options = "What is the capital of France?", {"temperature": 0, "max_tokens": 8}
    async with Seeing() as client:
        seeing = await asyncio.to_thread(client.chat, question, **options)
    async with Seeing("roles.decode.replicas=1", spec="local") as client:
        bare = await asyncio.to_thread(client.chat, question, **options)
    assert seeing.token_ids == bare.token_ids
    assert seeing.text == bare.text
    assert "Paris" in bare.text


async def test_the_client_shows_files(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    scene, image = seen(FIRST)
    image.save(file := tmp_path / "a.png")
    async with Seeing() as client:
        ask = partial(client.chat, "What colour is it?", images=[file], temperature=0, max_tokens=20)
        assert scene.colour in (await asyncio.to_thread(ask)).text
        with pytest.raises(InvalidRequest, match="in messages they are parts"):
            client.chat([{"role": "user", "content": "What?"}], images=[file])
        with pytest.raises(InvalidRequest, match="cannot be read"):
            client.stream("What?", images=[tmp_path / "none.png"])


async def test_a_later_turn_still_sees(monkeypatch):
    monkeypatch.chdir(ROOT)
    _, image = seen(FIRST)
    async with Seeing() as client:
        turns = [message(image, "What is in the picture?")]
        for question in ("What colour is it?", "What colour is it?"):
            said = await asyncio.to_thread(client.chat, turns, temperature=0, max_tokens=40)
            turns += [{"role": "assistant", "content": said.text}, {"role": "user", "content": question}]
    colour = seen(FIRST)[0].colour
    assert colour in said.text
