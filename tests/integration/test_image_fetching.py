"""Images by address, from a server on a real socket: what is fetched, and what is refused before it is connected to."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import re
import shutil
import ssl
import subprocess
import time
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from tercet.errors import ImageNotFetched
from tercet.metrics import Metrics
from tercet.roles.gateway.fetch_rules import is_public
from tercet.roles.gateway.fetching import Fetcher
from tercet.spec import GatewayImagesSpec
from tests.fakes.images import HOST, Names, moved, picture, pictures, streamed


@pytest.fixture
async def server():
    async with pictures() as made:
        yield made


@pytest.fixture
def names():
    return Names(pictures_test=[["127.0.0.1"]], other_test=[["127.0.0.1"]], inside_test=[["127.0.0.2"]])


def here(address):
    """The one address that is public in these tests; all others are judged as they are in production."""
    return address == "127.0.0.1" or is_public(address)


@asynccontextmanager
async def fetcher_of(server, names, public=here, **changes):
    hosts = [f"{name}:{server.port}" for name in (HOST, "other.test", "inside.test", "nowhere.test")]
    spec = GatewayImagesSpec(**{"allowed_media_domains": hosts, "fetch_timeout_s": 5.0} | changes)
    metrics = Metrics()
    fetcher = Fetcher(spec, metrics, names, public)
    fetcher.results = lambda: dict(
        re.findall(r'tercet_image_fetches_total{result="(\w+)"} (\d+)', metrics.exposition().decode())
    )
    try:
        yield fetcher
    finally:
        await fetcher.close()


@pytest.fixture
async def fetcher(server, names):
    async with fetcher_of(server, names) as made:
        yield made


async def fetched(fetcher, url, count=lambda _: None):
    return await fetcher.fetch(url, "client", count)


async def refused(fetcher, url, told):
    with pytest.raises(ImageNotFetched, match=told) as raised:
        await fetched(fetcher, url)
    assert "secret" not in str(raised.value)
    return str(raised.value)


async def test_what_is_asked_for(server, fetcher, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    counted = []
    assert await fetched(fetcher, server.url("/a.png?size=2#top"), counted.append) == picture(1)
    assert sum(counted) == len(picture(1))
    [request] = server.asked
    assert (request.path_qs, request.headers["Host"]) == ("/a.png?size=2", f"{HOST}:{server.port}")
    assert request.headers["Accept-Encoding"] == "identity"
    assert not {"Cookie", "Authorization", "Referer"} & {*request.headers}
    assert fetcher.results() == {"fetched": "1"}


async def test_no_cookie_is_kept(server, fetcher):
    async def answer(request):
        return web.Response(body=picture(), headers={"Set-Cookie": "a=b"})

    server.pages["/cookie"] = answer
    await fetched(fetcher, server.url("/cookie"))
    await fetched(fetcher, server.url("/cookie"))
    assert "Cookie" not in server.asked[1].headers


@pytest.mark.parametrize(
    ("pages", "told"),
    [
        ({}, "pictures.test answered with status 404"),
        ({"/x": moved("", 500)}, "answered with status 500"),
        ({"/x": moved("", 304)}, "answered with status 304"),
        ({"/x": streamed(b"x" * 65536)}, "more than 1,000,000 bytes"),
        ({"/x": streamed(b"x" * 65536, Content_Length=str(1 << 29))}, "more than 1,000,000 bytes"),
        ({"/x": streamed(b"x", most=3, Content_Length="10")}, "ended the connection"),
        ({"/x": streamed(b"x", pause_s=0.05)}, "did not come within 0.5 s"),
        ({"/x": streamed(b"", pause_s=0.05)}, "did not come within 0.5 s"),
        ({"/x": streamed(gzip.compress(bytes(1 << 20)), most=1, Content_Encoding="gzip")}, "sent the image packed"),
        ({"/x": moved("/x")}, "more than 3 redirects"),
        ({"/x": moved("/y"), "/y": moved("/x", 307)}, "more than 3 redirects"),
        ({"/x": moved("http://evil.net/")}, "'evil.net' is not among gateway.images.allowed_media_domains"),
        ({"/x": moved("http://other.test:81/")}, "'other.test' with port 81 is not among"),
        ({"/x": moved("file:///etc/passwd")}, "only http and https addresses are fetched, not 'file'"),
        ({"/x": moved("http://[::1")}, "the address is no URL"),
        ({"/x": moved("http://a:b@other.test/")}, "user or a password"),
    ],
)
async def test_what_a_server_may_do_wrong(server, names, pages, told):
    server.pages |= pages
    async with fetcher_of(server, names, fetch_timeout_s=0.5, max_fetch_bytes=1_000_000) as fetcher:
        began = time.monotonic()
        await refused(fetcher, server.url("/x"), told)
        assert time.monotonic() - began < 3
    assert sum(map(int, fetcher.results().values())) == 1


async def test_redirects_are_followed(server, fetcher):
    server.pages |= {"/1": moved(server.url("/2", "other.test"), 301), "/2": moved("3", 308), "/3": moved("/b.png")}
    assert await fetched(fetcher, server.url("/1")) == picture(2)
    assert [r.headers["Host"].partition(":")[0] for r in server.asked] == [
        HOST,
        "other.test",
        "other.test",
        "other.test",
    ]


async def test_no_port_is_open(server, names):
    async with fetcher_of(server, names) as fetcher:
        await refused(fetcher, server.url("/a.png", "nowhere.test"), "nowhere.test has no address")
        names.answers["nowhere.test"] = [["127.0.0.1"]]
        await server.close()
        await refused(fetcher, server.url("/a.png", "nowhere.test"), "nowhere.test cannot be reached")
    assert fetcher.results() == {"failed": "2"}


@pytest.mark.parametrize(
    ("begins", "line", "told"),
    [
        (b"SSH-2.0-OpenSSH_9.9 the secret of this port\r\n", None, "answered with no HTTP"),
        (b"", None, "answered with no HTTP"),
        (b"HTTP/1.1 200 OK\r\nA: ", b"secret" * 1000, "answered with no HTTP"),
        (b"HTTP/1.1 200 OK\r\n", b"A: secret\r\n", "answered with no HTTP|within 0.5 s"),  # on a busy machine
        (b"HTTP/1.1 200 OK\r\n", b"A: secret\r\nB: " + b"secret" * 1000 + b"\r\n", "answered with no HTTP"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nsecret", None, "answered with no HTTP"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n", "within 0.5 s"),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: secret\r\n\r\n", None, "answered with status 101"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1;secret\r\nx\r\n", "within 0.5 s|more than"),
    ],
)
async def test_what_is_no_http_or_has_no_end(server, names, begins, line, told):
    async def talk(reader, writer):
        with contextlib.suppress(ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(begins)
            while line is not None:
                writer.write(line)
                await writer.drain()
        writer.close()

    await server.close()
    listening = await asyncio.start_server(talk, "127.0.0.1", server.port)
    async with listening, fetcher_of(server, names, fetch_timeout_s=0.5, max_fetch_bytes=100_000) as fetcher:
        await refused(fetcher, server.url("/a.png"), told)
        while len(asyncio.all_tasks()) > 2:
            await asyncio.sleep(0.01)


@pytest.fixture
def certified(tmp_path):
    """-> key, certificate"""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    names_it = ["-subj", f"/CN={HOST}", "-addext", f"subjectAltName=DNS:{HOST}"]
    subprocess.run(["openssl", *made, *names_it, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    return key, certificate


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
async def test_https_is_asked_for_and_checked_by_name(server, names, certified, monkeypatch):
    (key, certificate), asked = certified, []
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    context.sni_callback = lambda _, name, __: asked.append(name)

    async def talk(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc")
        await writer.drain()
        writer.close()

    talking = await asyncio.start_server(talk, "127.0.0.1", 0, ssl=context)
    server.port = talking.sockets[0].getsockname()[1]
    async with talking:
        url = server.url("/a.png").replace("http:", "https:")
        async with fetcher_of(server, names) as fetcher:
            await refused(fetcher, url, "pictures.test has no certificate that is trusted")
        trusting = ssl.create_default_context(cafile=certificate)
        monkeypatch.setattr("aiohttp.connector._SSL_CONTEXT_VERIFIED", trusting)
        async with fetcher_of(server, names) as fetcher:
            assert await fetched(fetcher, url) == b"abc"
            await refused(fetcher, url.replace(HOST, "other.test"), "other.test has no certificate that is trusted")
    assert asked == [HOST, HOST, "other.test"]


async def test_silent_names_and_servers(server, names):
    async with fetcher_of(server, names, fetch_timeout_s=0.2) as fetcher:
        server.pages["/x"] = lambda _: asyncio.sleep(60)
        await refused(fetcher, server.url("/x"), "within 0.2 s")
        names.silent = True
        await refused(fetcher, server.url("/a.png"), "within 0.2 s")
    assert fetcher.results() == {"timeout": "2"}


@pytest.mark.parametrize("inside", ["127.0.0.2", "::1", "169.254.169.254", "10.0.0.1", "::ffff:127.0.0.1", "0.0.0.0"])
async def test_names_of_what_is_inside(server, names, fetcher, inside):
    names.answers["inside.test"] = [[inside]]
    told = "inside.test is at no public address"
    assert inside not in await refused(fetcher, server.url("/a.png", "inside.test"), told)
    server.pages["/x"] = moved(server.url("/a.png", "inside.test"))
    await refused(fetcher, server.url("/x"), told)
    assert len(server.asked) == 1
    assert fetcher.results() == {"refused": "2"}


async def test_a_name_with_one_public_address_is_fetched_from_that(server, names, fetcher):
    names.answers[HOST] = [["127.0.0.2", "127.0.0.1", "10.0.0.1"]]
    assert await fetched(fetcher, server.url("/a.png")) == picture(1)


async def test_what_a_name_says_is_asked_once_for_each_connection(server, names, fetcher):
    """A name that is public when it is looked at, and ours a moment later."""
    names.answers[HOST] = [["127.0.0.1"], ["127.0.0.2"]]
    assert await fetched(fetcher, server.url("/a.png")) == picture(1)
    assert names.asked[HOST] == 1
    await refused(fetcher, server.url("/a.png"), "no public address")
    assert len(server.asked) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "127.1", "2130706433", "127.0.0.2", "169.254.169.254"])
async def test_addresses_for_names(server, names, host):
    """They skip what looks names up; what is connected to is judged all the same."""
    hosts = [f"{each}:{server.port}" for each in (host, HOST)]
    async with fetcher_of(server, names, is_public, allowed_media_domains=hosts) as fetcher:
        await refused(fetcher, server.url("/a.png", host), "no public address|no host that is connected to")
    names.answers[HOST] = [["127.0.0.1"]]
    public = lambda address: address == "127.0.0.1" and host != address  # noqa: E731
    async with fetcher_of(server, names, public, allowed_media_domains=hosts) as fetcher:
        server.pages["/x"] = moved(server.url("/a.png", host))
        await refused(fetcher, server.url("/x"), "no public address|no host that|cannot be reached")
    assert [request.path for request in server.asked] in (["/x"], [])


async def test_few_at_once_and_clients_in_turn(server, names):
    going = asyncio.Event()
    most = 0

    async def answer(request):
        nonlocal most
        most = max(most, server.reading)
        await going.wait()
        return web.Response(body=picture())

    server.pages["/x"] = answer
    async with fetcher_of(server, names, max_fetches=2) as fetcher:
        many = [asyncio.create_task(fetcher.fetch(server.url("/x"), "greedy", lambda _: None)) for _ in range(6)]
        while server.reading < 2:
            await asyncio.sleep(0.01)
        other = asyncio.create_task(fetcher.fetch(server.url("/a.png"), "modest", lambda _: None))
        await asyncio.sleep(0.05)
        assert server.reading == 2
        going.set()
        await other
        assert sum(task.done() for task in many) < 6
        await asyncio.gather(*many)
    assert most == 2


async def test_one_that_is_cancelled_ends_its_connection(server, names):
    server.pages["/x"] = streamed(b"x", pause_s=0.01)
    async with fetcher_of(server, names, max_fetches=1) as fetcher:
        task = asyncio.create_task(fetched(fetcher, server.url("/x")))
        while not server.reading:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await fetched(fetcher, server.url("/a.png")) == picture(1)  # its place is free
        async with asyncio.timeout(5):
            while server.reading:
                await asyncio.sleep(0.01)
