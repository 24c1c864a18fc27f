"""The examples run as they are printed."""

import asyncio
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


def test_every_example_is_run():
    assert len(list(EXAMPLES.glob("*.py"))) == 3
