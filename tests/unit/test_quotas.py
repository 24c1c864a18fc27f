"""What a key may use, by a clock that the test sets."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tercet.errors import RateLimited
from tercet.roles.gateway.keys import Key
from tercet.roles.gateway.quotas import Quotas


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def key(name: str = "a", **limits: int) -> Key:
    return Key(name=name, sha256="0" * 64, **limits)


def runs(quotas: Quotas, one: Key, tokens: int = 0) -> bool:
    try:
        with quotas.request(one) as spend:
            spend(tokens)
    except RateLimited:
        return False
    return True


def test_nothing_is_limited_that_is_not_said():
    quotas = Quotas(Clock())
    assert all(runs(quotas, key(), 10**9) for _ in range(1000))
    with quotas.request(None) as spend:
        spend(10**9)


def test_requests_a_minute_come_back_evenly():
    quotas, clock = Quotas(clock := Clock()), clock
    one = key(requests_per_minute=6)
    assert [runs(quotas, one) for _ in range(8)] == [True] * 6 + [False] * 2
    clock.now += 9.9
    assert not runs(quotas, one)
    clock.now += 0.2
    assert [runs(quotas, one) for _ in range(2)] == [True, False]
    clock.now += 3600
    assert [runs(quotas, one) for _ in range(8)] == [True] * 6 + [False] * 2


def test_who_is_refused_is_told_when_to_come_back():
    quotas, clock = Quotas(clock := Clock()), clock
    one = key(requests_per_minute=6)
    for _ in range(6):
        runs(quotas, one)
    with (
        pytest.raises(RateLimited, match="a may use 6 requests a minute; try again in 10 s") as refused,
        quotas.request(one),
    ):
        pass
    assert refused.value.retry_after_s == 10
    clock.now += refused.value.retry_after_s
    assert runs(quotas, one)


def test_tokens_may_end_in_debt_for_which_the_next_one_waits():
    quotas, clock = Quotas(clock := Clock()), clock
    one = key(tokens_per_minute=60)
    assert runs(quotas, one, 180)  # 120 more than there were
    with pytest.raises(RateLimited, match="tokens a minute") as refused, quotas.request(one):
        pass
    assert refused.value.retry_after_s == 121
    clock.now += 120.5
    assert not runs(quotas, one)
    clock.now += 0.5
    assert runs(quotas, one)


def test_at_once():
    quotas = Quotas(Clock())
    one, other = key(concurrent=2), key("b", concurrent=2)
    with contextlib.ExitStack() as stack:
        for each in (one, one, other, other):
            stack.enter_context(quotas.request(each))
        assert not runs(quotas, one)
        with pytest.raises(RateLimited, match="2 requests of a are running"), quotas.request(one):
            pass
    assert runs(quotas, one)
    with contextlib.suppress(ValueError), quotas.request(one):  # also when it fails
        raise ValueError
    with quotas.request(one), quotas.request(one):
        pass


def test_a_refused_request_costs_nothing():
    quotas, clock = Quotas(clock := Clock()), clock
    one = key(requests_per_minute=60, concurrent=1)
    with quotas.request(one):
        assert not any(runs(quotas, one) for _ in range(500))
    assert sum(runs(quotas, one) for _ in range(100)) == 59


def test_a_key_that_is_renewed_goes_on_where_its_name_was():
    quotas = Quotas(Clock())
    assert runs(quotas, key(requests_per_minute=1))
    renewed = Key(name="a", sha256="1" * 64, requests_per_minute=1)
    assert not runs(quotas, renewed)
    assert not runs(quotas, key(requests_per_minute=1))


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(0, 50)), max_size=60), st.integers(1, 100))
def test_never_more_than_a_minute_and_what_came_back(steps, limit):
    """Over any time t no more tokens begin than the bucket held and what came back in t, and the last request's."""
    clock = Clock()
    quotas, one = Quotas(clock), key(tokens_per_minute=limit)
    began, used, last = clock.now, 0, 0
    for pause, tokens in steps:
        clock.now += pause
        if runs(quotas, one, tokens):
            used, last = used + tokens, tokens
        assert used - last <= limit + (clock.now - began) * limit / 60 + 1e-6
