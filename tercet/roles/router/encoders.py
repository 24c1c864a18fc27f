"""Which encode workers make the embeddings of an attempt's images. Pure.

An image goes to the worker that has it, as far as is known here, within a bound on how much more that one has to do
than others (consistent hashing with bounded loads, Mirrokni et al., SODA 2018, with a table for the hash); others go
where least is to be done. So equal images meet at one worker, which encodes them once, and those of a request spread.
"""

from __future__ import annotations

from collections.abc import Sequence

from tercet.core import PromptImage
from tercet.roles.lru import Lru
from tercet.roles.router.directory import WorkerView
from tercet.roles.router.policy import History, Spread

MOST_AHEAD = 4096  # image tokens that the worker that has an image may have to do more than the least loaded one
MOST_KNOWN = 1 << 16  # images of which it is known who has them


class Holders:
    """Which worker was sent an image last; it may have forgotten it, and then says so."""

    def __init__(self) -> None:
        self._of: Lru[bytes, WorkerView] = Lru(MOST_KNOWN, lambda *_: 1)  # digest -> worker

    def of(self, image: PromptImage) -> WorkerView | None:
        return self._of.get(image.digest)

    def sent(self, spread: Spread) -> None:
        for worker, images in spread.items():
            for image in images:
                self._of.put(image.digest, worker)


def spread(
    images: Sequence[PromptImage], workers: Sequence[WorkerView], holders: Holders, history: History
) -> Spread | None:
    """workers: live encode workers with room. None, so that a new round begins after a pause: there is none, or each
    has just rejected the request."""
    if workers and history.busy.issuperset(workers):
        history.busy.difference_update(workers)
        return None
    able = [view for view in workers if view not in history.busy]
    if not able:
        return None
    fewest = min(history.strikes[view] for view in able)
    able = [view for view in able if history.strikes[view] == fewest]
    todo = {view: view.tokens for view in able}
    chosen: dict[WorkerView, list[int]] = {}
    for number in sorted(range(len(images)), key=lambda i: -images[i].tokens):
        view = _choose(images[number], todo, holders)
        todo[view] += images[number].tokens
        chosen.setdefault(view, []).append(number)
    return {view: tuple(images[i] for i in sorted(numbers)) for view, numbers in chosen.items()}


def _choose(image: PromptImage, todo: dict[WorkerView, int], holders: Holders) -> WorkerView:
    least = min(todo, key=lambda view: (todo[view], view.info.worker_id))
    holder = holders.of(image)
    return holder if holder in todo and todo[holder] - todo[least] <= MOST_AHEAD else least
