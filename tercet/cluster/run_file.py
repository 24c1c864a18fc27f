"""Which clusters are served on this machine: one file each, locked for as long as its controller lives.

The lock, not the file, says that a cluster runs. A file left by a killed controller only says that its Ray's folder may
be left, too. Files are created, written, read and removed under the folder's lock, so that nobody sees a file half
written, or mistakes a reader's shared lock for a controller's.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import stat
import time
from collections.abc import Callable, Iterator, Mapping
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
    ray_folder: str = ""  # of the Ray that it started; empty if it joined one
    ray_session: int = 0  # the number of its processes' session
    ray_environment: Mapping[str, str] = field(default_factory=dict)  # to set before Ray is imported, to join that Ray


class RunFile:
    """`with RunFile(name)`: this process serves the cluster. Raises ClusterError if another one does already."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.folder = _folder()
        self._path = self.folder / f"{name}.json"

    def __enter__(self) -> Self:
        with reaching(self._path):
            with _alone_in(self.folder):
                self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
                self._lock()
            before = _parse(os.pread(self._fd, MAX_BYTES, 0))
        if before is not None and before.ray_folder:  # its keeper has cleared up, unless it was killed, too
            keeper.clear_abandoned(Path(before.ray_folder), before.ray_session)
        try:
            self.write(Served(self._name, os.getpid()))
        except ClusterError:
            self.__exit__(None, None, None)
            raise
        return self

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._fd)
            raise ClusterError(
                f"a cluster named {self._name} is already served on this machine; end it with "
                f"`tercet down --name {self._name}` or serve this one with --set name=OTHER"
            ) from error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with contextlib.suppress(OSError), _alone_in(self.folder):  # without its lock the file means nothing
            if os.path.samestat(self._path.lstat(), os.fstat(self._fd)):  # else it is another process's file
                self._path.unlink()
        os.close(self._fd)

    def write(self, served: Served) -> None:
        """Raises ClusterError, and keeps the old contents, if the disk is full."""
        text = json.dumps(asdict(served)).encode()
        with reaching(self._path), _alone_in(self.folder):
            os.pwrite(self._fd, text, 0)  # before truncating, so that the file keeps its disk blocks
            os.ftruncate(self._fd, len(text))


def served() -> list[Served]:
    """The clusters that are served on this machine by this user, by name."""
    folder = _folder()
    with _alone_in(folder):
        paths = [path for path in sorted(folder.glob("*.json")) if stat.S_ISREG(path.lstat().st_mode)]
        return [found for path in paths if (found := _read(path)) is not None]


def find_reachable(name: str | None) -> Served:
    """`find`, for a caller that will connect. Raises ClusterError, also while the cluster has no address yet."""
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
    names = ", ".join(one.name for one in running)
    which = (
        f"no cluster named {name} is"
        if name
        else "say by --name which cluster of those"
        if running
        else "no cluster is"
    )
    why = "which TMPDIR names" if os.environ.get("TMPDIR") else "since TMPDIR is not set"
    seen = f"served: {names}" if names else f"looked in {_folder()}, {why}"
    raise ClusterError(f"{which} served on this machine ({seen})")


def end(name: str | None, timeout_s: float) -> str:
    """Have a cluster drained and ended. -> its name, once it is gone. Raises ClusterError if it is not in time.

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


@contextlib.contextmanager
def reaching(path: Path) -> Iterator[None]:
    """Turns an OSError into a ClusterError that names the path."""
    try:
        yield
    except OSError as error:
        raise ClusterError(f"{path} cannot be used: {error.strerror}") from error


def _folder() -> Path:
    """The folder of the files: always the same one, even if the disk is full. Raises ClusterError if it cannot be used,
    or if others may have written to it."""
    folder = Path(os.environ.get("TMPDIR") or "/tmp") / f"tercet-{os.getuid()}"  # noqa: S108, checked below
    with reaching(folder):
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


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. Only briefly: nobody may wait for anything else under it."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _read(path: Path) -> Served | None:
    with reaching(path), path.open("rb") as file:
        return _parse(file.read(MAX_BYTES)) if _locked(file.fileno()) else None


def _parse(text: bytes) -> Served | None:
    try:
        found = Served(**json.loads(text))
    except (ValueError, TypeError, RecursionError):  # from another version, or never written: killed before
        return None
    texts, numbers = (found.name, found.ray_address, found.http_url, found.ray_folder), (found.pid, found.ray_session)
    fits = all(isinstance(text, str) for text in texts) and all(isinstance(number, int) for number in numbers)
    return found if fits and isinstance(found.ray_environment, dict) else None


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False
