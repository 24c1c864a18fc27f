"""Which clusters are served on this machine: one file each, locked for as long as its controller lives.

The lock, not the file, says that a cluster runs; so a file that a killed controller left behind means nothing, but that
the folder of its Ray may be left behind too.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import stat
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from tercet.cluster import keeper
from tercet.errors import ClusterError

POLL_S = 0.1
MAX_BYTES = 64 * 1024


@dataclass(frozen=True)
class Served:
    """A cluster that is served on this machine. Addresses are empty until known."""

    name: str
    pid: int  # of the controller
    ray_address: str = ""
    http_url: str = ""
    ray_folder: str = ""  # of the Ray that it started; empty: the Ray is somebody else's
    ray_session: int = 0  # the number of its processes' session
    ray_environment: Mapping[str, str] = field(default_factory=dict)  # to set before Ray is imported, to join that Ray


class RunFile:
    """`with RunFile(name)`: this process serves the cluster. Raises ClusterError if another one does already."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.folder = _folder()
        self._path = self.folder / f"{name}.json"

    def __enter__(self) -> Self:
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._fd)
            raise ClusterError(
                f"a cluster named {self._name} is already served on this machine; end it with "
                f"`tercet down --name {self._name}` or serve this one with --set name=OTHER"
            ) from error
        before = _parse(os.pread(self._fd, MAX_BYTES, 0))
        if before is not None and before.ray_folder:  # its keeper should have done it, unless that was killed too
            keeper.clear_abandoned(Path(before.ray_folder), before.ray_session)
        self.write(Served(self._name, os.getpid()))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._path.unlink(missing_ok=True)
        os.close(self._fd)

    def write(self, served: Served) -> None:
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, json.dumps(asdict(served)).encode(), 0)


def served() -> list[Served]:
    """The clusters that are served on this machine by this user, by name."""
    return [found for path in sorted(_folder().glob("*.json")) if (found := _read(path)) is not None]


def find_reachable(name: str | None) -> Served:
    """`find`, for who would talk to the cluster. Raises ClusterError also while it has no address yet."""
    found = find(name)
    if not found.http_url:
        raise ClusterError(f"cluster {found.name} is just starting; try again in a moment")
    return found


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
    """Where the files lie. Raises ClusterError if others may have put something there."""
    folder = Path(tempfile.gettempdir()) / f"tercet-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise ClusterError(f"{folder} is no folder; remove it or set TMPDIR")
    if found.st_uid != os.getuid():
        raise ClusterError(f"{folder} belongs to another user; remove it or set TMPDIR")
    if found.st_mode & 0o022:
        raise ClusterError(f"{folder} can be written to by other users; remove it or set TMPDIR")
    folder.chmod(0o700)
    return folder


def _read(path: Path) -> Served | None:
    try:
        with path.open("rb") as file:
            return _parse(file.read(MAX_BYTES)) if _locked(file.fileno()) else None
    except FileNotFoundError:  # it has just ended
        return None


def _parse(text: bytes) -> Served | None:
    try:
        return Served(**json.loads(text))
    except (ValueError, TypeError):  # it is just being written, or by another version
        return None


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False
