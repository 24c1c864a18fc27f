"""Ranks that a group goes on without: in which order the others hear of it."""

from __future__ import annotations

import threading
from types import SimpleNamespace, TracebackType

from tercet.errors import WorkerLost
from tercet.roles.losses import Hooks, Losses


class Talk:
    rank, over = 1, False

    def tell(self, *_: object) -> None: ...

    def close(self) -> None:
        self.over = True


class LostAgain:
    """In place of the lock: the moment that it is free, the reading thread of the rank that is back finds its end."""

    def __init__(self, losses: Losses) -> None:
        self._losses, self._real, self._armed = losses, losses._changing, True

    def __enter__(self) -> None:
        self._real.acquire()

    def __exit__(self, kind: type | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        self._real.release()
        if self._armed:
            self._armed = False
            self._losses.lose(1, WorkerLost("again"))


def test_one_that_is_lost_the_moment_it_is_back_is_out_in_the_end():
    heard, third = list[str](), threading.Event()

    def out(rank: int, error: WorkerLost) -> None:
        heard.append(f"out: {error}")
        if len(heard) == 3:
            third.set()

    owner = SimpleNamespace(talks={1: Talk()}, fail=lambda error: heard.append(f"failed: {error}"))
    executor = SimpleNamespace(lose=lambda rank, attempt: None)
    losses = Losses(owner, executor, SimpleNamespace(survives=lambda ranks: True), SimpleNamespace(), 5.0)
    losses._take_back_all = lambda: None  # type: ignore[method-assign]  # the test brings it back
    losses.start(Hooks(out, lambda talk: heard.append("back")), "same")
    losses.lose(1, WorkerLost("once"))
    while 1 in owner.talks:
        pass
    losses._changing = LostAgain(losses)  # type: ignore[assignment]
    losses._tell_all(Talk(), "endpoint", lambda: None)
    assert third.wait(10)
    losses.close()
    assert heard == ["out: once", "back", "out: again"]
