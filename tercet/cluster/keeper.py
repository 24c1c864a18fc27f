"""Ends a Ray that a controller started when the controller is gone, however that ended.

    controller ── starts ──> keeper ── starts ──> ray_head, which starts Ray's processes, says where, and ends
        └── holds a pipe to the keeper's standard input; when it closes, also by SIGKILL, the keeper ends everything

The keeper leads a session of its own and blocks the signals that end a service, as do all processes that it starts: so
even if they are sent to every process, it is the controller that ends things, in order. The keeper imports nothing of
Ray, whose libraries end a process when Ray is in trouble. It ends the other processes of its session: those that
descend from ray_head. The kernel does not reuse a session's number while the session has a process left.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36  # of <linux/prctl.h>
END_TIMEOUT_S = 10.0
POLL_S = 0.05
TIDY_EVERY_S = 1.0
UMASK = 0o077  # only this user may read what Ray writes


def main() -> None:
    """Arguments: the folder of this Ray, then those of ray_head."""
    folder, *arguments = sys.argv[1:]
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans are reparented to us, not to init
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))  # Ray inherits it
    os.umask(UMASK)
    head = [sys.executable, "-P", str(Path(__file__).with_name("ray_head.py")), *arguments]
    subprocess.Popen(head, stdin=subprocess.DEVNULL)  # noqa: S603, our own file
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())  # the controller must see the end of ray_head's output
    while not select.select([sys.stdin], [], [], TIDY_EVERY_S)[0]:
        _bury()
        _close(folder)
    clear(Path(folder), os.getpid())
    deadline = time.monotonic() + END_TIMEOUT_S
    while _bury() and time.monotonic() < deadline:  # a process that was killed may take a moment to end
        time.sleep(POLL_S)


def _close(folder: str) -> None:
    """Ray opens its folders to everybody, again with every worker that it starts. Only this user can get there."""
    for path, _, _ in os.walk(folder):
        with contextlib.suppress(FileNotFoundError):
            os.chmod(path, 0o700)


def clear(folder: Path, session: int) -> None:
    """Kill every process of the session but this one, then remove the folder."""
    _end(lambda pid: _session(pid) == session)
    shutil.rmtree(folder, ignore_errors=True)


def clear_abandoned(folder: Path, session: int) -> None:
    """`clear` for a keeper that was killed long ago, whose session number may have been reused: kill only processes of
    the session that have a file of the folder open."""
    _end(lambda pid: _session(pid) == session and _uses(pid, folder))
    shutil.rmtree(folder, ignore_errors=True)


def _end(is_meant: Callable[[int], bool]) -> None:
    deadline = time.monotonic() + END_TIMEOUT_S
    while (found := [pid for pid in _others() if is_meant(pid)]) and time.monotonic() < deadline:
        for pid in found:
            _kill(pid, is_meant)
        time.sleep(POLL_S)


def _kill(pid: int, is_meant: Callable[[int], bool]) -> None:
    """By pidfd, so that a process that has got the number in the meantime is not killed."""
    with contextlib.suppress(ProcessLookupError):
        try:
            process = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        except OSError:  # some kernels and sandboxes have no such descriptors
            os.kill(pid, signal.SIGKILL)
            return
        with open(process, "rb"):
            if is_meant(pid):
                signal.pidfd_send_signal(process, signal.SIGKILL)


def _others() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal() and int(name) != os.getpid()]


def _session(pid: int) -> int | None:
    """The session of a live process; None for zombies, of which nothing is left to end."""
    try:
        state, _, _, session = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[:4]
    except OSError:
        return None
    return None if state in b"ZX" else int(session)


def _uses(pid: int, folder: Path) -> bool:
    files = Path(f"/proc/{pid}/fd")
    try:
        return any(os.readlink(files / number).startswith(f"{folder}/") for number in os.listdir(files))
    except OSError:  # it has ended, or is another user's
        return False


def _bury() -> bool:
    """Reap children that have exited; in a container often nobody else does. -> whether any is left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


if __name__ == "__main__":
    main()
