"""Embeddings of images, on a thread of their own beside the engine: in batches, whoever the images come from; each
image once, however many ask for it; and a cache.

    encode(image) ──> Future ──queue──> thread: decode, cut into patches, one pass of the tower for all ──> result
                        ^ the same for all who ask meanwhile              cache: digest -> embeddings, by bytes
"""

from __future__ import annotations

import io
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import torch
from PIL import Image
from torch import Tensor

from tercet.core import PromptImage
from tercet.errors import InvalidRequest, ProtocolViolation
from tercet.kernels.kinds import Kernels
from tercet.models.sources import load_vision, locate
from tercet.models.vision.tower import Patches
from tercet.spec import ModelSpec

MOST_PATCHES = 4096  # of one pass of the tower; a larger image goes alone
CACHE_BYTES = 256 << 20

Work = tuple[PromptImage, "Future[Tensor]"]


class Encoder:
    def __init__(
        self,
        patches_of: Callable[[Image.Image], Patches],
        encode: Callable[[Sequence[Patches]], list[Tensor]],
        merge: int,
        *,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """patches_of: ImageProcessor.patches; encode: VisionTower.encode; merge: of the tower."""
        self._patches_of, self._encode, self._merge = patches_of, encode, merge
        self._cache = _Cache(cache_bytes)
        self._lock = threading.Lock()
        self._under_way: dict[bytes, Future[Tensor]] = {}
        self._queue: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self.queries = self.hits = self.patches = 0  # since the start, as in core.Load
        self._thread = threading.Thread(target=self._run, name="encoder", daemon=True)
        self._thread.start()

    def encode(self, image: PromptImage) -> Future[Tensor]:
        """-> its embeddings, [levels, tokens, hidden size]; or InvalidRequest if it can't be read, ProtocolViolation
        if it takes other tokens than the prompt has for it. Any thread."""
        with self._lock:
            self.queries += 1
            if (under_way := self._under_way.get(image.digest)) is not None:
                self.hits += 1
                return under_way
            future: Future[Tensor] = Future()
            if (cached := self._cache.get(image.digest)) is not None:
                self.hits += 1
                future.set_result(cached)
                return future
            self._under_way[image.digest] = future
        self._queue.put((image, future))
        return future

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    # ---- the thread

    def _run(self) -> None:
        left: list[tuple[Work, Patches]] = []  # the next batch begins with it
        while (batch := self._batch(left)) is not None:
            works = [work for work, _ in batch]
            try:
                found = self._encode([patches for _, patches in batch])
            except Exception as error:  # noqa: BLE001  # whatever the model raises, it costs these requests alone
                for work in works:
                    self._fail(work, error)
                continue
            self.patches += sum(len(patches.values) for _, patches in batch)
            for (image, future), embeddings in zip(works, found, strict=True):
                with self._lock:
                    self._cache.put(image.digest, embeddings)
                    del self._under_way[image.digest]
                future.set_result(embeddings)

    def _batch(self, left: list[tuple[Work, Patches]]) -> list[tuple[Work, Patches]] | None:
        """As many images as are waiting and fit into one pass, at least one; None: it is over."""
        batch, patches = [*left], sum(len(p.values) for _, p in left)
        left.clear()
        while patches < MOST_PATCHES:
            try:
                work = self._queue.get(block=not batch)
            except queue.Empty:
                break
            if work is None:
                return None
            cut = self._cut(work)
            if cut is None:
                continue
            if batch and patches + len(cut.values) > MOST_PATCHES:
                left.append((work, cut))
                break
            batch.append((work, cut))
            patches += len(cut.values)
        return batch

    def _cut(self, work: Work) -> Patches | None:
        """None: its future has the reason."""
        image, _ = work
        try:
            with Image.open(io.BytesIO(image.content)) as opened:
                cut = self._patches_of(opened.convert("RGB"))
        except Exception as error:  # noqa: BLE001  # decoders fail in many ways, and one must not end the thread
            told = f"{type(error).__name__}: {error}"
            self._fail(work, InvalidRequest(f"an image of the prompt cannot be read: {told}"))
            return None
        tiles, rows, columns = cut.grid
        if (tiles, rows // self._merge, columns // self._merge) != image.grid:
            told = f"an image takes {cut.grid} patches, and the prompt has {image.grid} tokens for it"
            self._fail(work, ProtocolViolation(told))
            return None
        return cut

    def _fail(self, work: Work, error: Exception) -> None:
        image, future = work
        with self._lock:
            del self._under_way[image.digest]
        future.set_exception(error)


def encoder_of(spec: ModelSpec, kernels: Kernels) -> Encoder:
    """Raises ModelError."""
    from tercet.models.vision.processor import ImageProcessor  # it imports transformers' image processors

    tower, _ = load_vision(spec, kernels)
    return Encoder(ImageProcessor(locate(spec), tower.config).patches, tower.encode, tower.config.merge)


class _Cache:
    """The least recently used go first. Not thread-safe."""

    def __init__(self, most_bytes: int) -> None:
        self._most, self._bytes = most_bytes, 0
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()

    def get(self, digest: bytes) -> Tensor | None:
        if digest in self._kept:
            self._kept.move_to_end(digest)
        return self._kept.get(digest)

    def put(self, digest: bytes, embeddings: Tensor) -> None:
        size = embeddings.nbytes
        if size > self._most or digest in self._kept:
            return
        self._kept[digest] = embeddings.clone(
            memory_format=torch.contiguous_format
        )  # a batch's memory is not kept for one
        self._bytes += size
        while self._bytes > self._most:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
