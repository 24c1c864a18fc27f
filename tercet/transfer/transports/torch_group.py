"""A two-rank gloo group that meets at a store on the receiver's host. Errors of torch become PeerDown."""

from __future__ import annotations

import socket
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch's stubs lack it

from tercet.errors import PeerDown
from tercet.transfer.memory.pack import Memory
from tercet.transfer.transports.contract import LinkContext

RECEIVER, SENDER = 0, 1


class Group:
    """One end. For one thread."""

    def __init__(self, context: LinkContext, rank: int, store: TCPStore) -> None:
        self._host = context.channel.sock.getsockname()[0]
        self._timeout = timedelta(seconds=context.timeout_s)
        self._rank = rank
        self._store = store

    @classmethod
    def at_receiver(cls, context: LinkContext) -> Group:
        """The store listens on the address of the link's socket; by default it would listen on every address."""
        host = context.channel.sock.getsockname()[0]
        try:
            listener = socket.create_server((host, 0), family=context.channel.sock.family)
            port, fd = listener.getsockname()[1], listener.detach()  # the store closes it
            store = TCPStore(
                host, port, 2, is_master=True, wait_for_workers=False, master_listen_fd=fd, use_libuv=False
            )
        except (OSError, RuntimeError) as error:
            raise PeerDown(f"no store for a gloo group: {error}") from error
        return cls(context, RECEIVER, store)

    @classmethod
    def at_sender(cls, context: LinkContext) -> Group:
        host, _, port = context.blob.decode().rpartition(":")
        try:
            store = TCPStore(
                host, int(port), 2, is_master=False, timeout=timedelta(seconds=context.timeout_s), use_libuv=False
            )
        except (RuntimeError, ValueError) as error:
            raise PeerDown(f"the store for the gloo group at {host}:{port} does not answer: {error}") from error
        return cls(context, SENDER, store)

    @property
    def address(self) -> bytes:
        """Address of the store, for the other end."""
        return f"{self._host}:{self._store.port}".encode()

    def meet(self) -> None:
        """Blocks until the other end does the same."""
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # torch's stubs lack it
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=self._host)]
        options._timeout = self._timeout
        try:
            self._group = dist.ProcessGroupGloo(self._store, self._rank, 2, options)
        except (RuntimeError, ValueError) as error:
            raise PeerDown(f"no gloo group with the peer: {error}") from error

    def send(self, view: memoryview) -> None:
        self._wait(self._group.send([_tensor(view)], 1 - self._rank, 0))  # type: ignore[attr-defined]  # likewise

    def receive(self, view: memoryview) -> None:
        self._wait(self._group.recv([_tensor(view)], 1 - self._rank, 0))  # type: ignore[attr-defined]  # likewise

    def _wait(self, work: dist.Work) -> None:
        try:
            work.wait(self._timeout)
        except RuntimeError as error:
            raise PeerDown(f"gloo: {error}") from error


def _tensor(view: Memory) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(view, dtype=np.uint8))
