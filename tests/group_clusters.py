"""Clusters whose workers have several ranks, all of them in this process, so that they start at once."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tercet.core import Role
from tercet.roles.rank import Rank
from tercet.spec import ClusterSpec, ParallelSpec
from tests.helpers import TOKEN, LocalCluster, spec_of
from tests.tiny import save_tiny_model

HEADS, LAYERS, HEAD_DIM, BLOCK = 12, 5, 4, 16
Shape = tuple[int, int]  # tensor, pipeline
ALONE: Shape = (1, 1)


@functools.cache
def group_model(kv_heads: int, seed: int = 11) -> str:
    """-> the directory of a random Llama whose sizes are shared unevenly by most groups."""
    directory = Path(tempfile.mkdtemp(prefix="tercet-group-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    sizes = {"hidden_size": HEADS * HEAD_DIM, "intermediate_size": 100, "num_hidden_layers": LAYERS}
    save_tiny_model(directory, seed, **sizes, num_attention_heads=HEADS, num_key_value_heads=kv_heads)
    return str(directory)


def shaped(spec: ClusterSpec, kernels: str = "auto", **shapes: Shape) -> ClusterSpec:
    """shapes: role -> its shape, the others alone."""
    roles = {
        role: its.model_copy(
            update={
                "parallelism": ParallelSpec(**dict(zip(("tensor", "pipeline"), shapes.get(role, ALONE), strict=True))),
                "kernels": kernels,
            }
        )
        for role, its in spec.roles.items()
    }
    return spec.model_copy(update={"roles": roles})


def aggregated(shape: Shape, kernels: str = "auto", kv_heads: int = HEADS, **changes: object) -> ClusterSpec:
    changes = {"source": group_model(kv_heads)} | changes
    return shaped(spec_of("aggregated", decoders=1, **changes), kernels, aggregated=shape)


def handing_over(
    prefill: Shape, decode: Shape, kernels: str = "auto", kv_heads: int = HEADS, **changes: object
) -> ClusterSpec:
    changes = {"source": group_model(kv_heads), "decoders": 1} | changes
    return shaped(spec_of("pd", **changes), kernels, prefill=prefill, decode=decode)


class Groups(LocalCluster):
    async def start(self) -> None:
        self.members: list[Rank] = []
        self.joining: list[asyncio.Task[None]] = []
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(32))  # ranks wait for each other on threads
        await super().start()
        await asyncio.gather(*self.joining)

    def _start_rank(self, name: str, rank: int, role: Role, endpoint: str) -> None:
        member = Rank(name, rank, role, 1, self.spec, "127.0.0.1", TOKEN, (), lambda _: None)
        self.members.append(member)
        self.joining.append(asyncio.create_task(member.start(endpoint)))

    async def stop(self) -> None:
        await super().stop()
        await asyncio.gather(*(member.stop() for member in self.members))


@contextlib.asynccontextmanager
async def groups(spec: ClusterSpec) -> AsyncIterator[Groups]:
    made = Groups(spec)
    await made.start()
    try:
        yield made
        await made.settled()
    finally:
        await made.stop()


def shapes(most_tensor: int, most_pipeline: int) -> Iterator[Shape]:
    return ((t, p) for t in range(1, most_tensor + 1) for p in range(1, most_pipeline + 1))
