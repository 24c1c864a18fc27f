"""Small layers as an integer programme: the best placement of all, or a bound on it, by HiGHS.

even      y[e, n] expert e has n replicas, x[e, n, g] one of them is on GPU g;   sum_{e, n} w_e / n x[e, n, g] <= T s_g
weighted  x[e, g] it has one there, f[e, g] <= w_e x[e, g] of its tokens go there;           sum_e f[e, g] <= T s_g
"""

from __future__ import annotations

from typing import Any

import highspy
import numpy as np

from tercet.placement.experts.model import Dispatch, Floats, Ints, Topology

MOST = {Dispatch.EVEN: 1_200, Dispatch.WEIGHTED: 200}  # binary variables: beyond, the bound stays low for minutes
GAP = 1e-6
NOTHING = 1e-7  # of the layer's tokens: less is no number for the solver; without it the bound stays one


def is_small(experts: int, topo: Topology, dispatch: Dispatch) -> bool:
    """Whether `exactly` may be expected to end."""
    return experts * topo.gpus * (1 if dispatch is Dispatch.WEIGHTED else _most(experts, topo)) <= MOST[dispatch]


def exactly(weight: Floats, topo: Topology, dispatch: Dispatch, seconds: float) -> tuple[Ints | None, float]:
    """weight [E] -> held [G, K], None if none was found in time, and the highest bound that was proven."""
    solver = highspy.Highs()  # type: ignore[no-untyped-call]
    for option, value in (("output_flag", False), ("time_limit", seconds), ("threads", 1), ("mip_rel_gap", GAP)):
        solver.setOptionValue(option, value)
    scale = float(weight.sum()) or 1.0  # the solver's tolerances are absolute
    programme = _weighted if dispatch is Dispatch.WEIGHTED else _even
    there = programme(solver, np.where(weight >= NOTHING * scale, weight / scale, 0.0), topo)
    solver.run()
    info = solver.getInfo()
    bound = max(0.0, float(info.mip_dual_bound)) * scale if np.isfinite(info.mip_dual_bound) else 0.0
    if info.primal_solution_status != int(highspy.SolutionStatus.kSolutionStatusFeasible):
        return None, bound
    values = solver.getSolution().col_value
    held = [
        [e for e in range(len(weight)) if any(values[x.index] > 0.5 for x in there[e, g])] for g in range(topo.gpus)
    ]
    return np.array(held, dtype=np.int32), bound


def _most(experts: int, topo: Topology) -> int:
    """Replicas of one expert."""
    return min(topo.gpus, topo.slots - (experts - 1) * topo.least_replicas)


def _even(solver: Any, weight: Floats, topo: Topology) -> dict[tuple[int, int], list[Any]]:
    """-> (expert, GPU) -> variables of which one is 1 if it is there."""
    worst, most = solver.addVariable(0, highspy.kHighsInf, 1.0), _most(len(weight), topo)
    has = [[solver.addBinary() for _ in range(most)] for _ in weight]
    there = {(e, g): [solver.addBinary() for _ in range(most)] for e in range(len(weight)) for g in range(topo.gpus)}
    for e, its in enumerate(has):
        solver.addConstr(sum(its[topo.least_replicas - 1 :]) == 1)
        for n, chosen in enumerate(its):
            if n + 1 < topo.least_replicas:
                solver.addConstr(chosen <= 0)
            solver.addConstr(sum(there[e, g][n] for g in range(topo.gpus)) == (n + 1) * chosen)
            for g in range(topo.gpus):
                solver.addConstr(there[e, g][n] <= chosen)
    for g, speed in enumerate(topo.speed):
        here = [(there[e, g][n], float(w) / (n + 1)) for e, w in enumerate(weight) for n in range(most)]
        solver.addConstr(sum(x for x, _ in here) == topo.slots_per_gpu)
        solver.addConstr(sum(share * x for x, share in here) <= float(speed) * worst)
    return there


def _weighted(solver: Any, weight: Floats, topo: Topology) -> dict[tuple[int, int], list[Any]]:
    worst = solver.addVariable(0, highspy.kHighsInf, 1.0)
    there = {(e, g): [solver.addBinary()] for e in range(len(weight)) for g in range(topo.gpus)}
    flow = {at: solver.addVariable(0, highspy.kHighsInf) for at in there}
    for e, w in enumerate(weight):
        solver.addConstr(sum(flow[e, g] for g in range(topo.gpus)) == float(w))
        solver.addConstr(sum(there[e, g][0] for g in range(topo.gpus)) >= topo.least_replicas)
        for g in range(topo.gpus):
            solver.addConstr(flow[e, g] <= float(w) * there[e, g][0])
    for g, speed in enumerate(topo.speed):
        solver.addConstr(sum(there[e, g][0] for e in range(len(weight))) == topo.slots_per_gpu)
        solver.addConstr(sum(flow[e, g] for e in range(len(weight))) <= float(speed) * worst)
    return there
