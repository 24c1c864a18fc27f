"""Mutual TLS between gateway and workers: real workers answer over it, and each port refuses who is no peer."""

import asyncio
import contextlib
import socket
import ssl
import subprocess
import threading
import time

import numpy as np
import pytest

from tercet.cluster.ports import ask_ports
from tercet.cluster.unbuilt import refuse_unbuilt
from tercet.errors import PeerMismatch, SpecError, TransferError, UnsupportedSpec, WorkerLost
from tercet.spec import ClusterSpec, NetworkSpec, PeerTlsSpec
from tercet.tls import PeerTls
from tercet.transfer.links.channel import Channel
from tercet.transfer.links.secured import secured, wrapped
from tercet.transfer.mover.acceptor import MAX_STRANGERS, Acceptor
from tercet.transfer.transports.contract import Endpoint
from tercet.transfer.transports.group_endpoint import GroupEndpoint
from tercet.transfer.transports.table import usable
from tercet.watched import LOOK_EVERY_S
from tests.certificates import Authority
from tests.field.listening import listeners
from tests.helpers import cluster, spec_of
from tests.movers import config


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path / "tls")


@pytest.fixture
def tls(authority):
    return PeerTls(authority.peer())


def pair_of(tls, other=None):
    """Both ends of a connection over loopback, after the handshake."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dialled = socket.create_connection(listener.getsockname(), 5)
        accepted, _ = listener.accept()
    accepted.settimeout(5)
    found = {}

    def answer():
        with contextlib.suppress(TransferError):
            found["accepted"] = secured(wrapped(accepted, other or tls, dialled=False), other or tls)

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        ours = secured(wrapped(dialled, tls, dialled=True), tls)
    finally:
        thread.join()
    if "accepted" not in found:
        ours.close()
        raise PeerMismatch("the other end refuses it")
    return ours, found["accepted"]


@pytest.mark.parametrize("size", [0, 1, 16 * 1024 - 1, 16 * 1024, 16 * 1024 + 1, 1 << 20, (8 << 20) + 3])
def test_bytes_come_whole_both_ways_at_once(tls, size):
    ends = pair_of(tls)
    sent = [np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8).tobytes() for seed in (0, 1)]
    channels = [Channel(end, over_tls=True) for end in ends]
    got = [bytearray(size) for _ in ends]
    work = [
        *(threading.Thread(target=c.send_bytes, args=(s,)) for c, s in zip(channels, sent, strict=True)),
        *(threading.Thread(target=c.receive_into, args=([memoryview(g)],)) for c, g in zip(channels, got, strict=True)),
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join(60)
    assert [bytes(g) for g in reversed(got)] == sent
    for channel in channels:
        channel.shutdown()
        channel.close()


def test_the_end_comes_behind_all_that_was_sent(tls):
    """As of a plain socket: what was sent before the end is read first."""
    ours, theirs = pair_of(tls)
    theirs.settimeout(10)
    ours.sendall(b"x" * (1 << 20))
    ours.shutdown(socket.SHUT_RDWR)
    ours.close()
    got = bytearray()
    while piece := theirs.recv(1 << 16):
        got += piece
    assert len(got) == 1 << 20
    theirs.close()


def test_the_last_words_go_out_also_where_the_peer_speaks_meanwhile(tls):
    for _ in range(30):
        ours, theirs = pair_of(tls)
        theirs.settimeout(10)
        stop = threading.Event()

        def chatter(theirs=theirs, stop=stop):
            with contextlib.suppress(OSError):
                while not stop.is_set():
                    theirs.sendall(b"ack")

        thread = threading.Thread(target=chatter)
        thread.start()
        ours.sendall(b"y" * 100_000)
        ours.shutdown(socket.SHUT_RDWR)
        ours.close()
        got = 0
        with contextlib.suppress(ConnectionError):
            while piece := theirs.recv(1 << 16):
                got += len(piece)
        stop.set()
        theirs.close()
        thread.join(10)
        assert got == 100_000


def test_a_peer_that_is_cut_is_seen(tls):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dialled = socket.create_connection(listener.getsockname(), 5)
        accepted, _ = listener.accept()
    server = tls.server().wrap_socket
    raw = {}
    thread = threading.Thread(target=lambda: raw.update(end=server(accepted, server_side=True)))
    thread.start()
    ours = secured(wrapped(dialled, tls, dialled=True), tls)
    thread.join()
    raw["end"].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset, not an end
    raw["end"].close()
    ours.settimeout(10)
    assert ours.recv(1) == b""
    ours.close()


def test_no_thread_stays_behind(tls):
    before = threading.active_count()
    for _ in range(10):
        for end in pair_of(tls):
            end.close()
    deadline = time.monotonic() + 20
    while threading.active_count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_sender_whose_peer_does_not_read_waits_and_then_ends(tls):
    ours, theirs = pair_of(tls)
    ours.settimeout(1)
    with pytest.raises(TimeoutError):
        ours.sendall(bytes(64 << 20))
    ours.close()
    theirs.close()


def others(tmp_path, authority):
    """Who is no peer -> what it comes with."""
    stranger = Authority(tmp_path / "stranger")
    known = authority.path.read_text()
    (tmp_path / "stranger" / "both.pem").write_text(known)
    spec = stranger.peer()
    return {
        "another authority": PeerTlsSpec(certificate=spec.certificate, key=spec.key, ca=str(authority.path)),
        "another name": authority.peer("gateway", file="other"),
    }


@pytest.mark.parametrize("who", ["another authority", "another name"])
def test_who_is_no_peer_is_refused_by_either_end(tls, tmp_path, authority, who):
    other = PeerTls(others(tmp_path, authority)[who])
    for dials, accepts in ((other, tls), (tls, other)):
        with pytest.raises(PeerMismatch):
            pair_of(dials, accepts)


def speaks(address, context, name="tercet"):
    """What comes of a connection: the first byte that the port sends, or nothing."""
    host, port = address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), 5) as bare:
        if context is None:
            bare.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            found = bare.recv(1)
            return b"" if found == b"\x15" else found  # an alert of TLS is a refusal
        with context.wrap_socket(bare, server_hostname=name) as spoken:
            return spoken.recv(1)


def contexts(tls, tmp_path, authority):
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.load_verify_locations(str(authority.path))
    found = {"no TLS": None, "no certificate": bare}
    for who, spec in others(tmp_path, authority).items():
        found[who] = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        found[who].load_verify_locations(str(authority.path))
        found[who].load_cert_chain(spec.certificate, spec.key)
    return found


def spec_with(authority, **changes):
    return spec_of(decoders=1, **changes).model_copy(update={"network": NetworkSpec(tls=authority.peer())})


def ports_of(info):
    """All that a worker listens at."""
    ranks = GroupEndpoint.decode(info.transfer_endpoint).ranks if info.transfer_endpoint else ()
    return [info.rpc_address, *(address for rank in ranks for address in Endpoint.decode(rank).tcp)]


def listening():
    """Addresses at which this process listens, as the system says."""
    return {f"{host}:{port}" for host, port in listeners()}


async def test_every_port_of_a_worker_takes_peers_alone(tmp_path, authority):
    before = listening()
    async with cluster(spec_with(authority, transfer__transport="tcp")) as made:
        tls = made.workers["decode-0"]._who.tls
        ports = [port for info in made.infos.values() for port in ports_of(info)]
        assert {*ports} == listening() - before
        assert len(ports) == 3
        for port in ports:
            for who, context in contexts(tls, tmp_path, authority).items():
                with contextlib.suppress(OSError):  # refused by a reset or an alert
                    assert await asyncio.to_thread(speaks, port, context) == b"", (port, who)
            assert await asyncio.to_thread(speaks, port, tls.client())
        for info in made.infos.values():
            await ask_ports(info, 5.0, tls)
            with pytest.raises(WorkerLost):
                await ask_ports(info, 1.0)


async def test_tokens_are_those_without_it_over_tcp_and_certificates_change_meanwhile(authority):
    prompts = [list(range(3, 3 + n)) for n in (1, 16, 17, 200)]
    async with cluster(spec_of(decoders=1, transfer__transport="tcp")) as made:
        plain = [[e.token_id for e in (await made.generate(p))[0]] for p in prompts]
    async with cluster(spec_with(authority, transfer__transport="tcp")) as made:
        for _ in range(2):
            secret = [await made.generate(p) for p in prompts]
            assert [[e.token_id for e in events] for events, _ in secret] == plain
            assert {done.times.transport for _, done in secret} <= {"tcp", ""}  # none: all of it was cached
            authority.peer()
            await asyncio.sleep(1.2 * LOOK_EVERY_S)
            view = next(iter(made.router._links.values()))
            view._task.cancel()  # the stream is made anew, with the new certificate
            made.router._links.clear()
            await made.router.set_workers([])
            await made._publish()


def test_what_cannot_be_secret_is_refused_or_left_out(authority):
    assert {t.name for t in usable("auto", tls=True)} <= {"shm", "tcp"}
    for name in ("torch", "ucx", "nixl"):
        with pytest.raises(UnsupportedSpec, match=f"transfer.transport: {name} sends KV to other hosts as it is"):
            refuse_unbuilt(spec_with(authority, transfer__transport=name))
    for name in ("auto", "tcp", "shm"):
        refuse_unbuilt(spec_with(authority, transfer__transport=name))
    ranks = spec_with(authority).model_dump(exclude_unset=True)
    ranks["roles"]["decode"]["parallelism"] = {"tensor": 3}
    with pytest.raises(UnsupportedSpec, match="3 ranks do not speak TLS"):
        refuse_unbuilt(ClusterSpec.model_validate(ranks))


@pytest.mark.parametrize("key", ["certificate", "key", "ca"])
def test_files_that_are_none_are_named(authority, tmp_path, key):
    for path in (tmp_path / "none.pem", tmp_path / "noise.pem"):
        if path.name == "noise.pem":
            path.write_text("noise")
        with pytest.raises(SpecError, match=path.name):
            PeerTls(authority.peer().model_copy(update={key: str(path)}))


def test_a_key_with_a_passphrase_is_refused_and_nobody_is_asked(authority, tmp_path):
    spec = authority.peer()
    path = tmp_path / "locked.key"
    subprocess.run(["openssl", "pkcs8", "-topk8", "-in", spec.key, "-out", str(path), "-passout", "pass:x"], check=True)
    with pytest.raises(SpecError, match="passphrase"):
        PeerTls(spec.model_copy(update={"key": str(path)}))


def test_strangers_hold_no_transfer_port(authority):
    """They are bounded also while they have not ended their handshake."""
    tls = PeerTls(authority.peer())
    acceptor = Acceptor(config("decode-0", tls=tls), lambda channel, hello: None)
    _, (address,) = acceptor.listen("127.0.0.1")
    host, port = address.rsplit(":", 1)
    crowd = [socket.create_connection((host, int(port)), 5) for _ in range(MAX_STRANGERS + 20)]
    try:
        assert speaks(address, tls.client())
        crowd[0].settimeout(5)
        with contextlib.suppress(ConnectionError):
            assert crowd[0].recv(1) == b""  # the oldest made room
    finally:
        for each in crowd:
            each.close()
        acceptor.stop()
