"""A model that comes from a hub: a real server of files on loopback, and huggingface_hub in a process of its own."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.unit.test_models_families import FAMILIES, saved

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ASK = """
import json, sys
from tercet.models.sources import load_model
from tercet.spec import ModelSpec
for _ in range(2):
    heard = []
    load_model(ModelSpec(source="owner/model", dtype="float32"), hear=heard.append)
    print(json.dumps([[each.what, each.done, each.total] for each in heard]))
"""


def hub_of(folder: Path) -> type[BaseHTTPRequestHandler]:
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path.startswith("/api/models/owner/model/tree/"):
                listed = [{"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40} for name in files]
                return self._answer(json.dumps(listed).encode(), "application/json")
            if path.startswith("/api/models/owner/model"):
                siblings = [{"rfilename": name} for name in files]
                told = {"id": "owner/model", "sha": COMMIT, "siblings": siblings}
                return self._answer(json.dumps(told).encode(), "application/json")
            body = files.get(path.removeprefix(f"/owner/model/resolve/{COMMIT}/"))
            if body is None:
                return self.send_error(404)
            return self._answer(body, "application/octet-stream")

        def _answer(self, body: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *words: object) -> None:
            pass

    return Hub


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Its URL, and the folder that it gives."""
    folder = tmp_path / "given"
    saved(FAMILIES["llama"], folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), hub_of(folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    server.server_close()


def test_what_is_fetched_and_then_read_is_told(hub, tmp_path):
    url, folder = hub
    environment = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert "%" not in done.stderr  # no bar is drawn into a worker's log
    heard, again = map(json.loads, done.stdout.splitlines())
    bytes_, tensors = ([each for each in heard if each[0] == what] for what in ("bytes fetched", "tensors read"))
    assert heard == bytes_ + tensors
    assert bytes_[-1][1] >= (folder / "model.safetensors").stat().st_size
    assert all(one[1] < other[1] for one, other in itertools.pairwise(bytes_))
    assert [each[1:] for each in tensors] == [[done, len(tensors)] for done in range(1, len(tensors) + 1)]
    assert again == tensors  # it is here
