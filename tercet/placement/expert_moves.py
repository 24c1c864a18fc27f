"""How a layer of experts gets from one placement to another: what stays in its slot, what a rank fetches from whom, and
in which rounds. Ranks and slots are those of the placement: slot s lies on rank s // slots_per_rank."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from tercet.errors import ClusterError


class Fetch(NamedTuple):
    """The weights of an expert; slots are numbered within their ranks."""

    source: int
    from_slot: int
    rank: int
    slot: int


def settled(old: Sequence[int], new: Sequence[int], slots_per_rank: int) -> list[int]:
    """The new row [P] of phy2log, with what a rank keeps in the slots where it is. Which of its slots an expert has is
    of no matter."""
    found: list[int] = []
    for at in range(0, len(new), slots_per_rank):
        had, left = old[at : at + slots_per_rank], Counter(new[at : at + slots_per_rank])
        kept: list[int | None] = []
        for expert in had:
            stays = left[expert] > 0
            left[expert] -= stays
            kept.append(expert if stays else None)
        rest = left.elements()
        found += [next(rest) if expert is None else expert for expert in kept]
    return found


def fetches(old: Sequence[int], new: Sequence[int], slots_per_rank: int, there: Collection[int]) -> list[Fetch]:
    """What each rank that is there lacks, from the one that gives the fewest so far. Raises ClusterError for an expert
    that none of them has."""
    held = {rank: old[rank * slots_per_rank : (rank + 1) * slots_per_rank] for rank in sorted(there)}
    given, found = Counter[int](), list[Fetch]()
    for rank, has in held.items():
        for slot, expert in enumerate(new[rank * slots_per_rank : (rank + 1) * slots_per_rank]):
            if expert in has:
                continue
            sources = [other for other, its in held.items() if expert in its]
            if not sources:
                raise ClusterError(f"no rank that is there has expert {expert}")
            source = min(sources, key=lambda other: given[other])
            given[source] += 1
            found.append(Fetch(source, held[source].index(expert), rank, slot))
    return found


def rounds(wanted: Sequence[Fetch], room: int) -> Iterator[dict[tuple[int, int], list[Fetch]]]:
    """(source, rank) -> at most `room` fetches, such that in a round each rank has one peer, in both directions. Pairs
    with most to do go first."""
    left = defaultdict[tuple[int, int], list[Fetch]](list)
    for each in wanted:
        left[each.source, each.rank].append(each)
    while left:
        peers: dict[int, int] = {}
        batch: dict[tuple[int, int], list[Fetch]] = {}
        for pair in sorted(left, key=lambda pair: (-len(left[pair]), pair)):
            source, rank = pair
            if peers.get(source, rank) == rank and peers.get(rank, source) == source:
                peers |= {source: rank, rank: source}
                batch[pair] = left[pair][:room]
        for pair, done in batch.items():
            left[pair] = left[pair][len(done) :]
            if not left[pair]:
                del left[pair]
        yield batch
