"""Embeddings of images, on a thread of their own beside the engine: in batches, whoever the images come from; each
image once, however many ask for it; and a cache.

    encode(image) ──> Future ──queue──> thread: decode, cut into patches, one pass of the tower for all ──> result
                        ^ those of all who ask meanwhile                  cache: digest -> embeddings, by bytes
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

from PIL.Image import Image
from torch import Tensor

from tercet.core import Load, PromptImage
from tercet.errors import ClusterError, ImageForgotten, ProtocolViolation
from tercet.models.vision.files import decoded
from tercet.models.vision.tower import Patches
from tercet.roles.lru import Lru
from tercet.spec import ImagesSpec

STOP_S = 5.0  # how long `close` waits for a pass
STUCK_S = 60.0  # a pass without progress for so long: the worker is unhealthy

Key = tuple[bytes, tuple[int, int, int]]  # an image's digest, and the tokens that a prompt has for it


@dataclass(eq=False)
class _Wanted:
    """An image that is being encoded, or waits for it."""

    image: PromptImage
    futures: set[Future[Tensor]]  # one for each who waits for it
    begun: bool = False


class Encoder:
    def __init__(
        self,
        patches_of: Callable[[Image], Patches],
        encode: Callable[[Sequence[Patches]], list[Tensor]],
        merge: int,
        spec: ImagesSpec,
        *,
        keep: Callable[[Tensor], Tensor] = Tensor.clone,
        layers: Callable[[], int] = lambda: 0,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        """patches_of: ImageProcessor.patches; encode: VisionTower.encode; merge: of the tower. keep: what is kept of an
        image's embeddings, in memory of its own. layers: how many the tower has computed so far. prepare: called first
        on the thread."""
        self._patches_of, self._encode, self._merge = patches_of, encode, merge
        self._keep, self._layers, self._prepare = keep, layers, prepare
        self._budget = spec.patch_budget
        self._cache: Lru[Key, Tensor] = Lru(spec.cache_bytes, lambda _, embeddings: embeddings.nbytes)
        self._lock = threading.Lock()
        self._under_way: dict[Key, _Wanted] = {}
        self._queue: queue.SimpleQueue[_Wanted | None] = queue.SimpleQueue()
        self._closed = False
        self._ended = 0  # images whose part here is over, well or not
        self._seen = (0, time.monotonic())  # progress, and since when it has not changed, as health saw it
        self.queries = self.hits = self.patches = 0  # since the start, as in core.Load
        self._thread = threading.Thread(target=self._run, name="encoder", daemon=True)
        self._thread.start()

    @property
    def progress(self) -> int:
        """It grows as long as the thread gets on. Any thread."""
        return self._layers() + self._ended

    @property
    def waiting(self) -> int:
        """Images that are being encoded, or wait for it."""
        return len(self._under_way)

    def health(self) -> None:
        """Raises ClusterError if its thread is dead or stuck."""
        progress, now = self.progress, time.monotonic()
        if progress != self._seen[0] or not self._under_way:
            self._seen = progress, now
        if not self._thread.is_alive():
            raise ClusterError("the encoder of images died")
        if now - self._seen[1] > STUCK_S:
            raise ClusterError(f"the encoder of images has not got on for over {STUCK_S:g} s")

    def counted(self, load: Load) -> Load:
        """`load` plus its counters."""
        return replace(
            load,
            encoder_cache_queries=self.queries,
            encoder_cache_hits=self.hits,
            encoder_patches=self.patches,
            encoder_waiting=self.waiting,
        )

    def encode(self, image: PromptImage) -> Future[Tensor]:
        """-> its embeddings, [levels, tokens, hidden size]; or InvalidRequest if it can't be read, ProtocolViolation
        if it takes other tokens than the prompt has for it. Raises ImageForgotten if it comes without its file, and is
        not here. Any thread."""
        future: Future[Tensor] = Future()
        with self._lock:
            if (under_way := self._under_way.get(_key(image))) is not None:
                self.queries, self.hits = self.queries + 1, self.hits + 1
                under_way.futures.add(future)
                return future
            if (cached := self._cache.get(_key(image))) is not None:
                self.queries, self.hits = self.queries + 1, self.hits + 1
                future.set_result(cached)
                return future
            if not image.content:
                raise ImageForgotten("an image's embeddings are not here, and its file was not sent")
            self.queries += 1
            wanted = self._under_way[_key(image)] = _Wanted(image, {future})
        self._queue.put(wanted)
        return future

    def leave(self, image: PromptImage, future: Future[Tensor]) -> None:
        """Who was given this future waits no longer: it is cancelled, if it has not ended. Any thread."""
        with self._lock:
            wanted = self._under_way.get(_key(image))
            if wanted is None or future not in wanted.futures:  # it has ended
                return
            wanted.futures.remove(future)
            if not wanted.futures and not wanted.begun:  # what stays in the queue holds no file
                del self._under_way[_key(image)]
                wanted.image = replace(wanted.image, content=b"")
        future.cancel()

    def close(self) -> None:
        """What still waits is not encoded."""
        self._closed = True
        self._queue.put(None)
        self._thread.join(STOP_S)

    # ---- the thread

    def _run(self) -> None:
        self._prepare()
        left: list[tuple[_Wanted, Patches]] = []  # the next batch begins with it
        while (batch := self._batch(left)) is not None:
            error = self._encode_all(batch)
            if error is not None and len(batch) > 1:  # one by one, so that it costs the image at fault alone
                for each in batch:
                    self._fail([each], self._encode_all([each]))
            else:
                self._fail(batch, error)

    def _encode_all(self, batch: list[tuple[_Wanted, Patches]]) -> Exception | None:
        """One pass. -> why it failed."""
        try:
            found = [self._keep(one) for one in self._encode([patches for _, patches in batch])]
            assert len(found) == len(batch), "as many embeddings as images"
        except Exception as error:  # noqa: BLE001  # whatever the model raises, it costs these requests alone
            return error
        self.patches += sum(len(patches.values) for _, patches in batch)
        for (wanted, _), embeddings in zip(batch, found, strict=True):
            for future in self._end(wanted, embeddings):
                future.set_result(embeddings)
        return None

    def _fail(self, batch: list[tuple[_Wanted, Patches]], error: Exception | None) -> None:
        for wanted, _ in batch if error is not None else ():
            for future in self._end(wanted):
                future.set_exception(error)

    def _batch(self, left: list[tuple[_Wanted, Patches]]) -> list[tuple[_Wanted, Patches]] | None:
        """As many images as are waiting and fit into one pass, at least one; None: it is over."""
        batch, patches = [*left], sum(len(p.values) for _, p in left)
        left.clear()
        while patches < self._budget:
            try:
                wanted = self._queue.get(block=not batch)
            except queue.Empty:
                break
            if wanted is None or self._closed:
                return None
            cut = self._cut(wanted)
            if cut is None:
                continue
            if batch and patches + len(cut.values) > self._budget:
                left.append((wanted, cut))
                break
            batch.append((wanted, cut))
            patches += len(cut.values)
        return batch

    def _cut(self, wanted: _Wanted) -> Patches | None:
        """None: nobody waits for it, or its futures have the reason."""
        with self._lock:
            if not wanted.futures:
                return None
            wanted.begun = True
        try:
            cut = self._patches_of(decoded(wanted.image.content))
            tiles, rows, columns = cut.grid
            if (tiles, rows // self._merge, columns // self._merge) != wanted.image.grid:
                told = f"an image takes {cut.grid} patches, and the prompt has {wanted.image.grid} tokens for it"
                raise ProtocolViolation(told)
        except Exception as error:  # noqa: BLE001  # processors fail in many ways, and none may end the thread
            for future in self._end(wanted):
                future.set_exception(error)
            return None
        return cut

    def _end(self, wanted: _Wanted, embeddings: Tensor | None = None) -> set[Future[Tensor]]:
        """-> those who still wait for it."""
        with self._lock:
            self._ended += 1
            if embeddings is not None:
                self._cache.put(_key(wanted.image), embeddings)
            del self._under_way[_key(wanted.image)]
            futures, wanted.futures = wanted.futures, set()
        return futures


def _key(image: PromptImage) -> Key:
    return image.digest, image.grid
