"""Solves where experts should lie in a process of its own: a solver that hangs or dies costs a placement, and nothing
else. It is `tercet experts solve`, so what the controller does can be done again by hand."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tercet.cluster.counts_file import write_counts
from tercet.errors import ClusterError
from tercet.placement.expert_counts import Counts
from tercet.spec import ExpertPlacementSpec

START_S = 30.0  # beyond its own limit, to import what it needs and to say what it found
NICE = 10  # it yields to ranks on the same cores
RUN = f"import os; os.nice({NICE}); from tercet.cluster.cli import main; main()"


async def solve_apart(counts: Counts, wanted: ExpertPlacementSpec, *, keep: bool = False) -> Mapping[str, Any]:
    """keep: experts stay, only shares of replicas are solved. -> what `tercet experts solve --json` says. Raises
    ClusterError."""
    try:
        return await _solve(counts, wanted, _options(wanted, keep=keep))
    except OSError as error:
        raise ClusterError(f"the solver could not be run: {error}") from error


async def _solve(counts: Counts, wanted: ExpertPlacementSpec, options: Sequence[str]) -> Mapping[str, Any]:
    loop = asyncio.get_running_loop()
    with tempfile.TemporaryDirectory(prefix="tercet-experts-") as folder:
        file = Path(folder) / "counts.npz"
        await loop.run_in_executor(None, write_counts, file, counts)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", RUN, "experts", "solve", str(file), "--json", *options),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        limit_s = wanted.time_limit_s + START_S
        try:
            async with asyncio.timeout(limit_s):
                out, said = await process.communicate()
        except TimeoutError as error:
            raise ClusterError(f"the solver was ended after {limit_s:g} s without an answer") from error
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    if process.returncode:
        last = said.decode(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
        raise ClusterError(f"the solver ended with {process.returncode}: {last[0]:.400}")
    try:
        found: Mapping[str, Any] = json.loads(out)
    except ValueError as error:
        raise ClusterError(f"the solver's answer is no JSON: {out[:80]!r}") from error
    return found


def _options(wanted: ExpertPlacementSpec, *, keep: bool) -> list[str]:
    policy = "keep" if keep else wanted.policy
    by_shares = policy != "eplb" and (wanted.dispatch_interval is not None or wanted.objective != "balance")
    given = {
        "policy": policy,
        "objective": wanted.objective,
        "dispatch": "weighted" if by_shares else "even",
        "time-limit": wanted.time_limit_s,
    }
    if wanted.max_moved_bytes is not None and not keep:
        given["max-moved-bytes"] = wanted.max_moved_bytes
    return [f"--{name}={value}" for name, value in given.items()]
