"""The examples run as they are printed."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.gateway import running
from tests.fakes.router import FakeRouter

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("name", ["python_client.py", "openai_client.py", "grpc_client.py"])
async def test_example(name):
    async with running(FakeRouter("It is Paris.")) as (_, info):
        address = info.grpc_address if "grpc" in name else info.http_url
        command = (sys.executable, "-W", "error", EXAMPLES / name, address)
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        out, _ = await process.communicate()
    assert process.returncode == 0
    assert out.decode().startswith("It is Paris.\n")


@pytest.mark.parametrize("name", ["python_client.py", "openai_client.py", "grpc_client.py"])
def test_an_example_without_a_server_ends_in_a_line(name):
    address = "127.0.0.1:1" if "grpc" in name else "http://127.0.0.1:1"
    command = [sys.executable, EXAMPLES / name, address]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)


def test_every_client_is_run():
    assert len(list(EXAMPLES.glob("*_client.py"))) == 3
