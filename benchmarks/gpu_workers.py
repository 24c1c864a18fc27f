"""Workers in processes of their own on one device, without Ray, and a router before them.

`python -m benchmarks.gpu_workers ROLE` is one of them: its spec comes on stdin, its info goes out on stdout, and it
ends with stdin.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import asdict

from tercet.core import Role, WorkerInfo
from tercet.roles.router.router import Router
from tercet.roles.worker import Worker
from tercet.spec import ClusterSpec

SECRET = "gpu-check"  # noqa: S105  # all sides run here
START_S = 120.0  # kernels are compiled meanwhile


async def serve(role: Role) -> None:
    loop = asyncio.get_running_loop()
    spec = ClusterSpec.model_validate_json(sys.stdin.readline(), strict=False)
    worker = Worker(f"{role}-0", role, 1, spec, "127.0.0.1", SECRET)
    print("info", json.dumps(asdict(await worker.start())), flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    await worker.stop()


class WorkerProcess:
    def __init__(self, role: Role, spec: ClusterSpec) -> None:
        self._role, self._spec = role, spec

    async def __aenter__(self) -> WorkerInfo:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "benchmarks.gpu_workers", self._role, stdin=-1, stdout=-1
        )
        try:
            return await self._started()
        except BaseException:
            self._process.kill()
            raise

    async def _started(self) -> WorkerInfo:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(self._spec.model_dump_json().encode() + b"\n")
        async with asyncio.timeout(START_S):
            async for line in self._process.stdout:
                if line.startswith(b"info "):
                    info = json.loads(line.removeprefix(b"info "))
                    return WorkerInfo(**info | {"role": self._role})
        raise RuntimeError(f"the {self._role} worker ended before it was up; see its words above")

    async def __aexit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(20.0):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


@contextlib.asynccontextmanager
async def cluster(spec: ClusterSpec) -> AsyncIterator[Router]:
    """A worker of each role."""
    async with AsyncExitStack() as stack:
        # Prefill last: who sends ends first.
        started = [stack.enter_async_context(WorkerProcess(role, spec)) for role in reversed(spec.roles)]
        router = Router(spec, SECRET)
        await router.set_workers([await worker for worker in started])
        stack.push_async_callback(router.close)
        yield router


if __name__ == "__main__":
    asyncio.run(serve(Role(sys.argv[1])))
