"""The encoder's thread: batches, one computation for equal images, its cache, and what fails alone."""

from __future__ import annotations

import dataclasses
import io
import threading

import pytest
import torch
from PIL import Image

from tercet.core import PromptImage
from tercet.errors import ClusterError, ImageForgotten, InvalidRequest, ProtocolViolation
from tercet.models.vision.prompt import image_digest
from tercet.models.vision.tower import Patches
from tercet.roles.encoder import Encoder
from tercet.spec import ImagesSpec

MOST_PATCHES = ImagesSpec().patch_budget


def png(colour, side=8):
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, "PNG")
    return file.getvalue()


def image(content, side=8):
    return PromptImage(image_digest(content, "m"), (1, side // 2, side // 2), ((0, side**2 // 4),), content)


class Tower:
    """A pixel is a patch, two by two of them a token; an embedding says the image's red."""

    def __init__(self, **options):
        self.batches, self.gate, self.error = [], threading.Event(), None
        self.gate.set()
        self.encoder = Encoder(self.patches, self.encode, 2, ImagesSpec(**options))

    def patches(self, opened):
        side = opened.size[0]
        return Patches(torch.full((side * side, 3), float(opened.getpixel((0, 0))[0])), (1, side, side))

    def encode(self, images):
        assert self.gate.wait(10)
        if self.error is not None:
            raise self.error
        self.batches.append([len(one.values) for one in images])
        return [one.values[::4, :1].repeat(1, 5).unsqueeze(0) for one in images]


@pytest.fixture
def tower():
    made = Tower()
    yield made
    made.gate.set()
    made.encoder.close()
    assert not made.encoder._under_way


def test_each_gets_its_own_embeddings(tower):
    tower.gate.clear()
    futures = [tower.encoder.encode(image(png((red, 0, 0), side), side)) for red, side in ((1, 8), (2, 4), (3, 16))]
    tower.gate.set()
    for future, red, side in zip(futures, (1, 2, 3), (8, 4, 16), strict=True):
        assert torch.equal(future.result(10), torch.full((1, side**2 // 4, 5), float(red)))
    assert sum(map(len, tower.batches)) == 3


def test_fifty_equal_ones_are_encoded_once(tower):
    tower.gate.clear()
    futures = [tower.encoder.encode(image(png((7, 0, 0)))) for _ in range(50)]
    tower.gate.set()
    assert {future.result(10).mean().item() for future in futures} == {7.0}
    again = tower.encoder.encode(image(png((7, 0, 0))))
    assert again.done()  # by the cache
    assert (tower.encoder.queries, tower.encoder.hits, tower.encoder.patches) == (51, 50, 64)


def test_a_batch_holds_no_more_than_its_patches(tower):
    side = 32  # 1,024 patches
    tower.gate.clear()
    futures = [tower.encoder.encode(image(png((n, 0, 0), side), side)) for n in range(11)]
    tower.gate.set()
    assert [future.result(10).mean().item() for future in futures] == [*range(11)]
    assert max(map(sum, tower.batches)) <= MOST_PATCHES
    assert len(tower.batches) <= 5
    large = image(png((9, 0, 0), 66), 66)  # alone
    assert tower.encoder.encode(large).result(10).shape == (1, 33 * 33, 5)


def test_the_cache_keeps_what_was_asked_for_last():
    size = 16 * 5 * 4  # bytes of an image's embeddings
    made = Tower(cache_bytes=2 * size)
    one, two, three = (image(png((n, 0, 0))) for n in (1, 2, 3))
    for each in (one, two, one, three):
        made.encoder.encode(each).result(10)
    assert made.encoder.patches == 3 * 64
    assert made.encoder.encode(one).done()
    made.encoder.encode(two).result(10)
    assert made.encoder.patches == 4 * 64
    made.encoder.close()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"no picture at all", "is no image"),
        (png((1, 1, 1), 64)[:-40], "cannot be read"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "is no image|cannot be read"),
    ],
)
def test_what_cannot_be_read_fails_alone(content, told, tower):
    tower.gate.clear()
    first = tower.encoder.encode(image(png((4, 0, 0))))
    bad = tower.encoder.encode(image(content))
    good = tower.encoder.encode(image(png((5, 0, 0))))
    tower.gate.set()
    with pytest.raises(InvalidRequest, match=told):
        bad.result(10)
    assert (first.result(10).mean(), good.result(10).mean()) == (4, 5)


def test_other_tokens_than_the_prompt_has_are_refused(tower):
    with pytest.raises(ProtocolViolation, match=r"\(1, 8, 8\) patches"):
        tower.encoder.encode(image(png((1, 0, 0)), 4)).result(10)


def test_a_fault_of_one_image_costs_no_other_of_its_batch(tower):
    def encode(images):
        if any(one.values[0, 0] == 2 for one in images):
            raise RuntimeError("no memory")
        return tower.encode(images)

    tower.encoder._encode = encode
    tower.gate.clear()
    futures = [tower.encoder.encode(image(png((n, 0, 0)))) for n in range(5)]
    tower.gate.set()
    assert [f.result(10).mean().item() for n, f in enumerate(futures) if n != 2] == [0, 1, 3, 4]
    with pytest.raises(RuntimeError, match="no memory"):
        futures[2].result(10)


def test_who_leaves_takes_its_file_along(tower):
    """However many come and go while a pass runs, nothing of them stays."""
    tower.gate.clear()
    running, kept = image(png((1, 0, 0))), image(png((2, 0, 0)))
    first, second = tower.encoder.encode(running), tower.encoder.encode(kept)
    for n in range(3, 50):
        gone = image(png((n, 0, 0)))
        tower.encoder.leave(gone, tower.encoder.encode(gone))
        tower.encoder.leave(kept, tower.encoder.encode(kept))
    assert tower.encoder.waiting == 2
    assert all(len(each.futures) == 1 for each in tower.encoder._under_way.values())
    queued = [tower.encoder._queue.get_nowait() for _ in range(tower.encoder._queue.qsize())]
    assert [bool(each.image.content) for each in queued].count(True) <= 2
    for each in queued:
        tower.encoder._queue.put(each)
    tower.gate.set()
    assert (first.result(10).mean(), second.result(10).mean()) == (1, 2)


def test_a_fault_of_the_tower_costs_its_batch_and_no_later_one(tower):
    tower.error = RuntimeError("no memory")
    with pytest.raises(RuntimeError, match="no memory"):
        tower.encoder.encode(image(png((1, 0, 0)))).result(10)
    tower.error = None
    assert tower.encoder.encode(image(png((1, 0, 0)))).result(10).mean() == 1


def test_digests_tell_models_and_files_apart():
    assert len({image_digest(content, model) for content in (b"a", b"b") for model in ("m", "n")}) == 4


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("CUDA out of memory"), TypeError("odd"), AssertionError()]
)
def test_no_fault_of_a_processor_ends_the_thread(error, tower):
    tower.encoder._patches_of = lambda opened: (_ for _ in ()).throw(error)
    with pytest.raises(type(error)):
        tower.encoder.encode(image(png((1, 0, 0)))).result(10)
    tower.encoder._patches_of = tower.patches
    assert tower.encoder.encode(image(png((1, 0, 0)))).result(10).mean() == 1
    tower.encoder.health()


def test_one_that_nobody_waits_for_is_not_encoded(tower):
    tower.gate.clear()
    first = tower.encoder.encode(image(png((1, 0, 0))))
    left, kept = image(png((2, 0, 0))), image(png((3, 0, 0)))
    gone = [tower.encoder.encode(left) for _ in range(2)]
    futures = [tower.encoder.encode(kept) for _ in range(2)]
    for each, future in ((left, gone[0]), (left, gone[1]), (kept, futures[0])):
        tower.encoder.leave(each, future)
    tower.gate.set()
    assert first.result(10).mean() == 1
    assert futures[1].result(10).mean() == 3
    assert all(future.cancelled() for future in (*gone, futures[0]))
    assert tower.encoder.patches == 2 * 64
    assert tower.encoder.encode(left).result(10).mean() == 2  # asked for again


def test_who_leaves_after_the_end_takes_nothing_from_who_asks_again(tower):
    broken = image(b"no image")
    ended = tower.encoder.encode(broken)
    with pytest.raises(InvalidRequest):
        ended.result(10)
    tower.gate.clear()
    before = tower.encoder.encode(image(png((1, 0, 0))))
    again = tower.encoder.encode(broken)
    tower.encoder.leave(broken, ended)
    tower.gate.set()
    assert before.result(10).mean() == 1
    with pytest.raises(InvalidRequest):
        again.result(10)


def test_it_closes_without_what_still_waits():
    made = Tower()
    made.gate.clear()
    futures = [made.encoder.encode(image(png((n, 0, 0), 64), 64)) for n in range(20)]  # a batch each
    made.gate.set()
    made.encoder.close()
    assert not futures[-1].done()
    with pytest.raises(ClusterError, match="died"):
        made.encoder.health()


def test_embeddings_have_memory_of_their_own(tower):
    tower.gate.clear()
    futures = [tower.encoder.encode(image(png((n, 0, 0)))) for n in range(8)]
    tower.gate.set()
    assert all(f.result(10).untyped_storage().nbytes() == f.result(10).nbytes for f in futures)


def test_equal_files_with_other_tokens_are_not_taken_for_each_other(tower):
    whole = image(png((1, 0, 0)))
    tower.encoder.encode(whole).result(10)
    with pytest.raises(ProtocolViolation, match="has \\(1, 2, 8\\) tokens"):
        tower.encoder.encode(dataclasses.replace(whole, grid=(1, 2, 8))).result(10)


def test_one_that_comes_without_its_file_is_answered_from_what_is_here_or_asked_for_again(tower):
    whole = image(png((9, 0, 0)))
    bare = dataclasses.replace(whole, content=b"")
    with pytest.raises(ImageForgotten):
        tower.encoder.encode(bare)
    tower.gate.clear()
    first, second = tower.encoder.encode(whole), tower.encoder.encode(bare)  # which is on its way
    tower.gate.set()
    assert torch.equal(first.result(10), second.result(10))
    assert tower.encoder.encode(bare).done()
    assert (tower.encoder.queries, tower.encoder.hits) == (3, 2)
