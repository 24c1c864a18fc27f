"""GGUF's quantised blocks of 32 values as the native kernels take them: w = scale * q + least, every value unchanged.

Q4_0  scale, 32 q of 4 bits          w = scale * (q - 8)
Q4_1  scale, least, 32 q of 4 bits   w = scale * q + least
Q8_0  scale, 32 q of 8 bits, signed  w = scale * q
Scales and leasts are float16; of 4-bit q the first 16 are the low halves of 16 bytes, the others the high ones.
"""

from __future__ import annotations

import gguf
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tercet.kernels.native.linear import Quantised

Kind = gguf.GGMLQuantizationType
HALF = 2  # bytes of a float16


def quantised(rows: npt.NDArray[np.uint8], kind: Kind) -> Quantised | None:
    """rows [n, bytes of a row] as the file has them. None: no kernel takes this kind."""
    if kind not in {Kind.Q4_0, Kind.Q4_1, Kind.Q8_0}:
        return None
    block = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = torch.from_numpy(np.array(rows)).view(len(rows), -1, block)
    scales = _halves(blocks, 0)
    if kind == Kind.Q8_0:
        return Quantised(_flat(blocks[:, :, HALF:] ^ 0x80), scales, -128 * scales, 8)  # q + 128
    at = 2 * HALF if kind == Kind.Q4_1 else HALF
    q = torch.cat((blocks[:, :, at:] & 15, blocks[:, :, at:] >> 4), -1)
    return Quantised(_flat(q), scales, _halves(blocks, HALF) if kind == Kind.Q4_1 else -8 * scales, 4)


def _halves(blocks: Tensor, at: int) -> Tensor:
    return blocks[:, :, at : at + HALF].contiguous().view(torch.float16).squeeze(-1).float()


def _flat(q: Tensor) -> Tensor:
    return q.reshape(len(q), -1)
