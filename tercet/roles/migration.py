"""Rank 0's side of moving experts to other ranks of the group while it serves (expert_mover.py is each rank's).

    start(rows) ─> for each layer that changes:  stage ─> take, give, in rounds ─> commit, between two steps
                                                   any failure, or the deadline ─> drop: the layer stays as it is
                ─> share: which replicas rows take, at all ranks

A layer is switched at all ranks behind the same step, or at none. Those that were switched before a failure stay
switched, since each is a placement of its own. Nobody waits for a move: `moves` says how it goes, and why one failed.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch

from tercet.core import Moves
from tercet.distributed.place import Place
from tercet.distributed.talk import Talk
from tercet.engine.group import GroupExecutor
from tercet.errors import Cancelled, ClusterError, DeadlineExceeded, InternalError, TercetError
from tercet.models.shard import Shard
from tercet.models.transformer import Transformer
from tercet.placement.expert_moves import fetches, rounds, settled
from tercet.placement.expert_shares import resettled
from tercet.roles.expert_mover import ExpertMover
from tercet.roles.losses import Losses

LAYER_S = 60.0  # for a layer to be ready at all ranks
GRACE_S = 2.0  # beyond that, until the move is taken for stuck
ANSWER_S = 10.0  # for what needs no other rank
STOP_S = 5.0  # for the last move to end
log = logging.getLogger(__name__)
Shares = list[tuple[int, list[list[int]]]]  # of layers


class Owner(Protocol):
    """The group."""

    place: Place
    talks: dict[int, Talk]  # rank -> of those that take part
    placing: threading.Lock  # held while experts move, or a rank comes back
    losses: Losses | None


class Migration:
    def __init__(
        self, owner: Owner, own: ExpertMover, executor: GroupExecutor, model: Transformer, worker_epoch: int
    ) -> None:
        """own, model: rank 0's."""
        assert model.ranks.spread is not None, "its experts are not spread"
        self._owner, self._own, self._executor = owner, own, executor
        self._config, self._spread, self._worker_epoch = model.config, model.ranks.spread, worker_epoch
        self._moves = Moves()
        self._number = 0  # of the last move
        self._began = 0.0  # the last move, time.monotonic()
        self._closed = False
        self._alike = True  # all ranks have the same shares of replicas
        self._live = 0  # the move that may still switch layers; 0: none
        self._thread: threading.Thread | None = None  # of the last move
        self._deciding = threading.Lock()  # whether it still may

    @property
    def moves(self) -> Moves:
        """Any thread."""
        return self._moves

    def start(
        self,
        rows: Sequence[Sequence[int]],
        shares: Sequence[Sequence[Sequence[int]]] | None = None,
        *,
        shares_only: bool = False,
    ) -> tuple[int, int]:
        """Begin to place experts anew; rows: phy2log [L, P] of the L mixture layers; shares [L, nodes, P]: of replicas,
        in the end; None: by turns; shares_only: refuse rows that are not those of now. -> how many layers change, and
        the number of the move; both 0 if nothing does. Any thread. Raises ClusterError if it is no placement, or
        experts move already, or a rank is coming back."""
        if self._closed or not self._owner.placing.acquire(blocking=False):
            raise ClusterError("experts are being moved already, or a rank is coming back; try again later")
        try:
            work, shared = self._changed(rows, shares)
            if work and shares_only:
                raise ClusterError("experts lie elsewhere than where these shares of replicas are for")
        except BaseException:
            self._owner.placing.release()
            raise
        if not work and self._alike and dict(shared) == self._spread.map.told_shares():
            self._owner.placing.release()
            return 0, 0
        with self._deciding:
            self._number += 1
            self._live, self._began = self._number, time.monotonic()
            self._moves = replace(self._moves, live=True, layers_left=len(work))
        self._thread = threading.Thread(
            target=self._run, args=(self._number, work, shared), name="experts-move", daemon=True
        )
        self._thread.start()
        return len(work), self._number

    def close(self) -> None:
        """Nothing is switched any more."""
        self._closed = True
        self._give_up(self._live, Cancelled("the worker stops"))
        if self._thread is not None:
            self._thread.join(STOP_S)
        self._own.close()

    def _changed(
        self, rows: Sequence[Sequence[int]], shares: Sequence[Sequence[Sequence[int]]] | None
    ) -> tuple[dict[int, list[int]], Shares]:
        """-> layer -> its row, of those that change; and the shares in the end."""
        assert self._config.mixture is not None, "its experts are spread"
        layers, placed = self._config.mixture.layers, self._spread.map
        slots = placed.phy2log.shape[1]
        if [len(row) for row in rows] != [slots] * len(layers):
            found = f"{len(rows)} layers of {', '.join(map(str, sorted({*map(len, rows)}))) or 'no'} slots"
            raise ClusterError(f"a placement of {found}; the worker has {len(layers)} layers with experts, of {slots}")
        wanted = {
            layer: settled(self._row(layer), row, placed.slots_per_rank)
            for layer, row in zip(layers, rows, strict=True)
        }
        made = placed.with_rows({layer: torch.tensor(row) for layer, row in wanted.items()}, self._config.num_layers)
        shared = [] if shares is None else self._shared(layers, rows, shares, wanted)
        made.with_shares(dict(shared))
        return {layer: row for layer, row in wanted.items() if row != self._row(layer)}, shared

    def _shared(
        self,
        layers: Sequence[int],
        rows: Sequence[Sequence[int]],
        shares: Sequence[Sequence[Sequence[int]]],
        wanted: Mapping[int, list[int]],
    ) -> Shares:
        """In the slots that experts get; of layers that have any."""
        slots = self._spread.map.phy2log.shape[1]
        if len(shares) != len(layers) or any(len(node) != slots for layer in shares for node in layer):
            raise ClusterError(f"shares of replicas for {len(shares)} layers; wanted: {len(layers)} of {slots} slots")
        return [
            (layer, resettled(row, its, wanted[layer], self._spread.map.slots_per_rank))
            for layer, row, its in zip(layers, rows, shares, strict=True)
            if any(map(any, its))
        ]

    def _row(self, layer: int) -> list[int]:
        placed = self._spread.map
        return [expert for rank in range(placed.ranks) for expert in placed.experts_on(rank, layer)]

    # ---- a move, on a thread of its own

    def _run(self, move: int, work: Mapping[int, list[int]], shares: Shares) -> None:
        asking = _Asking(self._owner, self._own)
        try:
            if work:
                with self._watched(move, "the links for experts"):
                    there = asking.all("begin", ANSWER_S, move)
            for layer, row in work.items():
                with self._watched(move, f"layer {layer}"):
                    self._layer(asking, move, layer, row, there)
            if shares or self._spread.map.shares or not self._alike:
                self._alike = False
                with self._watched(move, "shares of replicas"):
                    asking.all("share", LAYER_S, move, self._spread.epoch, shares)
                self._alike = True
        except TercetError as error:
            self._give_up(move, error)
        except Exception as error:  # whatever it is, the group goes on as it is, and it is told
            log.error("experts could not be moved", exc_info=error)
            self._give_up(move, InternalError(f"unexpected {type(error).__name__}: {error}"))
        else:
            self._end(move, None)
        finally:
            asking.everywhere("end", move)

    @contextlib.contextmanager
    def _watched(self, move: int, what: str) -> Iterator[None]:
        late = DeadlineExceeded(f"{what} was not ready after {LAYER_S + GRACE_S:g} s")
        watch = threading.Timer(LAYER_S + GRACE_S, self._give_up, (move, late))
        watch.daemon = True
        watch.start()
        try:
            yield
        except TercetError as error:
            self._give_up(move, type(error)(f"{what}: {error}"))
            raise
        finally:
            watch.cancel()

    def _layer(
        self, asking: _Asking, move: int, layer: int, row: list[int], there: Mapping[int, tuple[str, int]]
    ) -> None:
        """there: rank -> where its receiver listens, and how many experts it has room for."""
        deadline, moved = time.monotonic() + LAYER_S, 0
        asking.all("stage", LAYER_S, move, self._spread.epoch, layer, row)
        stage = next(self._owner.place.of(rank).stage_group for rank in there if layer in self._layers_of(rank))
        here = [rank - stage.start for rank in there if rank in stage]
        wanted = fetches(self._row(layer), row, self._spread.map.slots_per_rank, here)
        room = min(there[rank + stage.start][1] for rank in here)
        for number, batch in enumerate(rounds(wanted, room)):
            waited: list[Future[Any]] = []
            for (source, rank), each in batch.items():
                name, left_s = f"experts {move} {layer} {number} {source} {rank}", deadline - time.monotonic()
                giver, taker = source + stage.start, rank + stage.start
                into, out = [fetch.slot for fetch in each], [fetch.from_slot for fetch in each]
                to = self._worker_epoch, there[taker][0]
                waited += [
                    asking.one(taker, "take", left_s + GRACE_S / 2, move, name, layer, into, left_s),
                    asking.one(giver, "give", left_s + GRACE_S / 2, move, name, *to, layer, out, left_s),
                ]
            moved += sum(answer or 0 for answer in _answers(waited, deadline - time.monotonic() + GRACE_S))
        self._switch(move, layer, row, moved, deadline)

    def _layers_of(self, rank: int) -> tuple[int, ...]:
        return tuple(Shard(self._config, self._owner.place.of(rank)).mixture_layers)

    def _switch(self, move: int, layer: int, row: list[int], moved: int, deadline: float) -> None:
        """Raises ClusterError if the move was given up, or no step ends."""
        placed = self._spread.map.with_rows({layer: torch.tensor(row)}, self._config.num_layers)
        epoch, losses = self._spread.epoch + 1, self._owner.losses

        def commit() -> None:
            with self._deciding:
                if self._live != move:
                    raise ClusterError("this move was given up")
                put = self._own.commit(move, layer, epoch)
                if losses is None:
                    put()
                else:
                    losses.while_none_is_lost(placed, put)
                for talk in list(self._owner.talks.values()):
                    talk.tell("experts_commit", move, layer, epoch)
                left, total = self._moves.layers_left - 1, self._moves.moved_bytes + moved
                self._moves = replace(self._moves, epoch=epoch, layers_left=left, moved_bytes=total)

        pause_s = self._executor.between_steps(commit, deadline - time.monotonic())
        with self._deciding:
            self._moves = replace(self._moves, longest_pause_s=max(self._moves.longest_pause_s, pause_s))

    # ---- ends

    def _give_up(self, move: int, error: TercetError) -> None:
        """Nothing more of this move is switched, wherever it may hang. Any thread."""
        if self._end(move, error):
            log.error("no more experts are moved: %s", error)
            _Asking(self._owner, self._own).everywhere("drop", move)

    def _end(self, move: int, error: TercetError | None) -> bool:
        """error: None: it has done all. -> False: it has ended before."""
        with self._deciding:
            if not move or self._live != move:
                return False
            done, failed = self._moves.done + (error is None), self._moves.failed + (error is not None)
            alarm = "" if error is None else f"{error.code()}: {error}"
            ended = replace(self._moves, live=False, layers_left=0, seconds=time.monotonic() - self._began)
            self._live, self._moves = 0, replace(ended, ended=move, done=done, failed=failed, alarm=alarm)
            self._owner.placing.release()
            return True


class _Asking:
    """All ranks, at once, each its `ExpertMover`."""

    def __init__(self, owner: Owner, own: ExpertMover) -> None:
        self._talks, self._own = dict(owner.talks), own

    def one(self, rank: int, verb: str, timeout_s: float, *fields: object) -> Future[Any]:
        """On a thread that nobody has to wait for, not even the end of the process."""
        ask = partial(self._own.do, verb) if rank == 0 else partial(self._ask, rank, f"experts_{verb}", timeout_s)
        answer = Future[Any]()
        threading.Thread(target=_answered, args=(answer, ask, *fields), name="experts-ask", daemon=True).start()
        return answer

    def _ask(self, rank: int, kind: str, timeout_s: float, *fields: object) -> Any:
        return self._talks[rank].ask(kind, *fields, timeout_s=timeout_s)

    def all(self, verb: str, timeout_s: float, *fields: object) -> dict[int, Any]:
        """rank -> its answer. Raises the first error."""
        asked = {rank: self.one(rank, verb, timeout_s, *fields) for rank in (0, *self._talks)}
        return dict(zip(asked, _answers([*asked.values()], timeout_s + GRACE_S), strict=True))

    def everywhere(self, verb: str, move: int) -> None:
        """Also where it fails: one that is lost, or where the move is over."""
        asked = [self.one(rank, verb, ANSWER_S, move) for rank in (0, *self._talks)]
        wait(asked, 2 * ANSWER_S)


def _answers(asked: Sequence[Future[Any]], timeout_s: float) -> list[Any]:
    """Of all, or the first error, as soon as there is one. Raises DeadlineExceeded, too."""
    ended, left = wait(asked, timeout_s, FIRST_EXCEPTION)
    for answer in ended:
        answer.result()
    if left:
        raise DeadlineExceeded(f"{len(left)} of {len(asked)} ranks did not answer in {timeout_s:.1f} s")
    return [answer.result() for answer in asked]


def _answered(answer: Future[Any], ask: Callable[..., Any], *fields: object) -> None:
    try:
        answer.set_result(ask(*fields))
    except Exception as error:  # noqa: BLE001  # who waits for it gets it
        answer.set_exception(error)
