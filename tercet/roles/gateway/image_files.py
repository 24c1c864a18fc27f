"""The files of a request's images: they come with the request, or are fetched, or were kept for their uuid.

with files.held() as held:           bytes that the request holds, until its end
    named = await files.gather(parts, client, held)
    ... parts are decoded ...
    files.keep(named, client)        for requests to come
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from tercet.errors import ImageNotCached, InvalidRequest, Overloaded
from tercet.metrics import Metrics
from tercet.roles.gateway.fetching import Fetcher
from tercet.roles.gateway.images import ImagePart, named
from tercet.roles.lru import Lru

MOST_BYTES = 32 << 20  # of a request: half of the largest message that a worker takes
ENTRY_BYTES = 512  # what an image in the cache takes beside its bytes and names

Key = tuple[str, str]  # client, uuid: nobody gets another client's image


class ImageFiles:
    """Event loop only."""

    def __init__(self, cache_bytes: int, max_held_bytes: int, metrics: Metrics, fetcher: Fetcher) -> None:
        self._fetcher = fetcher
        self._metrics = metrics
        self._kept: Lru[Key, bytes] = Lru(cache_bytes, lambda key, file: len(file) + sum(map(len, key)) + ENTRY_BYTES)
        self.most_held, self.all_held = max_held_bytes, 0

    def held(self) -> Held:
        return Held(self)

    async def gather(self, parts: Sequence[ImagePart], client: str, held: Held) -> list[ImagePart]:
        """Leaves each part its file, or the part that has it. -> those that came under a uuid. Raises ImageNotFetched,
        ImageNotCached, InvalidRequest, Overloaded."""
        sent: dict[str, ImagePart] = {}  # uuid -> the last image that came under it
        fetched: dict[str, ImagePart] = {}  # address -> the first part that names it
        for part in parts:
            if part.is_named_only:
                part.same = sent.get(part.uuid)
                if part.same is None:
                    self._recall(part, client, held)
                continue
            if part.uuid:
                sent[part.uuid] = part
            if part.is_remote and fetched.setdefault(part.url, part) is not part:
                part.same = fetched[part.url]
        if fetched:
            await self._fetch_all([*fetched.values()], client, held)
        return [*sent.values()]

    def keep(self, parts: Sequence[ImagePart], client: str) -> None:
        """Those that `gather` has returned, once they have been decoded."""
        for part in parts:
            self._kept.put((client, part.uuid), part.take())
        self._metrics.image_cache_bytes.set(self._kept.size)

    async def close(self) -> None:
        await self._fetcher.close()

    def _recall(self, part: ImagePart, client: str, held: Held) -> None:
        part.content = self._kept.get((client, part.uuid))
        self._metrics.image_uuids.labels("miss" if part.content is None else "hit").inc()
        with named(part):
            if part.content is None:
                raise ImageNotCached(f"no image is cached for uuid {part.uuid!r}; send the image with it")
            held.add(len(part.content))

    async def _fetch_all(self, parts: Sequence[ImagePart], client: str, held: Held) -> None:
        """At once; the first failure ends all."""
        tasks = [asyncio.create_task(self._fetch(part, client, held)) for part in parts]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _fetch(self, part: ImagePart, client: str, held: Held) -> None:
        with named(part):
            part.content = await self._fetcher.fetch(part.url, client, held.add)


class Held:
    """Bytes of image files that one request holds."""

    def __init__(self, files: ImageFiles) -> None:
        self._files, self._bytes = files, 0

    def add(self, count: int) -> None:
        """Raises InvalidRequest, or Overloaded if all requests hold too many."""
        self._bytes += count
        self._files.all_held += count
        if self._bytes > MOST_BYTES:
            raise InvalidRequest(f"the images of a request have at most {MOST_BYTES:,} bytes in all")
        if (held := self._files.all_held) > self._files.most_held:
            raise Overloaded(f"images of {held:,} bytes are held already (limits.max_held_bytes)")

    def settle(self, count: int) -> None:
        """It holds so many, as a worker will be sent them: equal images each. Raises as `add`."""
        self.add(count - self._bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.all_held -= self._bytes
