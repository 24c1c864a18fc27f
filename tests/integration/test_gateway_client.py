"""tercet.Client and the chat loop against a real gateway, from another thread, as users run them."""

import asyncio
import io
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from rich.console import Console

import tercet
from tercet.client import chat_loop
from tercet.errors import ContextTooLong, DeadlineExceeded, InvalidRequest, NoWorkers, WorkerLost
from tests.certificates import Authority
from tests.fakes.gateway import running
from tests.fakes.router import TIMES, FakeRouter
from tests.fakes.tokenizer import EOS

SAYS = "The capital of France is Paris."


@pytest.fixture
async def router():
    return FakeRouter(SAYS)


@pytest.fixture
async def client(router):
    async with running(router) as (_, info):
        yield tercet.Client(info.http_url)


async def test_chat(client, router):
    result = await asyncio.to_thread(client.chat, "What is it?", temperature=0, return_token_ids=True)
    assert (result.text, result.finish_reason) == (SAYS, "stop")
    assert result.token_ids == (*SAYS.encode(), EOS)
    assert result.usage["completion_tokens"] == len(SAYS) + 1
    assert result.timings["kv_bytes"] == TIMES.kv_bytes
    assert bytes(router.requests[0].token_ids) == b"<u>What is it?<a>"


async def test_generate_from_text_and_token_ids(client, router):
    router.script = lambda request: bytes(request.token_ids).upper()
    assert (await asyncio.to_thread(client.generate, "ab")).text == "AB"
    assert (await asyncio.to_thread(client.generate, list(b"cd"))).text == "CD"


async def test_stream(client):
    def run():
        stream = client.stream("What is it?", max_tokens=5)
        return list(stream), stream.result

    pieces, result = await asyncio.to_thread(run)
    assert pieces == list("The c")
    assert (result.text, result.finish_reason) == ("The c", "length")
    assert result.timings["workers"]["decode"] == "decode-1"
    assert result.usage["total_tokens"] > 5


async def test_closing_a_stream_aborts_the_request(client, router):
    router.delay_s = 0.01

    def run():
        with client.stream_generate("x", ignore_eos=True, max_tokens=100) as stream:
            return next(iter(stream))

    assert await asyncio.to_thread(run) == "T"
    while not router.aborted:
        await asyncio.sleep(0.005)


async def test_errors_have_their_class(client, router):
    with pytest.raises(InvalidRequest, match="temperature must be"):
        await asyncio.to_thread(client.chat, "x", temperature=-1)
    with pytest.raises(ContextTooLong):
        await asyncio.to_thread(client.stream, "x" * 500)
    router.error, router.error_after = WorkerLost("decode-1 died"), 3
    with pytest.raises(WorkerLost, match="decode-1 died"):
        await asyncio.to_thread(lambda: list(client.stream("x")))


def test_nothing_at_the_address():
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        with pytest.raises(NoWorkers, match="cannot reach"):
            tercet.Client(f"http://127.0.0.1:{unheard.getsockname()[1]}").models()


async def test_https_where_no_tls_is_spoken(router):
    async with running(router) as (_, info):
        with pytest.raises(NoWorkers, match="may speak no TLS: try http://"):
            await asyncio.to_thread(tercet.Client(info.http_url.replace("http", "https")).models)


@pytest.mark.parametrize(
    ("identity", "told"), [("localhost", "ask it by a name that its certificate has"), ("127.0.0.1", "")]
)
def test_a_certificate_is_for_a_name(tmp_path, identity, told):
    authority = Authority(tmp_path)
    files = authority.gateway(identity)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        url = f"https://127.0.0.1:{server.getsockname()[1]}"
        asked = pool.submit(tercet.Client(url, ca=authority.path).models)
        with server.accept()[0] as connection, suppress(OSError):
            context.wrap_socket(connection, server_side=True).close()
        with pytest.raises(NoWorkers) as caught:
            asked.result()
    assert told in str(caught.value)
    assert ("certificate" in str(caught.value)) == bool(told)


@pytest.mark.parametrize(
    "url", ["localhost:8000", "http://h:99999", "http://h:x", "http://h:0", "http://[::1", "http://a b"]
)
def test_an_address_that_is_none(url):
    with pytest.raises(InvalidRequest, match="base_url"):
        tercet.Client(url)


@pytest.mark.parametrize("ask", [tercet.Client.models, tercet.Client.is_ready])
@pytest.mark.parametrize(("closes", "raised"), [(True, WorkerLost), (False, DeadlineExceeded)])
def test_an_answer_that_ends_too_early(ask, closes, raised):
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        client = tercet.Client(f"http://127.0.0.1:{server.getsockname()[1]}", timeout_s=0.5)
        asked = pool.submit(ask, client)
        with server.accept()[0] as connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{")
            if closes:
                connection.close()
            with pytest.raises(raised):
                asked.result()


async def test_models_and_ready(client, router):
    assert await asyncio.to_thread(client.models) == ["fake-model"]
    assert await asyncio.to_thread(client.is_ready)
    router.missing = ["decode"]
    assert not await asyncio.to_thread(client.is_ready)


async def test_the_chat_loop_remembers_what_was_said(client, router, monkeypatch):
    lines = iter(["hi", "x" * 500, "and now?", ""])
    console = Console(file=io.StringIO(), width=200)
    monkeypatch.setattr(console, "input", lambda _: next(lines))
    assert not await asyncio.to_thread(chat_loop, client, console, max_tokens=3)  # one was not answered
    out = console.file.getvalue()
    assert "context_too_long" in out  # and that line is forgotten
    assert bytes(router.requests[1].token_ids) == b"<u>hi<a>The<u>and now?<a>"
    lines = iter(["hi", ""])
    assert await asyncio.to_thread(chat_loop, client, console, max_tokens=3)


def test_the_end_of_input_ends_the_chat_behind_its_prompt(monkeypatch):
    console = Console(file=io.StringIO(), width=200)
    monkeypatch.setattr("builtins.input", lambda: (_ for _ in ()).throw(EOFError))
    assert chat_loop(tercet.Client("http://127.0.0.1:1"), console)
    assert console.file.getvalue().endswith("\n> \n")
