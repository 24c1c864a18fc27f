"""What may lie where Ray's address is looked for: only a Ray that answers as one, and that is ours, is joined."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from tercet.cluster import ray_address, run_file
from tercet.cluster.run_file import RunFile
from tercet.errors import ClusterError
from tests.machine import BIN, ROOT, Machine, until

SOON_S = 15.0  # for a process that has to be started for it
NOBODY = 65534
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")


@pytest.fixture
def silent() -> Iterator[str]:
    """A service that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


class Identity(grpc.GenericRpcHandler):
    """Knows the one question that a GCS is asked first, and hangs at every other."""

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        if call.method == ray_address.IDENTITY:
            return grpc.unary_unary_rpc_method_handler(lambda _, context: b"\n\0\x12\x1c" + 28 * b"i")
        return grpc.unary_unary_rpc_method_handler(lambda _, context: time.sleep(60))


@pytest.fixture
def half_ray() -> Iterator[str]:
    """A Ray that says who it is, and then hangs."""
    pool = futures.ThreadPoolExecutor(32)
    server = grpc.server(pool, handlers=[Identity()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0)
    for thread in pool._threads:  # they sleep, and must not be waited for
        futures.thread._threads_queues.pop(thread, None)


@pytest.fixture
def says(tmp_path, monkeypatch) -> Callable[[str], Path]:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def write(address: str) -> Path:
        folder = tmp_path / "ray"
        folder.mkdir(exist_ok=True)
        folder.chmod(0o777)  # as Ray leaves it
        (folder / "ray_current_cluster").write_text(address)
        return folder / "ray_current_cluster"

    return write


@pytest.fixture
def node_of() -> Iterator[Callable[..., None]]:
    """Processes that look like a raylet of the Ray at an address."""
    started: list[subprocess.Popen[bytes]] = []

    def start(address: str, user: int | None = None) -> None:
        begin("raylet", address, user)
        until(lambda: ray_address.owners(address))  # its command line shows a moment after it runs

    def begin(name: str, address: str, user: int | None = None) -> None:
        command = [name, "-c", "read line", f"--gcs-address={address}"]
        started.append(subprocess.Popen(command, executable="/bin/sh", stdin=subprocess.PIPE, user=user))

    start.begin = begin
    yield start
    for process in started:
        process.communicate(b"\n")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(ray_address, "ANSWER_TIMEOUT_S", 1.0)


def found() -> tuple[str | None, str]:
    told: list[str] = []
    began = time.monotonic()
    address = ray_address.resolve("auto", told.append)
    assert time.monotonic() - began < SOON_S
    return address, " ".join(told)


def test_a_ray_of_ours_that_answers_is_joined(says, node_of, half_ray):
    says(half_ray)
    node_of(half_ray)
    assert found() == (half_ray, "")


def test_a_service_that_is_no_ray_is_passed_over(says, node_of, silent):
    says(silent)
    node_of(silent)
    address, told = found()
    assert address is None
    assert f"the Ray at {silent}" in told
    assert "does not answer (DEADLINE_EXCEEDED" in told


def test_a_ray_without_a_node_of_ours_here_is_passed_over(says, half_ray):
    says(half_ray)
    address, told = found()
    assert address is None
    assert "this user runs no node of it on this machine" in told


@needs_root
def test_a_ray_that_another_user_runs_is_passed_over(says, node_of, half_ray):
    says(half_ray)
    node_of(half_ray, user=NOBODY)
    assert found()[0] is None
    assert ray_address.owners(half_ray) == {NOBODY}


def test_an_agent_that_outlives_its_node_is_no_node(node_of):
    node_of.begin("python", "127.0.0.1:1")
    node_of("127.0.0.1:2")
    assert ray_address.owners("127.0.0.1:1") == set()


def of_another_user(path: Path) -> None:
    os.chown(path, NOBODY, NOBODY)


def in_a_folder_of_another_user(path: Path) -> None:
    os.chown(path.parent, NOBODY, NOBODY)


def writable_by_all(path: Path) -> None:
    path.chmod(0o666)


def a_symlink(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def empty(path: Path) -> None:
    path.write_text("")


def garbage(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 40)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(of_another_user, marks=needs_root),
        pytest.param(in_a_folder_of_another_user, marks=needs_root),
        writable_by_all,
        a_symlink,
        a_pipe,
        a_folder,
        empty,
        garbage,
    ],
)
def test_a_file_that_others_may_have_put_there_is_passed_over(says, node_of, half_ray, spoil):
    path = says(half_ray)
    node_of(half_ray)
    spoil(path)
    address, told = found()
    assert address is None
    assert f"the Ray address file {path} is passed over" in told


def test_an_address_that_was_asked_for_must_answer(silent):
    with pytest.raises(ClusterError, match=f"no Ray answers at {silent}"):
        ray_address.resolve(silent, print)


@pytest.mark.parametrize("command", [["serve", "configs/local.yaml"], ["status"]])
def test_commands_end_in_a_named_error(tmp_path, silent, command):
    where = ["--set", f"ray.address={silent}"] if command[0] == "serve" else ["--address", silent]
    began = time.monotonic()
    done = tercet(tmp_path, *command, *where).communicate(timeout=60)
    assert time.monotonic() - began < SOON_S
    assert f"no Ray answers at {silent}" in done[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_ray_that_hangs_leaves_serve_able_to_hear(tmp_path, half_ray, number):
    process = tercet(tmp_path, "serve", "configs/local.yaml", "--set", f"ray.address={half_ray}")
    assert f"joins the Ray at {half_ray}" in process.stderr.readline()
    time.sleep(2.0)  # into Ray's own waits; there is nothing to see from outside
    began = time.monotonic()
    process.send_signal(number)
    process.communicate(timeout=SOON_S)
    assert process.returncode == 130
    assert time.monotonic() - began < 5


def tercet(folder: Path, *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [BIN / "tercet", *command],
        cwd=ROOT,
        env=Machine(folder).environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


# The folder of the run files, from which `down` takes the process to signal, and `status` the token.


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path / f"tercet-{os.getuid()}"


def test_a_run_folder_that_others_can_read_is_closed(folder):
    folder.mkdir()
    folder.chmod(0o755)
    with RunFile("one"):
        assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722])
def test_a_run_folder_that_others_can_write_to_is_refused(folder, mode):
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(ClusterError, match="can be written to by other users"):
        RunFile("one")
    with pytest.raises(ClusterError, match="can be written to by other users"):
        run_file.find(None)


@needs_root
def test_a_run_folder_of_another_user_is_refused(folder):
    folder.mkdir(mode=0o700)
    os.chown(folder, NOBODY, NOBODY)
    with pytest.raises(ClusterError, match="belongs to another user"):
        RunFile("one")


@pytest.mark.parametrize("kind", ["symlink", "file"])
def test_a_run_folder_that_is_none_is_refused(folder, kind):
    (folder.parent / "elsewhere").mkdir(mode=0o700)
    if kind == "symlink":
        folder.symlink_to("elsewhere")
    else:
        folder.touch()
    with pytest.raises(ClusterError, match="is no folder"):
        RunFile("one")
