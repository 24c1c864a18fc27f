"""Which Ray a cluster joins: one that answers as Ray, and that this user runs or has asked for by name.

Nothing here imports Ray, which reads the environment variables for joining only once, when it is imported.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from tercet.errors import ClusterError
from tercet.wire import knock
from tercet.wire.knock import Answer, Certificates

ANSWER_TIMEOUT_S = 5.0
IDENTITY = "/ray.rpc.NodeInfoGcsService/GetClusterId"  # what Ray's own clients ask first
AUTH_VARIABLES = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}  # if any is set, the user's settings apply
_REFUSED = {"UNAUTHENTICATED", "PERMISSION_DENIED"}


def resolve(wanted: str, report: Callable[[str], None]) -> str | None:
    """The host:port of the Ray to join, or None to start one. `report` is told why what was found is not joined.

    auto: RAY_ADDRESS (as `ray job submit` sets it), else the Ray that this user's `ray start` left running here.
    Raises ClusterError if an address that was asked for by name does not answer as Ray.
    """
    named = os.environ.get("RAY_ADDRESS", "auto") or "auto" if wanted == "auto" else wanted
    if named == "local":
        return None
    if named == "auto":
        return _found(report)
    _check_form(named)
    if fault := _fault(named):
        raise ClusterError(f"no Ray answers at {named} ({fault}); start one with `ray start --head`, "
                           "or set ray.address: local")  # fmt: skip
    return named


def _found(report: Callable[[str], None]) -> str | None:
    """The address in Ray's address file, if it can be trusted: any user may have put a file there."""
    path = _address_file()
    try:
        address = _read_own(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        report(f"the Ray address file {path} is passed over: {error}")
        return None
    if not _runs_here(address):
        report(
            f"the Ray at {address}, which {path} names, is passed over: this user runs no node of it on this machine"
        )
        return None
    if fault := _fault(address):
        report(f"the Ray at {address}, which {path} names, is passed over: it does not answer ({fault})")
        return None
    if _token() and not AUTH_VARIABLES & os.environ.keys():
        os.environ["RAY_AUTH_MODE"] = "token"  # as Ray itself does for a Ray that it finds
    return address


def _address_file() -> Path:
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # noqa: S108, where Ray puts it
    return Path(folder) / "ray" / "ray_current_cluster"


def _read_own(path: Path) -> str:
    """The address in a file that this user alone can have written. Raises OSError, or ValueError saying what is wrong.

    Ray opens its folder to everybody, so others may put another file there, but not one that this user owns.
    """
    _check_owner(path.parent.lstat(), "its folder")
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
        found = os.fstat(file.fileno())
        _check_owner(found, "it")
        if not stat.S_ISREG(found.st_mode) or found.st_mode & 0o022:
            raise ValueError("others can write to it")
        address = file.read(256).strip()
    if not _is_address(address):
        raise ValueError("it holds no host:port")
    return address


def _check_owner(found: os.stat_result, what: str) -> None:
    if found.st_uid != os.getuid():
        raise ValueError(f"{what} belongs to user {found.st_uid}")


def _check_form(address: str) -> None:
    if not _is_address(address):
        raise ClusterError(f"Ray address {address!r}: want host:port of its GCS, such as 127.0.0.1:6379")


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isascii() and port.isdecimal() and int(port) < 65536 and "/" not in text


def _fault(address: str) -> str:
    """Why this is no Ray; empty if it is. If it refuses our token, Ray's own client will say what to do."""
    answer = ask(address, ANSWER_TIMEOUT_S, IDENTITY)
    if answer.status == "OK":
        return "" if answer.reply else "it has no identity"
    return "" if answer.status in _REFUSED else f"{answer.status}: {answer.details}"


def ask(address: str, timeout_s: float, method: str = knock.HEALTH) -> Answer:
    """Ask one of Ray's servers as Ray's own clients do. Raises ClusterError if Ray's settings cannot be followed."""
    return knock.ask(address, timeout_s, method, _token(), _certificates())


def _certificates() -> Certificates | None:
    if os.environ.get("RAY_USE_TLS", "0").lower() not in {"1", "true"}:
        return None
    names = ("RAY_TLS_CA_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_SERVER_CERT")
    try:
        return Certificates(*(Path(os.environ.get(name, "")).read_bytes() for name in names))
    except OSError as error:
        raise ClusterError(f"RAY_USE_TLS is set, but one of {', '.join(names)} cannot be read: {error}") from error


def _token() -> list[tuple[str, str]]:
    """The token as a gRPC header, from where Ray's clients look for it, in their order."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return []
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        token = os.environ.get("RAY_AUTH_TOKEN") or path.read_text()
    except OSError:
        return []
    return [("authorization", f"Bearer {token.strip()}")]


def _runs_here(address: str) -> bool:
    """Whether this user runs a node of that Ray on this machine: our actors would be children of its processes."""
    return os.getuid() in owners(address)


def owners(address: str) -> set[int]:
    """The users whose raylets on this machine belong to the Ray at that address."""
    wanted = f"--gcs-address={address}".encode()
    return {uid for uid, (name, *more) in _commands() if name.endswith(b"raylet") and wanted in more}


def _commands() -> Iterator[tuple[int, list[bytes]]]:
    for name in filter(str.isdecimal, os.listdir("/proc")):
        process = Path("/proc", name)
        try:
            yield process.stat().st_uid, (process / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
