"""Which clusters are served on this machine: one file each, locked for as long as its controller lives.

The lock, not the file, says that a cluster runs; so a file that a killed controller left behind means nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tercet.errors import ClusterError

POLL_S = 0.1


@dataclass(frozen=True)
class Served:
    """A cluster that is served on this machine. Addresses are empty until known."""

    name: str
    pid: int  # of the controller
    ray_address: str = ""
    http_url: str = ""
    token_path: str = ""  # of the Ray that it started; empty: how to join that Ray is the user's business

    @property
    def ray_environment(self) -> dict[str, str]:
        """What a process sets before it imports Ray to join this cluster's Ray."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": self.token_path} if self.token_path else {}


class RunFile:
    """`with RunFile(name)`: this process serves the cluster. Raises ClusterError if another one does already."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._path = _folder() / f"{name}.json"

    def __enter__(self) -> Self:
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._fd)
            raise ClusterError(
                f"a cluster named {self._name} is already served on this machine; end it with "
                f"`tercet down --name {self._name}` or serve this one with --set name=OTHER"
            ) from error
        self.token_path.unlink(missing_ok=True)
        self.write()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.token_path.unlink(missing_ok=True)
        self._path.unlink(missing_ok=True)
        os.close(self._fd)

    @property
    def token_path(self) -> Path:
        """Where the token of a Ray that this process starts may lie; only this user can read the folder."""
        return self._path.with_suffix(".token")

    def write(self, ray_address: str = "", http_url: str = "") -> None:
        token_path = str(self.token_path) if self.token_path.exists() else ""
        served = Served(self._name, os.getpid(), ray_address, http_url, token_path)
        text = json.dumps(asdict(served)).encode()
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, text, 0)


def served() -> list[Served]:
    """The clusters that are served on this machine by this user, by name."""
    return [found for path in sorted(_folder().glob("*.json")) if (found := _read(path)) is not None]


def find(name: str | None) -> Served:
    """The cluster of that name, or the only one. Raises ClusterError naming what runs."""
    running = served()
    if name is None and len(running) == 1:
        return running[0]
    for one in running:
        if one.name == name:
            return one
    names = ", ".join(one.name for one in running) or "none"
    which = (
        f"no cluster named {name} is"
        if name
        else "say by --name which cluster of those"
        if running
        else "no cluster is"
    )
    raise ClusterError(f"{which} served on this machine (served: {names})")


def end(name: str | None, timeout_s: float) -> str:
    """Have a cluster drained and ended; its name once it is gone. Raises ClusterError if it does not go.

    By signal: that reaches a controller even while its gateway is being replaced.
    """
    found = find(name)
    os.kill(found.pid, signal.SIGTERM)
    wait_gone(found.name, lambda: all(one.pid != found.pid for one in served()), timeout_s)
    return found.name


def wait_gone(name: str, gone: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not gone():
        if time.monotonic() > deadline:
            raise ClusterError(f"cluster {name} was asked to stop but still stands after {timeout_s:g} s")
        time.sleep(POLL_S)


def _folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"tercet-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise ClusterError(f"{folder} belongs to another user; remove it or set TMPDIR")
    return folder


def _read(path: Path) -> Served | None:
    try:
        with path.open() as file:
            if not _locked(file.fileno()):
                return None
            return Served(**json.load(file))
    except (FileNotFoundError, json.JSONDecodeError):  # it ended or is just being written
        return None


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False
