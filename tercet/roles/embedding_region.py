"""Memory by which embeddings of images cross from encode workers to those that compute prompts, laid out as KV is
(`transfer/memory/layout.py`), so that the mover carries them as it does KV: a level of an embedding is a layer, and a
token has one head, of the text model's hidden size. Its blocks are held under a ledger as those of KV are. Values are
float32, in which nothing is lost, whatever the kernels at either end compute with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tercet.core import Load, PromptImage, Ticket
from tercet.engine.blocks import BlockPool, Hold
from tercet.engine.prefix import PrefixIndex
from tercet.models.vision.config import VisionConfig
from tercet.spec import EMBEDDING_BLOCK
from tercet.transfer.memory.layout import KvLayout
from tercet.transfer.memory.region import Region


def image_ticket(ticket: Ticket, image: PromptImage, epoch: int) -> Ticket:
    """Names the handover of an image's embeddings for an attempt at a request. epoch: of the worker that gets them."""
    return Ticket(f"{ticket.request_id}@{image.start}", ticket.attempt, epoch)


class EmbeddingRegion:
    """Not thread-safe."""

    def __init__(self, config: VisionConfig, blocks: int) -> None:
        self.levels = config.levels
        layout = KvLayout(config.levels, blocks, EMBEDDING_BLOCK, 1, config.out_size, "float32", parts=1)
        self.memory = Region(layout)
        self.pool = BlockPool(blocks, PrefixIndex(enabled=False))
        flat = torch.frombuffer(self.memory.view, dtype=torch.float32)
        self._values = flat.view(config.levels, blocks, EMBEDDING_BLOCK, config.out_size)

    def allocate(self, tokens: int, hold: Hold) -> list[int]:
        """Raises Overloaded."""
        return self.pool.allocate(-(-tokens // EMBEDDING_BLOCK), hold)

    def write(self, blocks: Sequence[int], embeddings: Tensor) -> None:
        """embeddings: [levels, tokens, hidden size], of any dtype."""
        for number, part in enumerate(torch.split(embeddings, EMBEDDING_BLOCK, 1)):
            self._values[:, blocks[number], : part.shape[1]] = part

    def read(self, blocks: Sequence[int], tokens: int) -> Tensor:
        """-> a copy of what has landed, [levels, tokens, hidden size]."""
        return self._values[:, blocks].flatten(1, 2)[:, :tokens]

    def counted(self, load: Load) -> Load:
        counts = self.pool.counts()
        return replace(
            load,
            embedding_blocks_total=self.pool.total,
            embedding_blocks_free=counts[None],
            embedding_blocks_quarantined=counts[Hold.QUARANTINED],
        )

    def close(self) -> None:
        self.memory.close()
