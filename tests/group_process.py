"""Rank 0 of a worker of several ranks in a process of its own, so that a test can kill or stop it.

`python -m tests.group_process` reads a JSON list [worker id, role, epoch, spec as JSON, token] on stdin, prints the
endpoint that the other ranks join, then its WorkerInfo as JSON, and serves until stdin ends. As the controller does
with it, it ends once its group is broken.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import asdict

from tercet.core import Role
from tercet.errors import ClusterError, WorkerLost
from tercet.roles.worker import Worker
from tercet.spec import ClusterSpec

LINGER_S = 2.0  # until who waits for a leg has heard of its end


async def end_when_broken(worker: Worker) -> None:
    while True:
        try:
            await worker.health()
        except (ClusterError, WorkerLost):
            await asyncio.sleep(LINGER_S)
            os._exit(1)
        await asyncio.sleep(0.1)


async def main() -> None:
    worker_id, role, epoch, spec, token = json.loads(sys.stdin.readline())
    worker = Worker(worker_id, Role(role), epoch, ClusterSpec.model_validate_json(spec), "127.0.0.1", token)
    print(json.dumps(await worker.listen()), flush=True)
    print(json.dumps(asdict(await worker.start())), flush=True)
    watching = asyncio.create_task(end_when_broken(worker))
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    watching.cancel()
    await worker.stop()


if __name__ == "__main__":
    asyncio.run(main())
