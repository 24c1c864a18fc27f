"""Prompts with images through the engine: tokens are transformers', whatever lands when, chunked, preempted, cached."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tercet.core import PromptImage, SamplingParams, Ticket
from tercet.engine.executor import LocalExecutor
from tercet.engine.images import computable, overlaps, positions_of, shift_at, told_apart
from tercet.engine.plan import pack, unpack
from tercet.engine.runner import Runner
from tercet.engine.sequence import Sequence
from tercet.engine.state import EngineState
from tercet.errors import WorkerDrained
from tercet.kernels.kinds import choose_kernels
from tercet.models.sources import load_model, load_vision
from tercet.models.vision.processor import ImageProcessor
from tercet.spec import KvSpec, RoleSpec, SchedulerSpec
from tercet.transfer.memory.region import Region
from tests.unit.test_models_vision import IMAGE, is_qwen, pictures, processed, prompt_of, saved, spec

NEW = 6  # tokens of an answer
GREEDY = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)


def image(start, tokens, digest=b"a", grid=None):
    return PromptImage(digest * 32, grid or (1, 1, tokens), ((start, tokens),))


class Driven:
    """An engine without its thread: a step at a time, every plan through its packed form."""

    def __init__(self, loaded, *, budget=64, blocks=64, size=8, prefix=True):
        layout = loaded.model.kv_layout(blocks, size)
        role = RoleSpec(
            pool="cpu",
            kv=KvSpec(blocks=blocks, block_size=size, prefix_cache=prefix),
            scheduler=SchedulerSpec(token_budget=budget, max_running=4),
        )
        self.runner = Runner(loaded.model, Region(layout))
        self.executor = LocalExecutor(self.runner)
        self.state = EngineState(role, 2048, (), 8, lambda: None, mrope=bool(loaded.config.rope.sections))
        self.tokens = {}
        self.plans = []

    def add(self, name, ids, images):
        sequence = Sequence(Ticket(name, 0, 1), list(ids), len(ids), GREEDY, images=images)
        self.tokens[sequence] = []
        self.state.add(sequence, 0.0)
        return sequence

    def see(self, sequence, number, embeddings):
        if self.state.see(sequence, number):
            self.executor.see((sequence.ticket, number), embeddings)

    def step(self):
        """-> whether there was anything to do."""
        plan = self.state.plan(0.0)
        if not plan.pieces:
            return False
        self.plans.append(plan)
        report = self.state.commit(self.executor.launch(unpack(pack(plan))).result())
        for sampled in report:
            self.tokens[sampled.sequence].append(sampled.token.token_id)
        for key in self.state.forgotten():
            self.executor.forget(key)
        self.state.check_integrity()
        return True

    def run(self):
        while self.step():
            pass


class Model:
    """One of transformers', ours, and prompts with pictures for both."""

    def __init__(self, name, directory):
        self.reference, self.directory = saved(name, directory), directory
        kernels = choose_kernels("auto")
        self.tower = load_vision(spec(directory), kernels)
        self.loaded = load_model(spec(directory), kernels)
        processor = ImageProcessor(directory, self.tower.config)
        self.pictures = pictures(4)
        self.patches = [processor.patches(picture) for picture in self.pictures]
        self.encoded = self.tower.encode(self.patches)

    def prompt(self, chosen, seed=0, lead=5):
        """-> ids, images, and what transformers answers."""
        ids, starts = prompt_of([self.encoded[i].shape[1] for i in chosen], lead)
        torch.manual_seed(seed)
        text = ids != IMAGE
        ids[text] = torch.randint(0, 119, (int(text.sum()),))
        images = tuple(self._image(i, start) for i, start in zip(chosen, starts, strict=True))
        inputs = processed(self.directory, [self.pictures[i] for i in chosen])
        if is_qwen(self.directory):
            inputs["mm_token_type_ids"] = (ids == IMAGE).int().unsqueeze(0)
        whole = self.reference.generate(
            input_ids=ids.unsqueeze(0),
            attention_mask=torch.ones(1, len(ids)).long(),
            max_new_tokens=NEW,
            do_sample=False,
            **inputs,
        )
        return ids.tolist(), images, whole[0, len(ids) :].tolist()

    def _image(self, i, start):
        merge, (tiles, rows, columns) = self.tower.config.merge, self.patches[i].grid
        grid, tokens = (tiles, rows // merge, columns // merge), self.encoded[i].shape[1]
        return PromptImage(bytes([i]) * 32, grid, ((start, tokens),))


@pytest.fixture(scope="module", params=["qwen2.5-vl", "qwen3-vl", "idefics3"])
def model(request, tmp_path_factory):
    return Model(request.param, tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("budget", [5, 64, 1000])
def test_tokens_are_transformers_whatever_lands_when(model, budget):
    """Three prompts at once, whose pictures land in some order, before they begin and in their midst."""
    rng = random.Random(budget)
    driven = Driven(model.loaded, budget=budget, blocks=200)
    prompts = [model.prompt(chosen, seed) for seed, chosen in enumerate(([0], [1, 3, 0], [2]))]
    sequences = [driven.add(f"r{n}", ids, images) for n, (ids, images, _) in enumerate(prompts)]
    coming = [(s, number) for s in sequences for number in range(len(s.images))]
    rng.shuffle(coming)
    while coming:
        for _ in range(rng.randrange(3)):
            driven.step()
        sequence, number = coming.pop()
        assert sequence.planned <= sequence.computable
        driven.see(sequence, number, model.encoded[sequence.images[number].digest[0]])
    driven.run()
    assert [driven.tokens[s] for s in sequences] == [answer for _, _, answer in prompts]
    assert not driven.runner._embeddings


def test_the_text_before_a_picture_is_computed_without_it(model):
    driven = Driven(model.loaded)
    ids, images, answer = model.prompt([0])
    waits = driven.add("waits", ids, images)
    driven.run()
    assert waits.computed == images[0].start > 0
    other, others, expected = model.prompt([2], 1)
    passes = driven.add("passes", other, others)
    driven.see(passes, 0, model.encoded[2])
    driven.run()
    assert driven.tokens[passes] == expected, "a request behind one that waits for its picture"
    driven.see(waits, 0, model.encoded[0])
    driven.run()
    assert driven.tokens[waits] == answer


def test_a_preempted_one_is_computed_again_with_its_pictures(model):
    lead = 5 + -len(model.prompt([2])[0]) % 8  # full blocks, so that each needs one more for its second token
    prompts = [model.prompt([2], seed, lead) for seed in range(3)]
    driven = Driven(model.loaded, blocks=len(prompts[0][0]) // 8 * 2 + 1, prefix=False)
    sequences = [driven.add(f"r{n}", ids, images) for n, (ids, images, _) in enumerate(prompts)]
    for sequence in sequences:
        driven.see(sequence, 0, model.encoded[2])
    driven.run()
    assert [driven.tokens[s] for s in sequences] == [answer for _, _, answer in prompts]
    assert driven.state.load().preemptions > 0
    assert not driven.runner._embeddings


def test_equal_text_with_another_picture_never_hits_the_prefix_cache(model):
    """Pictures 0 and 0' have as many tokens; only the digest tells them apart."""
    driven = Driven(model.loaded)
    ids, images, answer = model.prompt([0], lead=19)
    other = (PromptImage(b"!" * 32, images[0].grid, images[0].spans),)
    before = images[0].start // 8 * 8
    cached, noise = [], 9 * torch.randn_like(model.encoded[0])
    for name, shown in (("first", images), ("again", images), ("other", other), ("other again", other)):
        sequence = driven.add(name, ids, shown)
        driven.see(sequence, 0, model.encoded[0] if shown is images else noise)
        driven.run()
        cached.append(sequence.cached_tokens)
        assert (driven.tokens[sequence] == answer) == (shown is images)
    full = (len(ids) - 1) // 8 * 8
    assert cached == [0, full, before, full]


def test_an_aborted_one_leaves_no_embeddings(model):
    driven = Driven(model.loaded, budget=8)
    ids, images, _ = model.prompt([0, 1])
    sequence = driven.add("r", ids, images)
    driven.see(sequence, 1, model.encoded[1])
    driven.step()
    driven.state.abort(sequence)
    assert driven.state.forgotten() == [(sequence.ticket, 1)]
    driven.see(sequence, 0, model.encoded[0])  # it lands late
    assert (sequence.ticket, 0) not in driven.runner._embeddings
    assert not driven.step()


# ---- the pure part

IMAGES = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 5)), max_size=4)  # gap, rows, columns


def placed(drawn):
    images, at = [], 0
    for number, (gap, rows, columns) in enumerate(drawn):
        at += gap
        images.append(PromptImage(bytes([number]) * 32, (1, rows, columns), ((at, rows * columns),)))
        at += rows * columns
    return images, at + 3


@given(IMAGES, st.integers(1, 40))
def test_ranges_and_positions_of_any_prompt(drawn, size):
    images, length = placed(drawn)
    owner = {at + i: (n, i) for n, (image, at) in enumerate((i, i.start) for i in images) for i in range(image.tokens)}
    for start in range(0, length, size):
        end = min(length, start + size)
        found = {o.start + i: (o.image, o.offset + i) for o in overlaps(images, start, end) for i in range(o.tokens)}
        assert found == {at: owner[at] for at in range(start, end) if at in owner}
    positions = positions_of(images, length)
    assert positions.shape == (3, length)
    for at in range(length):
        if at not in owner:
            assert positions[:, at].tolist() == [at + shift_at(images, at)] * 3
    for here in ({*range(len(images))}, set(), {0}):
        for done in (0, size, length // 2):
            gone = {number for number, each in enumerate(images) if each.end <= done}
            expected = next((at for at in range(length) if at in owner and owner[at][0] not in here | gone), length)
            assert computable(images, here, done, length) == max(done, expected)


def test_what_hashes_tell_apart():
    """The picture, its place, and which part of it lies in the block."""
    texts = {
        told_apart(images, 8, 16)
        for images in (
            [],
            [image(8, 8)],
            [image(8, 8, b"b")],
            [image(9, 8)],
            [image(0, 16)],
            [image(8, 3), image(12, 4, b"b")],
            [image(8, 3, b"b"), image(12, 4)],
        )
    }
    assert len(texts) == 7
    assert told_apart([image(0, 8)], 8, 16) == told_apart([image(16, 3)], 8, 16) == b""


def test_a_prompt_with_pictures_is_handed_over(model):
    """Computed by one engine as pictures land, decoded by another that has none of them."""
    ids, images, answer = model.prompt([1, 0], lead=9)
    prefill, decode = Driven(model.loaded, budget=16), Driven(model.loaded)
    ticket = Ticket("r", 0, 1)
    target = Sequence(ticket, list(ids), len(ids), GREEDY, images=images)
    decode.tokens[target] = []
    decode.state.reserve(target)

    def push(_, layer, first, blocks):
        for index, block in enumerate(blocks, first):
            decode.runner.kv_cache[layer, target.blocks[index]] = prefill.runner.kv_cache[layer, block]

    prefill.runner._push = push
    source = prefill.add("r", ids, images)
    source.hand_over = True
    for number in (1, 0):
        prefill.run()
        prefill.see(source, number, model.encoded[images[number].digest[0]])
    prefill.run()
    [first] = prefill.tokens[source]
    assert not prefill.runner._embeddings
    decode.state.join(target, first)
    decode.run()
    assert [first, *decode.tokens[target]] == answer


def test_one_that_was_decoded_only_leaves_when_blocks_run_out(model):
    """Its images are elsewhere, so it cannot be computed again: it is told so, and the others go on."""
    ids, images, answer = model.prompt([2], lead=5 + -len(model.prompt([2])[0]) % 8)  # full blocks
    decode = Driven(model.loaded, blocks=len(ids) // 8 * 2 + 1, prefix=False)
    prefill = Driven(model.loaded)
    prefill.runner._push = lambda _, layer, first, blocks: [
        decode.runner.kv_cache.__setitem__(
            (layer, target.blocks[first + i]), prefill.runner.kv_cache[layer, block].clone()
        )
        for i, block in enumerate(blocks)
    ]
    targets = []
    for name in ("one", "two"):
        target = Sequence(Ticket(name, 0, 1), list(ids), len(ids), GREEDY, images=images)
        targets.append(target)
        decode.tokens[target] = []
        decode.state.reserve(target)
        source = prefill.add(name, ids, images)
        source.hand_over = True
        prefill.see(source, 0, model.encoded[2])
        prefill.run()
        decode.state.join(target, prefill.tokens[source][0])
    decode.run()
    one, two = targets
    [left] = decode.state.evicted()
    assert (left.sequence, type(left.error)) == (two, WorkerDrained)
    assert [prefill.tokens[source][0], *decode.tokens[one]] == answer
    assert two.over
    assert decode.state.evicted() == []
    load = decode.state.load()
    assert (load.blocks_free, load.preemptions, load.running, load.waiting) == (load.blocks_total, 1, 0, 0)
