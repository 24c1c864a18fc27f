"""A worker in a process of its own, so that a test can kill or stop it.

`python -m tests.worker_process` reads a JSON list [worker id, role, epoch, spec as JSON, token] on stdin, prints its
WorkerInfo as JSON, and serves until stdin ends.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict

from tercet import logs
from tercet.core import Role
from tercet.roles.worker import Worker
from tercet.spec import ClusterSpec


async def main() -> None:
    worker_id, role, epoch, spec, token = json.loads(sys.stdin.readline())
    read = ClusterSpec.model_validate_json(spec)
    logs.configure(read.logging, worker=worker_id, role=role, epoch=epoch)
    worker = Worker(worker_id, Role(role), epoch, read, "127.0.0.1", token)
    print(json.dumps(asdict(await worker.start())), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await worker.stop()


if __name__ == "__main__":
    asyncio.run(main())
