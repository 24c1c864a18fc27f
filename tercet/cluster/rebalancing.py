"""Keeps the experts of one worker's ranks where they should lie: looks at what the ranks count, has a placement solved
in another process, and has the ranks move to it if it gains enough on counts that it was not solved on.

    look ─window_size steps─> window ─step_interval steps─> solve ─gain─> move ─> its end is reported
          a rank is lost ────────────────────────────────────^ for the others, at once
                              window ─dispatch_interval steps─> solve shares ─gain─> have ranks take replicas by them

It never ends a worker: what fails is said, kept in `Slot.placing`, and tried again an interval later.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from tercet.cluster.members import Running, Slot
from tercet.cluster.solver import solve_apart
from tercet.cluster.windows import Longs, Look, Rows, counts_of, look_at, of_ranks, rows_between
from tercet.core import Moves, Role
from tercet.errors import InternalError, TercetError
from tercet.placement.expert_counts import Counts, Floats
from tercet.spec import ClusterSpec, ExpertPlacementSpec

log = logging.getLogger(__name__)
LOOK_S = 1.0  # between two looks
ANSWER_S = 10.0
AGAIN_S = 5.0  # until a placement without a lost rank is tried again
PATIENCE = 8  # intervals; traffic that alternates never settles. It doubles each time
MOST_DOUBLED = 4  # times, of `dispatch_interval`
DRIFT = 0.02  # of the rows of a layer that are at other experts, beyond what windows differ by


async def keep_placed(slot: Slot, actor: Running, spec: ClusterSpec, report: Callable[[str], None]) -> None:
    """Never returns. Keeps a member's experts where they should lie, if it has any on several ranks."""
    role = spec.roles.get(Role(slot.member.role)) if slot.member.role else None
    if role is None or role.parallelism.expert == 1:
        await asyncio.Event().wait()
    else:
        await Rebalancing(slot, actor, role.expert_placement, report).run()


class Rebalancing:
    def __init__(self, slot: Slot, actor: Running, wanted: ExpertPlacementSpec, report: Callable[[str], None]) -> None:
        self._slot, self._actor, self._wanted, self._report = slot, actor, wanted, report
        self._before: Look | None = None  # where the window that is open began
        self._windows: list[Rows] = []
        self._solved_at = self._shared_at = 0  # steps
        self._fruitless = 0  # solutions of shares in a row that gained too little; each doubles the time to the next
        self._known: Floats | None = None  # shares of experts that the last placement was solved for
        self._placed: Longs | None = None  # where experts are since
        self._skipped, self._patience = 0, PATIENCE  # times that something was to gain, and nothing was looked for
        self._not_before = 0.0  # time.monotonic(): another try without a lost rank
        self._lost: list[int] = []  # ranks that the last placement was solved without
        self._moves = self._told = Moves()  # as last seen; and when an end of one was last told
        self._solves, self._failures = 0, 0
        self._last: dict[str, Any] = {}  # of the last placement found (`told_of`)

    async def run(self) -> NoReturn:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self._look()
            except TercetError as error:  # whether the worker lives, others watch
                self._failed(error)
            except Exception as error:  # a fault of ours, which must not end the worker, nor pass unsaid
                log.error("experts could not be placed anew", exc_info=error)
                self._failed(InternalError(f"unexpected {type(error).__name__}: {error}"))

    # ---- looks

    async def _look(self) -> None:
        """Raises TercetError."""
        self._tell_moves()
        if self._stays and self._wanted.dispatch_interval is None:
            self._note("policy none: experts stay where they are")
            return
        if self._moves.live:
            return
        routed = await self._actor.call("routed", timeout_s=ANSWER_S)
        look = look_at(routed, self._slot.info.pid, self._slot.info.node, self._actor.others)
        lost = [rank for rank, pid in enumerate(look.pids) if not pid]
        before = self._before
        if before is None or not np.array_equal(before.routed.phy2log, look.routed.phy2log):
            self._begin(look)
        elif lost:
            if lost != self._lost and self._windows and not self._stays and time.monotonic() > self._not_before:
                await self._solve(look, lost)
        else:
            self._lost = []
            await self._go_on(before, look)

    @property
    def _stays(self) -> bool:
        return self._wanted.policy == "none"

    def _begin(self, look: Look) -> None:
        """Counts of another placement say nothing of how even this one is."""
        self._before, self._windows = look, []
        self._solved_at = self._shared_at = look.routed.steps
        if self._placed is None or not same_ranks(self._placed, look.routed.phy2log, look.routed.ranks):
            self._known = None

    async def _go_on(self, before: Look, look: Look) -> None:
        if look.routed.steps - before.routed.steps < self._wanted.window_size:
            return
        self._before = look
        if (rows := rows_between(before, look)) is not None and rows.load.any():
            most = self._wanted.step_interval // self._wanted.window_size  # older ones are of other traffic
            self._windows = [*self._windows, rows][-most:]
        steps, interval = look.routed.steps, self._wanted.dispatch_interval
        if len(self._windows) < 2:
            return
        if not self._stays and steps - self._solved_at >= self._wanted.step_interval:
            await self._solve(look, [])
        elif interval is not None and steps - self._shared_at >= interval << min(self._fruitless, MOST_DOUBLED):
            await self._share(look, self._windows[-max(2, interval // self._wanted.window_size) :])

    # ---- a placement

    async def _solve(self, look: Look, lost: list[int]) -> None:
        """Raises TercetError."""
        self._solved_at, self._lost = look.routed.steps, lost
        counts = counts_of(self._slot.member_id, look, self._windows, 0.0)
        live = [rank for rank in range(counts.ranks) if rank not in lost]
        if lost:
            counts = of_ranks(counts, live)
        elif (most := self._most(counts)) < self._wanted.min_gain:
            self._note(f"kept: ranks are even, with at most {most:.1%} to gain")
            return
        elif self._known is not None and not has_drifted(self._known, counts) and self._skipped < self._patience:
            self._skipped += 1
            self._note(f"kept: at most {most:.1%} to gain, but traffic is that of the last placement, or still changes")
            return
        wanted = self._wanted.model_copy(update={"objective": "balance"}) if lost else self._wanted
        if wanted.objective != "balance" and counts.nodes == 1:
            self._note(
                f"kept: all ranks are on one node, or not laid out node by node: {wanted.objective} has no effect"
            )
            return
        found = await solve_apart(counts, wanted)
        self._patience = 2 * self._patience if self._skipped >= self._patience else PATIENCE
        self._solves, self._skipped = self._solves + 1, 0
        self._known, self._placed = shares(counts.load[:-1]), look.routed.phy2log
        told = self._last = told_of(found, wanted.objective)
        if found["survives_a_rank"] == {"before": True, "after": False}:
            self._note("kept: the group would not survive the loss of a rank with what was found")
        elif told["gain"] < self._wanted.min_gain:
            self._note(f"kept: what was found would gain {told['gain']:.1%}")
        else:
            layers = await self._move(look, live, found)
            self._shared_at, self._fruitless = look.routed.steps, 0
            counted = "busiest ranks" if wanted.objective == "balance" else f"what {wanted.objective} counts"
            moved = f"layers placed anew: {layers}" if layers else "shares of replicas set anew, and no expert moves"
            outcome = f"{moved}; {counted} {-told['gain']:+.1%} on held-out counts"
            self._note(outcome)
            self._say(f"{outcome}; solved in {told['seconds']:.2f} s")

    async def _share(self, look: Look, windows: Sequence[Rows]) -> None:
        """Raises TercetError."""
        self._shared_at = look.routed.steps
        counts = counts_of(self._slot.member_id, look, windows, 0.0)
        if self._most(counts) < self._wanted.min_gain:
            return
        found = await solve_apart(counts, self._wanted, keep=True)
        self._solves += 1
        told = self._last = told_of(found, "balance")
        if told["gain"] < self._wanted.min_gain:
            self._fruitless += 1
            self._note(f"shares kept: others would gain {told['gain']:.1%}")
        else:
            self._fruitless = 0
            await self._move(look, range(look.routed.ranks), found, shares_only=True)
            outcome = f"shares of replicas set anew: busiest ranks {-told['gain']:+.1%} on held-out counts"
            self._note(outcome)
            self._say(outcome)

    def _most(self, counts: Counts) -> float:
        """What may be gained at most, as far as that is known before it is solved."""
        return most_to_gain(counts) if self._wanted.objective == "balance" else 1.0

    async def _move(
        self, look: Look, live: Sequence[int], found: Mapping[str, Any], *, shares_only: bool = False
    ) -> int:
        """found: for ranks that live; a lost one will have what it had, and no shares. shares_only: it is refused if
        experts lie elsewhere by now. -> layers. Raises TercetError."""
        rows, shares = look.routed.phy2log.copy(), found["shares"]
        per_rank = rows.shape[1] // look.routed.ranks
        slots = [rank * per_rank + slot for rank in live for slot in range(per_rank)]
        rows[:, slots] = found["phy2log"]
        if shares is not None:
            every = np.zeros((len(rows), len(shares[0]), rows.shape[1]), np.int64)
            every[:, :, slots] = shares
            shares = every.tolist()
        self._placed = rows
        layers: int
        layers, _ = await self._actor.call("move_experts", rows.tolist(), shares, shares_only, timeout_s=ANSWER_S)
        return layers

    def _forget(self) -> None:
        """What was found is not where experts are: it is to be looked for again."""
        self._known, self._lost, self._not_before = None, [], time.monotonic() + AGAIN_S

    # ---- what others hear

    def _tell_moves(self) -> None:
        moves = getattr(self._slot.status, "moves", None) or Moves()
        before, self._moves = self._told, moves
        if (moves.done, moves.failed) == (before.done, before.failed):
            return
        self._told = moves
        moved = f"{moves.moved_bytes - before.moved_bytes:,} bytes in {moves.seconds:.2f} s"
        if moves.epoch > before.epoch and moves.done > before.done:
            self._say(f"experts have moved: {moved}, longest pause so far {moves.longest_pause_s * 1e3:.1f} ms")
        if moves.failed > before.failed:
            self._forget()
            self._say(f"experts could not be moved, and it serves on with them where they are: {moves.alarm}")

    def _failed(self, error: TercetError) -> None:
        said = f"{error.code()}: {error}"
        self._failures += 1
        self._forget()
        if said != self._slot.placing.get("outcome"):
            self._say(f"experts were not placed anew: {said}")
        self._note(said)

    def _note(self, outcome: str) -> None:
        counted = {"solves": self._solves, "failures": self._failures}
        self._slot.placing = {"outcome": outcome} | counted | self._last

    def _say(self, what: str) -> None:
        self._report(f"{self._slot.title}: {what}")


def told_of(found: Mapping[str, Any], objective: str) -> dict[str, Any]:
    """found: what `tercet experts solve --json` says. gain: of the busiest ranks' rows, or of what leaves its node,
    by the window that it is judged by; gap: of the worst layer, to the bound of all placements, if it has one."""
    gaps = [layer["gap"] for layer in found["layers"] if layer["gap"] is not None]
    if objective == "balance":
        before, after = max(found["before"]["busiest"], 1.0), found["after"]["busiest"]
    else:
        counted = found["cross_node" if objective == "internode" else "node_copies"]
        before, after = counted["before"], counted["after"]
    return {
        "gain": 1 - after / before if before else 0.0,
        "gap": max(gaps, default=None),
        "seconds": sum(layer["seconds"] for layer in found["layers"]),
        "bytes": found["fetched_bytes"],
    }


def shares(load: Longs) -> Floats:
    """load [windows, S, L, n] -> [L, n] of all rows of a layer."""
    rows = load.sum(axis=(0, 1)).astype(np.float64)
    found: Floats = rows / np.maximum(rows.sum(axis=1, keepdims=True), 1.0)
    return found


def has_drifted(known: Floats, counts: Counts) -> bool:
    """Whether the last window is further from what is known than from the windows before it, which it differs from by
    chance, or because traffic changes right now: then a placement would be solved for what is over."""
    last, before = shares(counts.load[-1:]), shares(counts.load[:-1])
    far, near = (float(np.abs(last - other).sum(axis=1).mean()) / 2 for other in (known, before))
    return far > near + DRIFT


def same_ranks(one: Longs, other: Longs, ranks: int) -> bool:
    """Whether each rank has the same experts in both, phy2log [L, P], in whatever slots."""
    first, second = (np.sort(each.reshape(len(each), ranks, -1), axis=2) for each in (one, other))
    return np.array_equal(first, second)


def most_to_gain(counts: Counts) -> float:
    """Of the rows of each layer's busiest rank in the last window: what there would be without them if all ranks had
    as many."""
    rows = counts.computed[-1]
    busiest = float(rows.max(axis=1).sum())
    return 1 - float(rows.mean(axis=1).sum()) / busiest if busiest else 0.0
