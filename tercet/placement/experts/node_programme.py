"""One layer's replicas and flows between nodes as an integer programme, by HiGHS.

    integers    c[e, n]     replicas of expert e on node n; x[e, n] whether there are any
    continuous  f[b, e, n]  tokens of stream b that node n computes for expert e
    minimise    sum price f
    subject to  every token is computed; slots of a node; tokens of a node; tokens of a replica; f <= w x; groups

If all ways between nodes cost the same, two streams suffice: what stays at its node, and all the rest, in which sources
are not told apart. Else each node's requests are a stream, with N / 2 times the columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import highspy
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix

from tercet.placement.experts.model import Floats, Ints

Columns = NDArray[np.int64]
NEVER = (highspy.HighsModelStatus.kInfeasible, highspy.HighsModelStatus.kUnboundedOrInfeasible)  # nothing is unbounded
SLACK = 1e-9  # relative, of what must be rounded up


@dataclass(frozen=True)
class NodeLayer:
    """What a layer's replicas and flows must keep to."""

    tokens: Floats  # [N, E] of each node's requests; one in the mean, since the solver's tolerances are absolute
    slots: int  # of a node
    gpus: int  # of a node: no more replicas of an expert are there
    node_most: Floats  # [N] tokens that a node takes
    replica_most: Floats  # [N] tokens that a replica there takes
    groups: int = 0  # of experts, each with a replica of all its experts on one node; 0: none

    @property
    def most(self) -> Ints:
        """-> [E, N] replicas beyond which no more are of use."""
        needed = np.ceil(self.tokens.sum(axis=0)[:, None] / self.replica_most * (1 - SLACK))
        useful: Ints = needed.clip(1, self.gpus).astype(np.int32)
        return useful

    @property
    def least(self) -> Floats:
        """-> [E] replicas without which its tokens find no room."""
        needed: Floats = np.ceil(self.tokens.sum(axis=0) / self.replica_most.max() * (1 - SLACK)).clip(1)
        return needed


@dataclass(frozen=True)
class NodePlan:
    """Of one layer."""

    copies: Floats  # [E, N] replicas; parts of them in a relaxation
    flow: Floats  # [N, E, N] tokens of each node's requests, by the node that computes them

    @property
    def crossing(self) -> float:
        """Tokens that another node computes."""
        return float(self.flow.sum() - np.einsum("ses->", self.flow))


@dataclass(frozen=True)
class Solved:
    plan: NodePlan | None  # if one was found in time
    bound: float  # the highest one on the cost that was proven
    never: bool = False  # it was proven that there is no plan


@dataclass
class _Rows:
    """Constraints that are being written down."""

    entries: list[tuple[Columns, Columns, Floats]] = field(default_factory=list)
    lower: list[Floats] = field(default_factory=list)
    upper: list[Floats] = field(default_factory=list)
    number: int = 0

    def add(self, columns: Columns, values: Floats | float, lower: Floats | float, upper: Floats | float) -> None:
        """columns [rows, width]; values fit them, lower and upper [rows]."""
        rows = np.broadcast_to(np.arange(len(columns))[:, None] + self.number, columns.shape)
        self.entries.append((rows.ravel(), columns.ravel(), np.broadcast_to(values, columns.shape).ravel()))
        self.lower.append(np.broadcast_to(np.asarray(lower, float), len(columns)))
        self.upper.append(np.broadcast_to(np.asarray(upper, float), len(columns)))
        self.number += len(columns)

    def matrix(self, columns: int) -> csr_matrix:
        row, column, value = (np.concatenate(part) for part in zip(*self.entries, strict=True))
        return csr_matrix((value, (row, column)), shape=(self.number, columns))


class NodeProgramme:
    """Of one layer. Solved as often as prices change."""

    def __init__(self, layer: NodeLayer, *, apart: bool, gap: float, seed: int) -> None:
        """apart: sources are told apart."""
        self._layer, self._apart = layer, apart
        self._solver: Any = highspy.Highs()  # type: ignore[no-untyped-call]
        options = (("output_flag", False), ("threads", 1), ("mip_rel_gap", gap), ("random_seed", seed))
        for option, value in options:
            self._solver.setOptionValue(option, value)
        nodes, experts = layer.tokens.shape
        most = layer.most
        many = most.max(axis=1) > 1
        total = layer.tokens.sum(axis=0)
        streams = layer.tokens if apart else total[None].repeat(2, axis=0)
        self._copies = np.arange(experts * nodes).reshape(experts, nodes)
        self._flow = np.arange(streams.size * nodes).reshape(*streams.shape, nodes) + self._copies.size
        first = self._copies.size + self._flow.size
        self._any = self._copies.copy()  # the same column where there is but one replica
        self._any[many] = np.arange(many.sum() * nodes).reshape(-1, nodes) + first
        self._first_of_group = first + int(many.sum()) * nodes
        limits = [most.ravel(), np.repeat(streams.ravel(), nodes), np.ones(int(many.sum() + layer.groups) * nodes)]
        self._limits = np.concatenate(limits).astype(float)
        self._write(self._rows(many, total))

    def _rows(self, many: NDArray[np.bool_], total: Floats) -> _Rows:
        layer, rows, (experts, nodes) = self._layer, _Rows(), self._copies.shape
        pair = self._flow.transpose(1, 2, 0).reshape(experts * nodes, -1)  # all streams of an expert at a node
        copies, at = self._copies.reshape(-1, 1), self._any.reshape(-1, 1)
        if self._apart:
            rows.add(self._flow.reshape(-1, nodes), 1.0, layer.tokens.ravel(), layer.tokens.ravel())
            for source, tokens in zip(self._flow, layer.tokens, strict=True):
                self._link(rows, source.reshape(-1, 1), at, np.repeat(tokens, nodes))
        else:
            rows.add(pair.reshape(experts, -1), 1.0, total, total)
            self._link(rows, pair[:, :1], at, layer.tokens.T.ravel())
            self._link(rows, pair, at, np.repeat(total, nodes))
        rows.add(self._copies, 1.0, layer.least, np.inf)
        rows.add(self._copies.T, 1.0, 0.0, layer.slots)
        rows.add(pair.reshape(experts, nodes, -1).transpose(1, 0, 2).reshape(nodes, -1), 1.0, 0.0, layer.node_most)
        each = np.repeat(many, nodes)
        if each.any():
            self._link(rows, pair[each], copies[each], np.tile(layer.replica_most, int(many.sum())))
            rows.add(np.hstack([copies[each], at[each]]), np.array([1.0, -1.0]), 0.0, np.inf)
        if layer.groups:
            self._keep(rows)
        return rows

    @staticmethod
    def _link(rows: _Rows, flows: Columns, switch: Columns, most: Floats) -> None:
        """Together no more than `most` for each that the switch counts."""
        rows.add(np.hstack([flows, switch]), np.hstack([np.ones(flows.shape), -most[:, None]]), -np.inf, 0.0)

    def _keep(self, rows: _Rows) -> None:
        """Each group on one node, as many groups on each."""
        experts, nodes = self._copies.shape
        groups = self._layer.groups
        kept = np.arange(groups * nodes).reshape(groups, nodes) + self._first_of_group
        rows.add(kept, 1.0, 1.0, 1.0)
        rows.add(kept.T, 1.0, groups / nodes, groups / nodes)
        of_expert = kept.repeat(experts // groups, axis=0)
        both = np.stack([self._any.ravel(), of_expert.ravel()], axis=1)
        rows.add(both, np.array([1.0, -1.0]), 0.0, np.inf)

    def _write(self, rows: _Rows) -> None:
        limits = self._limits
        matrix, model = rows.matrix(len(limits)), highspy.HighsLp()
        model.num_col_, model.num_row_ = len(limits), rows.number
        model.col_cost_, model.col_lower_, model.col_upper_ = np.zeros(len(limits)), np.zeros(len(limits)), limits
        model.row_lower_, model.row_upper_ = np.concatenate(rows.lower), np.concatenate(rows.upper)
        model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        model.a_matrix_.start_, model.a_matrix_.index_ = matrix.indptr, matrix.indices
        model.a_matrix_.value_ = matrix.data
        self._solver.passModel(model)

    def solve(self, price: Floats | None, seconds: float, within: Floats | None = None) -> Solved:
        """price [N, N] of a token from node to node, if sources are told apart, else None: one between nodes. within
        [E, N]: only where it is above 0 a replica may be."""
        self._restrict(within)
        status = self._run(price, seconds, highspy.HighsVarType.kInteger)
        bound = float(self._solver.getInfo().mip_dual_bound)
        bound = max(0.0, bound) if np.isfinite(bound) else 0.0
        if self._solver.getInfo().primal_solution_status != int(highspy.SolutionStatus.kSolutionStatusFeasible):
            return Solved(None, bound, status in NEVER)
        found = np.array(self._solver.getSolution().col_value)
        return Solved(self._plan(found[self._copies].round(), found[self._flow]), bound)

    def relaxed(self, price: Floats | None, seconds: float) -> Solved:
        """The same with parts of replicas."""
        self._restrict(None)
        status = self._run(price, seconds, highspy.HighsVarType.kContinuous)
        if status != highspy.HighsModelStatus.kOptimal:
            return Solved(None, 0.0, status in NEVER)
        found = np.array(self._solver.getSolution().col_value)
        bound = max(0.0, float(self._solver.getInfo().objective_function_value))
        return Solved(self._plan(found[self._copies].clip(0.0), found[self._flow]), bound)

    def _restrict(self, within: Floats | None) -> None:
        columns = np.unique(np.concatenate([self._copies.ravel(), self._any.ravel()])).astype(np.int32)
        limits = self._limits.copy()
        if within is not None:
            limits[self._copies] *= within > SLACK
            limits[self._any] = np.minimum(limits[self._any], limits[self._copies])
        self._solver.changeColsBounds(len(columns), columns, np.zeros(len(columns)), limits[columns])

    def settle(self, copies: Floats | None) -> None:
        """Each group where most of each of its experts is, by copies [E, N]; None: where it may be best."""
        nodes, groups = self._copies.shape[1], self._layer.groups
        least, most = np.zeros((groups, nodes)), np.ones((groups, nodes))
        if copies is not None:
            places = np.arange(groups) % nodes
            there = copies.clip(0.0, 1.0).reshape(groups, -1, nodes).min(axis=1)
            group, place = linear_sum_assignment(there[:, places], maximize=True)
            least[group, places[place]] = 1.0
            most = least
        columns = np.arange(groups * nodes, dtype=np.int32) + self._first_of_group
        self._solver.changeColsBounds(len(columns), columns, least.ravel(), most.ravel())

    def _run(self, price: Floats | None, seconds: float, kind: Any) -> Any:
        solver, columns = self._solver, self._flow.ravel().astype(np.int32)
        cost = np.array([0.0, 1.0])[:, None, None] if price is None else price[:, None, :]
        solver.changeColsCost(len(columns), columns, np.broadcast_to(cost, self._flow.shape).ravel().astype(float))
        whole = np.setdiff1d(np.arange(len(self._limits)), columns).astype(np.int32)
        solver.changeColsIntegrality(len(whole), whole, np.full(len(whole), kind))
        solver.setOptionValue("time_limit", max(seconds, 0.0))
        solver.run()
        return solver.getModelStatus()

    def _plan(self, copies: Floats, flow: Floats) -> NodePlan:
        flow = np.where(copies > 0, flow, 0.0).clip(0.0)
        flow = flow if self._apart else self._told_apart(flow)
        return NodePlan(copies, _exact(flow, self._layer.tokens, copies))

    def _told_apart(self, flow: Floats) -> Floats:
        """flow [2, E, N], what stays and the rest -> [N, E, N]. What is left of each source goes where the rest goes,
        to its own node first."""
        own, rest = flow.transpose(0, 2, 1)
        stays = own + np.minimum(self._layer.tokens - own, rest).clip(0.0)
        left, rest = (self._layer.tokens - stays).clip(0.0), (own + rest - stays).clip(0.0)
        total = rest.sum(axis=0)
        part = rest / np.where(total > 0, total, 1.0)
        found: Floats = np.einsum("se,ne->sen", left, part)
        nodes = np.arange(len(own))
        found[nodes, :, nodes] += stays
        return found


def _exact(flow: Floats, tokens: Floats, copies: Floats) -> Floats:
    """Without what the solver's tolerances leave: flow [N, E, N] sums to tokens [N, E]. The few tokens that are below
    them go to all copies [E, N]."""
    flow = np.where(flow.sum(axis=2, keepdims=True) > 0, flow, copies)
    scaled: Floats = flow * (tokens / flow.sum(axis=2))[:, :, None]
    return scaled
