"""What the ranks of a worker have counted of their routing, together. Imports no torch.

S data replicas   L mixture layers   n experts   P slots of a layer
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Routed:
    load: NDArray[np.int64]  # [S, L, n] tokens of each replica's requests, since its ranks started; lost ones have none
    phy2log: NDArray[np.int64]  # [L, P], the expert in each slot
    ranks: int  # that a layer's experts are spread over, each with P / ranks slots
    top_k: int
    expert_bytes: int  # of one in one layer
