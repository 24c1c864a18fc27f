"""What the ranks of a worker have counted of their routing, together. Imports no torch.

S data replicas   L mixture layers   n experts   P slots of a layer   R ranks that a layer's experts are spread over
N nodes, as shares are given
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Routed:
    """Rows since the ranks started; a row is a token at an expert in a layer. Ranks that are lost have none."""

    load: NDArray[np.int64]  # [S, L, n] of each replica's requests
    computed: NDArray[np.int64]  # [L, R] by each rank, for requests of all
    phy2log: NDArray[np.int64]  # [L, P], the expert in each slot; each rank has P / R of them
    top_k: int
    expert_bytes: int  # of one in one layer
    shares: NDArray[np.int64] | None = None  # [L, N, P] of replicas (`placement.expert_shares`); None: by turns
    # [L - 1, n, n] pairs of a token's expert in a layer and one of its experts in the next, in some of the steps; None:
    # they were not asked for
    pairs: NDArray[np.int64] | None = None
    steps: int = 0  # of the group, since it started

    @property
    def ranks(self) -> int:
        return int(self.computed.shape[1])
