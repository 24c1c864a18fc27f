"""Replicas onto GPUs so that the busiest one has little to do, when tokens are shared evenly among replicas.

counts ─> longest processing time first ─> swaps between the busiest GPU and another one, while that helps

The bound: no placement is below the mean load, nor below what the most replicas leave of the hottest expert. Packing to
within some percent of it and swaps to within some hundredths is what is published of vLLM's FlashLB (its PR 37656);
that counts are the greatest-remainder apportionment of DeepSeek's EPLB is exact for the second bound.
"""

from __future__ import annotations

import numpy as np

from tercet.errors import SpecError
from tercet.placement.experts.model import Floats, Ints, Topology

MOST_SWAPS = 1_000  # of a layer; some tens are usual
LEAST_GAIN = 1e-9  # of a swap, relative


def relief_of(topo: Topology) -> Floats:
    """-> [G], by how much n + 1 replicas on the fastest GPUs lessen an expert's load over speed, at best."""
    fastest = np.sort(topo.speed)[::-1]
    relief: Floats = np.minimum.accumulate(1 / (np.arange(1, topo.gpus + 1) * fastest))
    return relief


def replicas_of(weight: Floats, topo: Topology) -> Ints:
    """weight [E] -> count [E]: replicas that fill all slots, at least `least_replicas` of each and at most one per GPU,
    so that the load of the hottest replica is as small as can be. Raises SpecError if no counts fit."""
    experts, slots, least, relief = len(weight), topo.slots, topo.least_replicas, relief_of(topo)
    if not topo.slots_per_gpu <= experts or experts * least > slots:
        each = f"{topo.slots_per_gpu} different ones on each GPU, each at least {least} times"
        raise SpecError(f"{experts} experts do not fill {slots} slots, {each}")
    count = np.full(experts, least, dtype=np.int32)
    share = weight * relief[least - 1] if topo.gpus > least else np.full(experts, -1.0)
    for _ in range(slots - experts * least):
        expert = int(share.argmax())
        count[expert] += 1
        share[expert] = weight[expert] * relief[count[expert] - 1] if count[expert] < topo.gpus else -1.0
    return count


def bound_of(weight: Floats, count: Ints, topo: Topology) -> float:
    """No placement with even dispatch has a lower maximum of load over speed. count: `replicas_of`."""
    return float(max(weight.sum() / topo.speed.sum(), (weight * relief_of(topo)[count - 1]).max()))


class Packing:
    """A layer's replicas on GPUs, no two of an expert on one."""

    def __init__(self, held: Ints, share: Floats, speed: Floats) -> None:
        """held [G, K]: experts; share [G, K]: the tokens of each replica, which go with it; speed [G]. All are kept
        and changed."""
        self.held, self.share, self.speed = held, share, speed
        self.load: Floats = share.sum(axis=1)
        self._has = np.zeros((len(held), int(held.max()) + 1), dtype=bool)
        np.put_along_axis(self._has, held.astype(np.int64), values=True, axis=1)

    @property
    def worst(self) -> float:
        """The highest load over speed."""
        return float((self.load / self.speed).max())

    def improve(self, bound: float) -> int:
        """Swap until no swap with the busiest GPU helps, or the bound is reached. -> swaps."""
        for number in range(MOST_SWAPS):
            if self.worst <= bound * (1 + LEAST_GAIN) or not self._swap():
                return number
        return MOST_SWAPS

    def _swap(self) -> bool:
        """The best swap of a replica on the busiest GPU with one on another; False if none makes it less busy."""
        busiest = int((self.load / self.speed).argmax())
        here = self.held[busiest]
        change = self.share[busiest][:, None, None] - self.share[None, :, :]  # [K here, G, K there]
        after = np.maximum(
            (self.load[busiest] - change) / self.speed[busiest],
            (self.load[None, :, None] + change) / self.speed[None, :, None],
        )
        twice = self._has[:, here].T[:, :, None] | self._has[busiest][self.held][None, :, :]
        after[twice | (change <= 0)] = np.inf
        own, gpu, other = (int(at) for at in np.unravel_index(int(after.argmin()), after.shape))
        if after[own, gpu, other] >= self.worst * (1 - LEAST_GAIN):
            return False
        self._exchange((busiest, own), (gpu, other), float(change[own, gpu, other]))
        return True

    def _exchange(self, one: tuple[int, int], other: tuple[int, int], change: float) -> None:
        for table in (self.held, self.share):
            table[one], table[other] = table[other], table[one]
        comes, leaves = self.held[one], self.held[other]
        self._has[one[0], [leaves, comes]] = False, True
        self._has[other[0], [comes, leaves]] = False, True
        self.load[one[0]] -= change
        self.load[other[0]] += change


def packed(weight: Floats, count: Ints, topo: Topology) -> Packing:
    """Longest processing time first: the replicas of each expert, those with the largest share first, to the GPUs that
    would be least busy with it among those with room. count [E] fills all slots, none above the number of GPUs."""
    held: list[list[int]] = [[] for _ in range(topo.gpus)]
    load, full = np.zeros(topo.gpus), np.zeros(topo.gpus, dtype=bool)
    speed, share = topo.speed, weight / count
    order = np.argsort(-share, kind="stable")
    if topo.slots_per_gpu == 1:  # the same, since a GPU is either free or full
        placed = np.empty((topo.gpus, 1), dtype=np.int32)
        placed[np.argsort(-speed, kind="stable"), 0] = np.repeat(order, count[order])
        return Packing(placed, share[placed], speed)
    for expert in order.tolist():
        busy = np.where(full, np.inf, (load + share[expert]) / speed)
        chosen = np.argsort(busy, kind="stable")[: count[expert]]
        chosen = chosen[~full[chosen]]
        load[chosen] += share[expert]
        for gpu in chosen.tolist():
            held[gpu].append(expert)
            full[gpu] = len(held[gpu]) == topo.slots_per_gpu
        for _ in range(count[expert] - len(chosen)):
            _squeeze(expert, held, topo.slots_per_gpu)
            load = np.array([share[its].sum() for its in held])
            full = np.array([len(its) == topo.slots_per_gpu for its in held])
    placed = np.array(held, dtype=np.int32)
    return Packing(placed, share[placed], speed)


def _squeeze(expert: int, held: list[list[int]], slots: int) -> None:
    """Every GPU with room has this expert already: another one gets it for one of its own, which such a GPU takes."""
    roomy = next(its for its in held if len(its) < slots)
    other = next(its for its in held if expert not in its)
    at = next(at for at, its in enumerate(other) if its not in roomy)
    roomy.append(other[at])
    other[at] = expert
