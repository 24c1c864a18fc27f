"""The files that say which clusters are served here: what lies in their way, and who comes at the same moment."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tercet.cluster import run_file
from tercet.cluster.run_file import RunFile, Served
from tercet.errors import ClusterError

ROUNDS = 200


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path / f"tercet-{os.getuid()}"


def at_once(*works: Callable[[], None]) -> list[BaseException]:
    """Run them in threads. -> what they raised"""
    raised: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def test_a_cluster_is_found_at_every_moment():
    def look() -> None:
        for _ in range(ROUNDS):
            assert run_file.find("one").pid

    def write() -> None:
        for n in range(ROUNDS):
            mine.write(Served("one", 1, http_url="http://127.0.0.1:8000" * (n % 3)))

    with RunFile("one") as mine:
        assert at_once(look, write) == []


def test_the_next_one_is_not_removed_with_the_last():
    def serve() -> None:
        done = 0
        while done < ROUNDS // 2:
            with contextlib.suppress(ClusterError), RunFile("one"):
                assert run_file.served()
                done += 1

    assert at_once(serve, serve) == []


def test_who_took_the_name_of_a_removed_file_keeps_it(folder):
    """As after something has cleaned the folder for temporary files."""
    with contextlib.ExitStack() as later:
        with RunFile("one"):
            (folder / "one.json").unlink()
            later.enter_context(RunFile("one"))
        assert [found.name for found in run_file.served()] == ["one"]
    assert run_file.served() == []


@pytest.mark.parametrize(
    "left",
    [
        b"[" * 60000,
        b"[1]",
        b"\xff\xfe{",
        b'{"name": 5, "pid": 1}',
        b'{"name": "one", "pid": "x"}',
        b'{"name": "one", "pid": 1, "ray_folder": 7}',
        b'{"name": "one", "pid": 1, "ray_folder": "/x", "ray_session": "a"}',
        b'{"name": "one", "pid": 1, "ray_environment": []}',
        b'{"name": "one", "pid": 1, "new": 1}',
    ],
)
def test_what_cannot_be_read_was_left_by_nobody(folder, left):
    folder.mkdir(mode=0o700, exist_ok=True)
    (folder / "one.json").write_bytes(left)
    with RunFile("one"):
        assert [found.pid for found in run_file.served()] == [os.getpid()]


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.symlink_to("else"), os.mkfifo])
def test_what_is_no_run_file_is_no_cluster_and_in_the_way_of_one(folder, make):
    folder.mkdir(mode=0o700)
    make(folder / "one.json")
    assert run_file.served() == []
    with pytest.raises(ClusterError, match=r"one\.json cannot be used: "), RunFile("one"):
        pass


def test_a_full_disk_leaves_what_stood_there(monkeypatch):
    def full(*_: object) -> int:
        raise OSError(28, os.strerror(28))

    with RunFile("one") as mine:
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", full)
            with pytest.raises(ClusterError, match="No space left on device"):
                mine.write(Served("one", 1))
        assert run_file.find("one").pid == os.getpid()


def test_the_folder_is_where_tmpdir_says_or_nowhere(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where Python would rather go, on a full disk
    monkeypatch.setenv("TMPDIR", "/proc/nowhere")
    with pytest.raises(ClusterError, match=r"/proc/nowhere/tercet-.*: No such file or directory"):
        run_file.find(None)
