"""The block ledger and the prefix index, against a plain model of both: who holds what, what is found, who is woken."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tercet.engine.blocks import BlockPool, Hold
from tercet.engine.prefix import PrefixIndex, chain_hash
from tercet.errors import Overloaded


def pool_and_index(total: int) -> tuple[BlockPool, PrefixIndex]:
    index = PrefixIndex()
    return BlockPool(total, index), index


def hashes(*tokens: int) -> list[bytes]:
    chain, parent = [], b""
    for token in tokens:
        parent = chain_hash(parent, [token])
        chain.append(parent)
    return chain


def test_allocation_takes_all_or_nothing():
    pool = BlockPool(4, PrefixIndex())
    pool.allocate(3, Hold.OWNED)
    with pytest.raises(Overloaded, match="2 KV blocks are needed, 1 of 4 are free"):
        pool.allocate(2, Hold.LEASED)
    assert pool.available == 1
    pool.check_integrity()


def test_a_prefix_is_matched_block_by_block():
    pool, index = pool_and_index(8)
    chain = hashes(1, 2, 3)
    blocks = pool.allocate(3, Hold.OWNED)
    for block, digest in zip(blocks, chain, strict=True):
        index.publish(block, digest)
    assert index.find(chain) == blocks
    assert index.find(hashes(1, 2, 9)) == blocks[:2]
    assert index.find(hashes(2, 2, 3)) == []  # a block stands for all that comes before it, too
    pool.check_integrity()


def test_a_cached_block_lives_until_it_is_the_oldest_and_needed():
    pool, index = pool_and_index(3)
    blocks = pool.allocate(3, Hold.OWNED)
    for block, digest in zip(blocks, hashes(1, 2, 3), strict=True):
        index.publish(block, digest)
    pool.release(blocks, Hold.OWNED)
    assert pool.available == 3
    [taken] = pool.allocate(1, Hold.OWNED)
    assert taken == blocks[2]  # the end of a chain is worth the least
    assert index.find(hashes(1, 2, 3)) == blocks[:2]
    pool.check_integrity()


def test_what_is_worth_nothing_is_taken_first():
    pool, index = pool_and_index(3)
    cached, plain = pool.allocate(1, Hold.OWNED), pool.allocate(1, Hold.OWNED)
    index.publish(cached[0], hashes(1)[0])
    pool.release(cached, Hold.OWNED)
    pool.release(plain, Hold.OWNED)
    assert pool.allocate(2, Hold.OWNED) == [plain[0], 2]


def test_nothing_is_found_where_the_index_is_off():
    index = PrefixIndex(enabled=False)
    pool = BlockPool(2, index)
    [block] = pool.allocate(1, Hold.OWNED)
    index.publish(block, hashes(1)[0])
    assert index.find(hashes(1)) == []


def test_what_is_unpublished_is_matched_no_more():
    pool, index = pool_and_index(2)
    [block] = pool.allocate(1, Hold.OWNED)
    index.publish(block, hashes(1)[0])
    index.forget([block, block])
    assert index.find(hashes(1)) == []
    pool.check_integrity()


@pytest.mark.parametrize("hold", list(Hold))
def test_every_hold_is_given_back_by_its_own_name(hold):
    pool = BlockPool(2, PrefixIndex())
    blocks = pool.allocate(1, hold)
    for other in set(Hold) - {hold}:
        with pytest.raises(AssertionError):
            pool.release(blocks, other)
        with pytest.raises(AssertionError):
            pool.move(blocks, other, hold)
    pool.release(blocks, hold)
    with pytest.raises(AssertionError):
        pool.release(blocks, hold)  # twice


class Model:
    """Holds as a plain bag; what the pool does must agree with it at every step."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.total = self.rng.randrange(2, 12)
        self.woken = 0
        self.index = PrefixIndex(enabled=self.rng.random() < 0.8)
        self.pool = BlockPool(self.total, self.index, self.wake)
        self.held: list[tuple[int, Hold]] = []

    def wake(self) -> None:
        self.woken += 1

    def free(self) -> int:
        return self.total - len({block for block, _ in self.held})

    def step(self) -> None:
        woken, free = self.woken, self.free()
        move = self.rng.choice(("allocate", "match", "publish", "move", "release", "unpublish"))
        getattr(self, move)()
        self.pool.check_integrity()
        assert self.pool.available == self.free()
        states = Counter(min((h for b, h in self.held if b == block), key=ORDER.index) for block in self.blocks())
        counts = self.pool.counts()
        assert {hold: counts[hold] for hold in Hold} == {hold: states[hold] for hold in Hold}
        assert (self.woken > woken) == (self.free() > free), "who waits for blocks is woken exactly when there are more"

    def blocks(self) -> list[int]:
        return sorted({block for block, _ in self.held})

    def allocate(self) -> None:
        count, hold = self.rng.randrange(1, 4), self.rng.choice(list(Hold))
        if count > self.free():
            with pytest.raises(Overloaded):
                self.pool.allocate(count, hold)
            return
        taken = self.pool.allocate(count, hold)
        assert not set(taken) & set(self.blocks()), "a block that somebody holds was given away"
        self.held += [(block, hold) for block in taken]

    def match(self) -> None:
        found = self.index.find(hashes(*(self.rng.randrange(3) for _ in range(3))))
        self.pool.share(found)
        self.held += [(block, Hold.OWNED) for block in found]

    def publish(self) -> None:
        if self.held:
            chain = hashes(*(self.rng.randrange(3) for _ in range(self.rng.randrange(1, 4))))
            self.index.publish(self.rng.choice(self.held)[0], chain[-1])

    def unpublish(self) -> None:
        if self.held:
            self.index.forget([self.rng.choice(self.held)[0]])

    def move(self) -> None:
        if self.held:
            block, hold = self.held.pop(self.rng.randrange(len(self.held)))
            target = self.rng.choice(list(Hold))
            self.pool.move([block], hold, target)
            self.held.append((block, target))

    def release(self) -> None:
        if self.held:
            block, hold = self.held.pop(self.rng.randrange(len(self.held)))
            self.pool.release([block], hold)


ORDER = [Hold.QUARANTINED, Hold.LEASED, Hold.IN_FLIGHT, Hold.OWNED]


def test_any_order_of_verbs_keeps_the_ledger():
    for seed in range(1500):
        model = Model(seed)
        try:
            for _ in range(40):
                model.step()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
