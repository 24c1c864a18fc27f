"""Synthetic routing of a mixture of experts, seeded, fitted to what is published of real ones.

Fitted to: per layer the top expert of 256 gets 3.2 to 13.3 times the uniform share, median 6.1, and the top 32 get 0.25
to 0.50 of all (logits are normal, their deviation differs by layer); mutual information of the experts in neighbouring
layers near 0.063 nats for a Mixtral (tokens that stick to a successor expert).

A sequence has a topic, which shifts the logits of every layer. A token of it takes its expert of a layer by its topic,
or, with probability `stick`, the successor of its expert in the layer before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tercet.placement.experts import RoutingStats

Floats = NDArray[np.float64]
DEVIATION = (0.6, 0.9, 1.18)  # of a layer's logits: least, likeliest, most
TOPIC_DEVIATION = 0.5  # of what a topic adds to them
STICK = 0.14


@dataclass(frozen=True)
class Routing:
    """Probabilities that traffic is drawn from."""

    expert: Floats  # [topics, L, E], of a token's expert
    following: Floats  # [topics, L - 1, E, E], joint, with that of the next layer
    top_k: int

    def topics_of(self, rng: np.random.Generator, nodes: int, sequences: int, skew: float = 1.0) -> Floats:
        """-> [nodes, topics], how many of the sequences at each node have each topic. skew: lower is more uneven."""
        mix = rng.dirichlet(np.full(len(self.expert), skew))
        return rng.multinomial(sequences, mix, size=nodes).astype(np.float64)

    def counted(self, rng: np.random.Generator, topics: Floats, tokens: int, windows: int = 1) -> RoutingStats:
        """topics [nodes, topics]: sequences; tokens: of each in a window -> what ranks would count, noise included."""
        node_expert = np.einsum("nt,tle->nle", topics, self.expert) * tokens * self.top_k
        drawn = rng.poisson(node_expert, size=(windows, *node_expert.shape)).astype(np.float64)
        pair = np.einsum("t,tlef->lef", topics.sum(axis=0), self.following) * tokens * self.top_k
        source = drawn.mean(axis=0).transpose(1, 0, 2)
        return RoutingStats(drawn.sum(axis=1), source, rng.poisson(pair).astype(np.float64), self.top_k)

    def drifted(self, rng: np.random.Generator, deviation: float) -> Routing:
        """With other hot experts: the logits have moved by so much."""
        moved = self.expert * np.exp(rng.normal(0, deviation, self.expert.shape[1:]))
        return Routing(moved / moved.sum(axis=2, keepdims=True), self.following, self.top_k)


def routing(
    rng: np.random.Generator, layers: int, experts: int, top_k: int, topics: int = 8, **changes: Any
) -> Routing:
    """changes: stick, topic_deviation."""
    stick, shift = changes.get("stick", STICK), changes.get("topic_deviation", TOPIC_DEVIATION)
    deviation = rng.triangular(*DEVIATION, size=layers)[None, :, None]
    common = rng.normal(size=(1, layers, experts)).clip(max=2.8)  # 256 of them seldom have a higher one
    own = rng.normal(size=(topics, layers, experts))
    scale = np.sqrt(1 + shift**2)
    fresh = np.exp(deviation * (common + shift * own) / scale)
    fresh /= fresh.sum(axis=2, keepdims=True)
    expert, following = [fresh[:, 0]], []
    for layer in range(1, layers):
        before, successor = expert[-1], rng.permutation(experts)
        joint = (1 - stick) * before[:, :, None] * fresh[:, layer][:, None, :]
        joint[:, np.arange(experts), successor] += stick * before
        following.append(joint)
        expert.append(joint.sum(axis=1))
    shape = (topics, 0, experts, experts)
    return Routing(np.stack(expert, 1), np.stack(following, 1) if following else np.zeros(shape), top_k)


def mutual_information(pair: Floats) -> Floats:
    """pair [..., E, E] counts -> nats [...]."""
    joint = pair / pair.sum(axis=(-2, -1), keepdims=True)
    apart = joint.sum(axis=-1, keepdims=True) * joint.sum(axis=-2, keepdims=True)
    terms = np.where(joint > 0, joint * np.log(np.where(joint > 0, joint, 1.0) / np.where(apart > 0, apart, 1.0)), 0.0)
    found: Floats = terms.sum(axis=(-2, -1))
    return found
