"""Rank 1, 2 ... of a worker in a process of its own, so that a test can kill or stop it.

`python -m tests.rank_process` reads a JSON list [worker id, rank, role, epoch, spec as JSON, token, endpoint of rank 0]
on stdin, joins, and serves until rank 0 is gone or stdin ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys

from tercet.core import Role
from tercet.roles.rank import Rank
from tercet.spec import ClusterSpec


async def main() -> None:
    worker_id, rank, role, epoch, spec, token, endpoint = json.loads(sys.stdin.readline())
    parsed = ClusterSpec.model_validate_json(spec)
    made = Rank(worker_id, rank, Role(role), epoch, parsed, "127.0.0.1", token, (), lambda _: os._exit(1))
    await made.start(endpoint)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await made.stop()


if __name__ == "__main__":
    asyncio.run(main())
