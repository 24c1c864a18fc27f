"""The plan of one layer: replicas on nodes, and flows between them. It begins greedy, and no step makes it worse.

`internode` counts a token once for each of its experts on another node: one integer programme.

`internode_dedup` counts it once for each node it is sent to, in the model of independent draws of `scoring`. That is
concave in the flows: each round prices a token by what it adds at the flows of the round before, which never makes them
worse (majorise and minimise: Hunter and Lange, 2004). Rounds are relaxations, from several starts; the best is made
whole. The bound is the chord of the concave function over what the flows can be: it holds for every plan, but is not
tight.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tercet.placement.experts.model import Floats, Objective, Topology
from tercet.placement.experts.node_packing import floor_plan
from tercet.placement.experts.node_programme import NodeLayer, NodePlan, NodeProgramme, Solved
from tercet.placement.experts.scoring import node_copies

GAP = 1e-3  # of an integer programme, relative
STARTS = 4  # prices to begin with, by chance: where all are alike, no node is worth avoiding
DEAREST = 3.0  # of them; the cheapest is 1
ROUNDS = 12  # of prices
LEAST_GAIN = 1e-3  # of a round, relative
TOLERANCE = 1e-5  # of the solver, relative


class NodeSearch:
    """Of one layer. Tokens are scaled to one in the mean, since the solver's tolerances are absolute."""

    def __init__(
        self, tokens: Floats, topo: Topology, objective: Objective, top_k: int, groups: int, seed: int
    ) -> None:
        """tokens [N, E]. Raises SpecError if the experts do not fill the slots."""
        self.tokens, self._topo, self._objective, self._top_k = tokens / tokens.mean(), topo, objective, top_k
        self._groups, self._seed = groups, seed
        self._mean = topo.speed.reshape(topo.nodes, -1).mean(axis=1) * self.tokens.sum() / topo.gpus  # [N] of its GPUs
        self.plan = floor_plan(self.tokens, topo, groups)
        slots = topo.gpus_per_node * topo.slots_per_gpu
        nearest = np.sort(self.tokens, axis=1)[:, ::-1][:, :slots].sum()
        self._crossing = float(max(0.0, self.tokens.sum() - nearest))  # no plan has fewer
        self._limits = self._within(np.inf, np.inf)

    @property
    def value(self) -> float:
        return self._value(self.plan)

    @property
    def bound(self) -> float:
        """No plan within the limits is below it."""
        if self._objective is Objective.INTERNODE:
            return self._crossing
        return max(0.0, chord_bound(self._limits, self._crossing, self._top_k))

    def attained(self) -> tuple[float, float]:
        """-> eps and kappa of the plan."""
        tokens = self.plan.flow.sum(axis=0)
        node = float((tokens.sum(axis=0) / (self._mean * self._topo.gpus_per_node)).max()) - 1
        return max(0.0, node), float((tokens / self.plan.copies.clip(1) / self._mean).max())

    def improve(self, eps: float, kappa: float, left: Callable[[], float]) -> None:
        """Within these limits; if no plan is, within those of the greedy one. left: seconds that may still be used."""
        floor = self.attained()
        kept = floor[0] <= eps + TOLERANCE and floor[1] <= kappa + TOLERANCE
        self._limits = self._within(eps, kappa)
        solved = self._fewest_crossing(left)
        if solved.never:
            kept = True
            self._limits = self._within(max(eps, floor[0] + TOLERANCE), max(kappa, floor[1] + TOLERANCE))
            solved = self._fewest_crossing(left)
        self._crossing = max(self._crossing, solved.bound)
        if solved.plan is not None and (not kept or self._value(solved.plan) < self.value):
            self.plan, kept = solved.plan, True
        if kept and self._objective is Objective.INTERNODE_DEDUP:
            self._fewest_copies(left)

    def _fewest_crossing(self, left: Callable[[], float]) -> Solved:
        """Near the relaxation, and the whole programme if that is not enough."""
        programme = self._programme(apart=False)
        relaxed = programme.relaxed(None, left())
        if relaxed.plan is None:
            return relaxed
        near = self._near(programme, None, relaxed.plan, left)
        if near is not None and near.crossing <= relaxed.bound * (1 + GAP):
            return Solved(near, relaxed.bound)
        whole = programme.solve(None, left())
        plans = [plan for plan in (near, whole.plan) if plan is not None]
        return Solved(min(plans, key=self._value, default=None), max(relaxed.bound, whole.bound), whole.never)

    def _near(
        self, programme: NodeProgramme, price: Floats | None, relaxed: NodePlan, left: Callable[[], float]
    ) -> NodePlan | None:
        """Groups where most of them is in the relaxed plan, and replicas only where it then has parts of them."""
        if self._groups:
            programme.settle(relaxed.copies)
            relaxed = programme.relaxed(price, left()).plan or relaxed
        found = programme.solve(price, left(), relaxed.copies).plan
        programme.settle(None)
        return found

    def _fewest_copies(self, left: Callable[[], float]) -> None:
        programme, rng = self._programme(apart=True), np.random.default_rng(self._seed)
        starts = [rng.uniform(1.0, DEAREST, (len(self.tokens),) * 2) for _ in range(STARTS)]
        found = [plan for price in starts if (plan := self._priced(programme, price, left)) is not None]
        if found:
            best = min(found, key=self._value)
            near = self._near(programme, self._prices(best), best, left)
            if near is not None and self._value(near) < self.value:
                self.plan = near

    def _priced(self, programme: NodeProgramme, price: Floats, left: Callable[[], float]) -> NodePlan | None:
        """A relaxed plan that its own prices do not make much better."""
        price, best = price * (1 - np.eye(len(price))), None
        for _ in range(ROUNDS):
            plan = programme.relaxed(price, left()).plan
            if plan is None or (best is not None and self._value(plan) >= self._value(best) * (1 - LEAST_GAIN)):
                break
            best, price = plan, self._prices(plan)
        return best

    def _prices(self, plan: NodePlan) -> Floats:
        """-> [N, N], what a token more adds to the node copies."""
        flow = plan.flow.sum(axis=1)
        total = flow.sum(axis=1, keepdims=True)
        part = flow / np.where(total > 0, total, 1.0)
        price: Floats = (1 - part).clip(0.0) ** (self._top_k - 1) * (1 - np.eye(len(flow)))
        return price

    def _value(self, plan: NodePlan) -> float:
        if self._objective is Objective.INTERNODE:
            return plan.crossing
        return float(node_copies(plan.flow.sum(axis=1), self._top_k))

    def _within(self, eps: float, kappa: float) -> NodeLayer:
        node_most = (1 + eps) * self._mean * self._topo.gpus_per_node
        slots = self._topo.gpus_per_node * self._topo.slots_per_gpu
        return NodeLayer(self.tokens, slots, self._topo.gpus_per_node, node_most, kappa * self._mean, self._groups)

    def _programme(self, *, apart: bool) -> NodeProgramme:
        return NodeProgramme(self._limits, apart=apart, gap=GAP, seed=self._seed)


def chord_bound(limits: NodeLayer, crossing: float, top_k: int) -> float:
    """-> node copies below which no plan is, if none has fewer tokens on other nodes than `crossing`.

    From each source to each other node there are at least the tokens of as many of its coldest experts as find no slot
    elsewhere, and at most those of the hottest ones that fill the node, which no node exceeds with what others send."""
    tokens, (nodes, experts) = limits.tokens, limits.tokens.shape
    total, ascending = tokens.sum(axis=1), np.sort(tokens, axis=1)
    least = ascending[:, : max(0, experts - (nodes - 1) * limits.slots)].sum(axis=1)
    hottest = ascending[:, -min(limits.slots, experts) :].sum(axis=1)
    room = limits.node_most[None, :] - (least.sum() - least)[:, None]
    most = np.minimum(np.minimum(hottest, total - (nodes - 1) * least)[:, None], room)

    def copies(flow: Floats) -> Floats:
        part = flow / np.where(total > 0, total, 1.0)[:, None]
        sent: Floats = total[:, None] / top_k * (1 - (1 - part.clip(0.0, 1.0)) ** top_k)
        return sent

    low = np.repeat(least[:, None], nodes, axis=1)
    wide = (most > low) & ~np.eye(nodes, dtype=bool)
    if not wide.any():
        return 0.0
    slope = float(((copies(most) - copies(low))[wide] / (most - low)[wide]).min())
    below: Floats = (copies(low) - slope * low) * ~np.eye(nodes, dtype=bool)
    return float(below.sum()) + slope * crossing
