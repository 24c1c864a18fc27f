"""Chat with images over HTTP, real workers behind it: the tokens that transformers gives for the same messages."""

from __future__ import annotations

import asyncio
import base64
import io
from functools import partial

import grpc
import openai
import pytest
import tokenizers
import torch
import transformers
from PIL import Image
from rich.console import Console
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tercet.client import Client, chat_loop, image_part
from tercet.errors import InvalidRequest
from tercet.roles.gateway.fetching import Fetcher
from tercet.roles.gateway.gateway import Gateway
from tercet.spec import GatewayImagesSpec, GatewaySpec, ListenSpec
from tercet.wire.gen import inference_pb2 as pb
from tercet.wire.gen import inference_pb2_grpc
from tests.fakes.images import Names
from tests.fakes.images import pictures as serving
from tests.helpers import TOKEN, cluster, spec_of
from tests.tiny import tiny_model
from tests.unit.test_models_vision import QWEN25, SIGLIP, TEXT, mrope, pictures

NEW = 6
TEXTS = TEXT | {"vocab_size": 320}
FIRST = 256  # id of the first token that is no byte
SHOWN = {  # kind -> what the template writes for an image
    "qwen": "<|vision_start|><|image_pad|><|vision_end|>",
    "idefics3": "<image>",
}
SPECIAL = {
    "qwen": ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<end>"],
    "idefics3": [
        *("<image>", "<fake_token_around_image>", "<global-img>", "<end>", "<end_of_utterance>"),
        *(f"<row_{r + 1}_col_{c + 1}>" for r in range(3) for c in range(3)),
    ],
}
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}SHOWN{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "{% endfor %}[assistant]"
)


class Served:
    """A random model that sees, with a tokenizer of bytes."""

    def __init__(self, kind, directory):
        self.kind, self.directory = kind, directory
        torch.manual_seed(5)
        if kind == "qwen":
            names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
            vision = QWEN25 | {"window_size": 24, "fullatt_block_indexes": [1], "initializer_range": 0.3}
            config = transformers.Qwen2_5_VLConfig(
                text_config=TEXTS | mrope([2, 3, 3]),
                vision_config=vision,
                **{name: FIRST + i for i, name in enumerate(names)},
            )
            processor = transformers.models.qwen2_vl.Qwen2VLImageProcessorPil(
                size={"shortest_edge": 64, "longest_edge": 2048}, patch_size=4
            )
        else:
            config = transformers.Idefics3Config(
                text_config=TEXTS | {"model_type": "llama"}, vision_config=SIGLIP, image_token_id=FIRST, scale_factor=2
            )
            processor = transformers.models.idefics3.Idefics3ImageProcessorPil(
                size={"longest_edge": 48}, max_image_size={"longest_edge": 24}
            )
        self.model = transformers.AutoModelForImageTextToText.from_config(config).eval()
        self.model.save_pretrained(directory)
        self.processor = processor
        processor.save_pretrained(directory)
        self.tokenizer = self._tokenizer()
        self.tokenizer.save_pretrained(directory)

    def _tokenizer(self):
        letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        backend = tokenizers.Tokenizer(models.BPE(letters, []))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        backend.add_special_tokens(SPECIAL[self.kind])
        template = TEMPLATE.replace("SHOWN", SHOWN[self.kind])
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", chat_template=template)

    def answer(self, text, images):
        """Of transformers; text: the prompt, with what the template writes for each image. -> prompt's ids, tokens."""
        if self.kind == "qwen":
            inputs = self.processor(images=images, return_tensors="pt")
            pieces = text.split("<|image_pad|>")
            counts = [int(grid.prod()) // 4 for grid in inputs["image_grid_thw"]]
            text = pieces[0] + "".join("<|image_pad|>" * n + p for n, p in zip(counts, pieces[1:], strict=True))
            inputs["input_ids"] = self.tokenizer(text, return_tensors="pt")["input_ids"]
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == FIRST).int()
        else:
            whole = transformers.Idefics3Processor(self.processor, self.tokenizer, image_seq_len=9)
            inputs = whole(text=text, images=[images], return_tensors="pt")
        ids = inputs.pop("input_ids")
        inputs.pop("attention_mask", None)
        with torch.no_grad():
            made = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, **inputs
            )
        return ids[0].tolist(), made[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="module", params=["qwen", "idefics3"])
def served(request, tmp_path_factory):
    return Served(request.param, tmp_path_factory.mktemp("model"))


def part_of(picture, kind="PNG"):
    file = io.BytesIO()
    picture.save(file, kind)
    url = f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def text(words):
    return {"type": "text", "text": words}


async def asked(client, messages, **options):
    return await client.chat.completions.create(
        model="seeing",
        messages=messages,
        temperature=0,
        max_tokens=NEW,
        extra_body={"ignore_eos": True, "return_token_ids": True},
        **options,
    )


class Running:
    def __init__(self, topology, source, fetcher=None):
        self._fetcher = fetcher
        self._spec, self._source = spec_of(topology, decoders=1, source=str(source)), source

    async def __aenter__(self):
        self._cluster = cluster(self._spec)
        made = await self._cluster.__aenter__()
        anywhere = GatewaySpec(http=ListenSpec(port=0), grpc=ListenSpec(port=0))
        model = made.spec.model.model_copy(update={"served_name": "seeing"})
        spec = made.spec.model_copy(update={"gateway": anywhere, "model": model})
        self._gateway = Gateway(spec, TOKEN, made.router, fetcher=self._fetcher)
        info = await self._gateway.start()
        self.grpc_address = info.grpc_address
        self._client = openai.AsyncOpenAI(base_url=f"{info.http_url}/v1", api_key="none", max_retries=0)
        return self._client

    async def __aexit__(self, *raised):
        await self._client.close()
        await self._gateway.stop()
        await self._cluster.__aexit__(*raised)


@pytest.mark.parametrize("topology", ["pd", "aggregated"])
async def test_tokens_are_transformers(topology, served):
    one, two, three, four = pictures(4)
    shown = SHOWN[served.kind]
    conversations = [
        (
            [{"role": "user", "content": [part_of(one), text("What is it?")]}],
            f"[user]{shown}What is it?[assistant]",
            [one],
        ),
        (
            [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [text("First "), part_of(two, "WEBP"), text(" then "), part_of(three)]},
                {"role": "assistant", "content": "Yes"},
                {"role": "user", "content": [part_of(four), text("and this?")]},
            ],
            f"[system]Be brief.[user]First {shown} then {shown}[assistant]Yes[user]{shown}and this?[assistant]",
            [Image.open(io.BytesIO(base64.b64decode(part_of(two, "WEBP")["image_url"]["url"][23:]))), three, four],
        ),
    ]
    async with Running(topology, served.directory) as client:
        for messages, prompt, images in conversations:
            ids, tokens = served.answer(prompt, images)
            whole = await asked(client, messages)
            assert whole.model_extra["prompt_token_ids"] == ids
            assert whole.choices[0].model_extra["token_ids"] == tokens
            assert whole.usage.prompt_tokens == len(ids)
            chunks = [chunk async for chunk in await asked(client, messages, stream=True)]
            streamed = [i for chunk in chunks for c in chunk.choices for i in c.model_extra.get("token_ids") or ()]
            assert streamed == tokens


async def test_grpc_takes_files(served):
    one, two = pictures(2)
    files = [base64.b64decode(part_of(each)["image_url"]["url"].partition(",")[2]) for each in (one, two)]
    shown = SHOWN[served.kind]
    ids, tokens = served.answer(f"[user]{shown}{shown}What?[assistant]", [one, two])
    running = Running("aggregated", served.directory)
    sampling = pb.Sampling(max_tokens=NEW, temperature=0.0, ignore_eos=True)
    async with running, grpc.aio.insecure_channel(running.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        chat = pb.Chat(messages=[pb.Message(role="user", content="What?", images=files)])
        answers = [answer async for answer in stub.Generate(pb.GenerateRequest(chat=chat, sampling=sampling))]
        assert [i for answer in answers for i in answer.delta.token_ids] == tokens
        assert answers[-1].done.prompt_tokens == len(ids)
        broken = pb.Chat(messages=[pb.Message(role="user", images=[files[0][:40]])])
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await anext(aiter(stub.Generate(pb.GenerateRequest(chat=broken))))
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "messages[0].content[0]: " in raised.value.details()


async def test_by_address_and_by_uuid(served):
    """The same tokens, however an image comes."""
    one, two = pictures(2)
    shown = SHOWN[served.kind]
    _, tokens = served.answer(f"[user]{shown}{shown}What?[assistant]", [one, two])
    names = Names(pictures_test=[["127.0.0.1"]])
    async with serving() as server:
        server.pages["/a.png"] = base64.b64decode(part_of(one)["image_url"]["url"].partition(",")[2])
        allowed = GatewayImagesSpec(allowed_media_domains=[f"pictures.test:{server.port}"])
        fetcher = partial(Fetcher, allowed, resolver=names, public=lambda address: address == "127.0.0.1")
        first = {"type": "image_url", "image_url": {"url": server.url("/a.png")}, "uuid": "one"}
        repeat = {"type": "image_url", "image_url": None, "uuid": "one"}
        async with Running("aggregated", served.directory, fetcher) as client:
            for part in (first, repeat):
                content = [part, part_of(two), text("What?")]
                whole = await asked(client, [{"role": "user", "content": content}])
                assert whole.choices[0].model_extra["token_ids"] == tokens


async def test_what_is_wrong_is_told_by_its_place(served):
    [one] = pictures(1)
    broken = part_of(one)
    broken["image_url"]["url"] = broken["image_url"]["url"][:200]
    async with Running("aggregated", served.directory) as client:
        for parts, told in (
            (
                [text("a"), {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}],
                "messages[0].content[1]: images are not fetched here",
            ),
            ([text("a"), {"type": "image_url", "image_url": {"url": "file:///a.png"}}], "must be a data URI"),
            ([part_of(one), broken], "messages[0].content[1]: "),
            ([part_of(one)] * 65, "at most 64 images"),
            ([part_of(Image.new("RGB", (400, 1)))] if served.kind == "qwen" else [broken], ""),
        ):
            with pytest.raises(openai.BadRequestError) as raised:
                await asked(client, [{"role": "user", "content": parts}])
            assert told in str(raised.value)
        long = [part_of(one)] * 60
        with pytest.raises(openai.BadRequestError) as raised:
            await asked(client, [{"role": "user", "content": [text("x" * 1500), *long]}])
        assert raised.value.body["code"] == "context_too_long"
        said = SHOWN[served.kind]  # a user's text is no image
        answer = await asked(client, [{"role": "user", "content": said}])
        assert FIRST not in answer.model_extra["prompt_token_ids"]


async def test_a_model_that_takes_none_says_so():
    async with Running("aggregated", tiny_model()) as client:
        with pytest.raises(openai.BadRequestError, match="the model seeing takes no images"):
            await asked(client, [{"role": "user", "content": [part_of(pictures(1)[0])]}])


async def test_the_client_shows_files(served, tmp_path):
    """As `tercet chat QUESTION --image FILE` does."""
    [one] = pictures(1)
    file = tmp_path / "a.PNG"
    one.save(file)
    async with Running("aggregated", served.directory) as client:
        base = str(client.base_url).removesuffix("/v1/")
        _, tokens = served.answer(f"[user]{SHOWN[served.kind]}What?[assistant]", [one])
        console = Console(width=200, record=True, file=io.StringIO())
        options = {"temperature": 0, "max_tokens": NEW, "ignore_eos": True}
        asked_once = partial(chat_loop, Client(base), console, "What?", [file], **options)
        assert await asyncio.to_thread(asked_once)
        assert console.export_text().rstrip("\n") == served.tokenizer.decode(tokens, skip_special_tokens=True).rstrip(
            "\n"
        )
    with pytest.raises(InvalidRequest, match=r"none\.png: cannot be read"):
        image_part(tmp_path / "none.png")
