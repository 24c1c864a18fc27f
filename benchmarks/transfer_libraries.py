"""NIXL, ucxx and Mooncake by their own calls, as sides of benchmarks/transfer.py."""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from typing import Any, ClassVar

from benchmarks.transfer_rivals import HOST, SOURCE, Gloo, GlooPacked, Job, Memmove, Side, Slices, Tcp, Unix


class Nixl(Side):
    """WRITE with a notification; lists of a pool's blocks are prepared, requests are made in the time taken."""

    needs = "nixl_cu12"

    def connect(self) -> None:
        api: Any = importlib.import_module("nixl_cu12._api")
        self.agent: Any = api.nixl_agent(f"rank-{self.rank}", api.nixl_agent_config(enable_prog_thread=False))
        region = [(self.addresses[self.rank], len(self.pools[self.rank]), 0, "")]
        self.registered = self.agent.register_memory(region, "DRAM")
        self.link.send((self.addresses[self.rank], self.agent.get_agent_metadata()))
        self.remote, metadata = self.link.recv()
        self.peer: Any = self.agent.add_remote_agent(metadata)
        self.lists: dict[int, tuple[Any, Any]] = {}  # block size -> both sides' prepared lists

    def begin(self, job: Job) -> None:
        if job.size not in self.lists:
            ours, theirs = (self.blocks(base, job.size) for base in (self.addresses[SOURCE], self.remote))
            local = self.agent.prep_xfer_dlist("NIXL_INIT_AGENT", ours, "DRAM")
            self.lists[job.size] = local, self.agent.prep_xfer_dlist(self.peer, theirs, "DRAM")

    def blocks(self, base: int, size: int) -> list[tuple[int, int, int]]:
        return [(base + at, size, 0) for at in range(0, len(self.pools[SOURCE]) // size * size, size)]

    def move(self, job: Job) -> None:
        local, remote = self.lists[job.size]
        handle = self.agent.make_prepped_xfer("WRITE", local, job.src, remote, job.dst, b"all")
        state = self.agent.transfer(handle)
        while state == "PROC":
            time.sleep(0)  # nobody else drives it
            state = self.agent.check_xfer_state(handle)
        self.await_word()
        self.agent.release_xfer_handle(handle)
        if state != "DONE":
            raise OSError(f"NIXL says {state}")

    def take(self, job: Job) -> None:
        self.pong()

    def ping(self) -> None:
        self.agent.send_notif(self.peer, b"ping")
        self.await_word()

    def pong(self) -> None:
        self.await_word()
        self.agent.send_notif(self.peer, b"pong")

    def await_word(self) -> None:
        while not self.agent.get_new_notifs():
            time.sleep(0)  # nobody else drives it


class NixlFenced(Nixl):
    """Without the ways by which one process copies into another's memory: our adapter allows none of them."""

    env: ClassVar[dict[str, str]] = {"UCX_TLS": "^cma,knem,xpmem"}


class NixlTcp(Nixl):
    env: ClassVar[dict[str, str]] = {"UCX_TLS": "tcp"}


class Ucxx(Side):
    """Tagged messages of its core, one for each block."""

    needs = "ucxx"
    env: ClassVar[dict[str, str]] = {"UCX_TLS": "tcp", "UCX_TCP_CM_REUSEADDR": "y"}

    def connect(self) -> None:
        core: Any = importlib.import_module("ucxx._lib.libucxx")
        self.array: Any = importlib.import_module("ucxx._lib.arr").Array
        self.worker: Any = core.UCXWorker(core.UCXContext())
        self.link.send(bytes(self.worker.address.tobytes()))
        address = core.UCXAddress.create_from_buffer(self.link.recv())
        self.endpoint: Any = self.worker.create_endpoint_from_worker_address(address, False)
        self.tags = [core.UCXXTag(n) for n in range(2)]
        self.word = bytearray(1)

    def send(self, views: Sequence[Any], tag: int) -> None:
        self.wait([self.endpoint.tag_send(self.array(view), self.tags[tag]) for view in views])

    def receive(self, views: Sequence[Any], tag: int) -> None:
        self.wait([self.endpoint.tag_recv(self.array(view), self.tags[tag]) for view in views])

    def wait(self, requests: list[Any]) -> None:
        for request in requests:
            while not request.completed:
                self.worker.progress()
            request.check_error()

    def move(self, job: Job) -> None:
        self.send(self.views(job), 0)
        self.receive([self.word], 1)

    def take(self, job: Job) -> None:
        self.receive(self.views(job), 0)
        self.send([self.word], 1)

    def ping(self) -> None:
        self.send([self.word], 0)
        self.receive([self.word], 1)

    def pong(self) -> None:
        self.receive([self.word], 0)
        self.send([self.word], 1)


class Mooncake(Side):
    """batch_transfer_sync_write over its tcp; it returns when the target's engine has answered."""

    needs = "mooncake"
    env: ClassVar[dict[str, str]] = {
        "MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER": "65535",
        "MC_TCP_MAX_PENDING_ADMISSIONS_PER_PEER": "65535",
        "MC_FORCE_TCP": "1",
    }

    def connect(self) -> None:
        self.engine: Any = importlib.import_module("mooncake.engine").TransferEngine()
        if self.engine.initialize(HOST, "P2PHANDSHAKE", "tcp", ""):
            raise OSError("the engine did not start")
        pool = self.pools[self.rank]
        self.engine.register_memory(self.addresses[self.rank], len(pool))
        self.link.send((f"{HOST}:{self.engine.get_rpc_port()}", self.addresses[self.rank]))
        self.peer, self.remote = self.link.recv()

    def move(self, job: Job) -> None:
        local = [self.addresses[SOURCE] + n * job.size for n in job.src]
        remote = [self.remote + n * job.size for n in job.dst]
        if self.engine.batch_transfer_sync_write(self.peer, local, remote, [job.size] * len(local)):
            raise OSError("the engine reports a failed write")

    def ping(self) -> None:
        self.engine.transfer_sync_write(self.peer, self.addresses[SOURCE], self.remote, 8)


RIVALS: dict[str, type[Side]] = {
    "memcpy slices": Slices,
    "memcpy memmove": Memmove,
    "tcp loop": Tcp,
    "unix loop": Unix,
    "gloo per block": Gloo,
    "gloo packed": GlooPacked,
    "NIXL auto": Nixl,
    "NIXL no CMA": NixlFenced,
    "NIXL tcp": NixlTcp,
    "ucxx tcp": Ucxx,
    "Mooncake tcp": Mooncake,
}
