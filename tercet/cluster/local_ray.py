"""A Ray on this machine alone, started for one cluster and ended with it."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import BinaryIO

from tercet.cluster import keeper
from tercet.cluster.ray_address import AUTH_VARIABLES
from tercet.errors import ClusterError

# Ray keeps sockets below its folder, and the path of a Unix socket has at most 107 bytes.
MAX_PATH = 107
DEEPEST = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
QUIET = {
    "RAY_enable_metrics_collection": "0",  # no metrics exporter, which every user of this machine could read
    "RAY_raylet_death_check_interval_milliseconds": "3600000",  # members do it (actors.end_with_raylet)
    "DASHBOARD_METRIC_PORT": "0",  # this server cannot be turned off; take a free port at least
}
KEEPER_TIMEOUT_S = keeper.END_TIMEOUT_S + 2.0
STOP_TIMEOUT_S = KEEPER_TIMEOUT_S + keeper.END_TIMEOUT_S


class LocalRay:
    """Call `start`, `address`, and always `stop`. If this process is killed, the keeper ends this Ray."""

    def __init__(self, parent: Path) -> None:
        """parent: a folder that only this user can enter."""
        self.folder = _new_folder(parent)
        self._keeper: subprocess.Popen[bytes] | None = None

    @property
    def session(self) -> int:
        """Session number of its processes, once started."""
        assert self._keeper is not None
        return self._keeper.pid

    @property
    def token_path(self) -> Path | None:
        """The file of the token that joining takes; None if the user's own settings apply."""
        path = self.folder / "token"
        return path if path.exists() else None

    @property
    def environment(self) -> dict[str, str]:
        """The variables that a process must set before it imports Ray to join this one."""
        return (
            {} if self.token_path is None else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_path)}
        )

    def start(self, cpus: int) -> None:
        """Begin to start; `address` waits until that is done."""
        if not AUTH_VARIABLES & os.environ.keys():
            with _private(self.folder / "token") as file:
                file.write(secrets.token_hex(32).encode())
        command = [sys.executable, "-P", keeper.__file__, str(self.folder), str(cpus)]
        with _private(self._log) as log:
            self._keeper = subprocess.Popen(  # noqa: S603, our own file
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | self.environment | QUIET | {"RAY_TMPDIR": str(self.folder)},
                start_new_session=True,
            )

    def address(self) -> str:
        """host:port, once Ray is up; blocks. Raises ClusterError with Ray's reason."""
        assert self._keeper is not None
        assert self._keeper.stdout is not None
        line = self._keeper.stdout.readline()
        told = json.loads(line) if line else {"error": self._last_words()}
        if "error" in told:
            raise ClusterError(f"Ray cannot be started here: {told['error']}")
        return str(told["address"])

    def stop(self) -> None:
        """End all its processes and remove its folder; blocks."""
        if self._keeper is None:
            shutil.rmtree(self.folder)
            return
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        _wait_unreaped(self._keeper.pid)
        keeper.clear(self.folder, self._keeper.pid)  # it has done so already, unless someone killed it
        self._keeper.wait()

    @property
    def _log(self) -> Path:
        return self.folder / "start.log"

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").split("\n") if self._log.exists() else []
        return next((line for line in reversed(lines) if line.strip()), "its first process ended without a word")


def _wait_unreaped(pid: int) -> None:
    """Wait for the end of the keeper, but do not reap it, so that its pid, the session's number, is not reused."""
    deadline = time.monotonic() + KEEPER_TIMEOUT_S
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None and time.monotonic() < deadline:
        time.sleep(keeper.POLL_S)


def _new_folder(parent: Path) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir=parent))
    if len(str(folder)) + len(DEEPEST) <= MAX_PATH:
        return folder
    folder.rmdir()
    return Path(tempfile.mkdtemp(prefix="tercet-ray-", dir="/tmp"))


def _private(path: Path) -> BinaryIO:
    """A new file that no other user can ever read."""
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
