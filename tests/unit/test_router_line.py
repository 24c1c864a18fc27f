"""The line by itself: order within a client, fairness between clients, and what a place that comes back is worth."""

from __future__ import annotations

import itertools
import random
from collections import Counter

from tercet.roles.router.line import QUANTUM, Line, Place


def joined(line: Line, client: str, tokens: int = 10) -> Place:
    place = line.place(client, tokens)
    line.join(place)
    return place


def planned(line: Line) -> Place:
    head = line.head()
    assert head is not None
    line.leave(head, planned=True)
    return head


def test_one_client_is_first_come_first_planned():
    line = Line(itertools.count(1))
    places = [joined(line, "a", tokens) for tokens in (5000, 1, 300, 1, 7)]
    assert [planned(line) for _ in places] == places
    assert line.head() is None


def test_who_sends_little_comes_next_whoever_waits():
    line = Line(itertools.count(1))
    heavy = [joined(line, "heavy", QUANTUM) for _ in range(200)]
    assert line.head() is heavy[0]
    light = joined(line, "light")
    assert planned(line) is heavy[0]  # was next already, and may be waiting for blocks
    assert planned(line) is light


def test_waiting_clients_share_by_tokens():
    """Over any stretch nobody gets more than a turn and a request ahead of another who waits too."""
    line, rng = Line(itertools.count(1)), random.Random(5)
    sizes = {"short": 8, "long": 2000, "mixed": 0}
    got: Counter[str] = Counter()
    for client, size in sizes.items():
        for _ in range(3):
            joined(line, client, size or rng.choice([1, 50, 900]))
    for _ in range(3000):
        place = planned(line)
        got[place.client] += place.tokens
        joined(line, place.client, sizes[place.client] or rng.choice([1, 50, 900]))
        assert max(got.values()) - min(got[c] for c in sizes) <= 2 * (QUANTUM + 2000)


def test_output_is_paid_for_as_well():
    line = Line(itertools.count(1))
    for _ in range(50):
        joined(line, "talker", 1)
        joined(line, "listener", 1)
    order = []
    for _ in range(40):
        place = planned(line)
        order.append(place.client)
        line.charge(place.client, 1000 if place.client == "talker" else 1)
    assert order.count("listener") >= 35


def test_a_client_that_comes_again_and_again_is_not_always_new():
    """Else one that sends its requests one by one would be planned before everybody else for ever."""
    line = Line(itertools.count(1))
    for _ in range(200):
        joined(line, "patient", QUANTUM)
    joined(line, "eager", QUANTUM)
    order = []
    for _ in range(100):
        place = planned(line)
        order.append(place.client)
        if place.client == "eager":
            joined(line, "eager", QUANTUM)  # while nobody of its own waits
    assert 40 <= order.count("eager") <= 60


def test_a_place_that_comes_back_is_before_those_that_came_later():
    line = Line(itertools.count(1))
    first, second = joined(line, "a"), joined(line, "a")
    assert planned(line) is first
    assert line.head() is second
    line.join(first)
    assert line.head() is first
    assert planned(line) is first
    assert planned(line) is second


def test_coming_back_is_not_paid_for_twice():
    line = Line(itertools.count(1))
    first = joined(line, "a", 100)
    joined(line, "b", 100)
    for _ in range(5):
        line.leave(first, planned=True)
        line.join(first)
    assert line._clients["a"].credit == QUANTUM - 100


def test_the_head_stays_until_it_leaves():
    line = Line(itertools.count(1))
    head = joined(line, "a", 9000)
    for client in "bcd":
        joined(line, client, 1)
    assert all(line.head() is head for _ in range(10))
    line.leave(head, planned=False)
    assert line._clients["a"].credit == QUANTUM  # it was given up: nothing is owed
    assert line.head().client == "b"


def test_any_order_of_joining_leaving_and_coming_back():
    """Everybody who stands in line is planned in the end, in order within a client, and nothing is left behind."""
    for seed in range(2000):
        run_of_moves(seed)


def run_of_moves(seed: int) -> None:
    rng, line = random.Random(seed), Line(itertools.count(1))
    standing: list[Place] = []
    away: list[Place] = []
    for _ in range(rng.randrange(10, 120)):
        move = rng.random()
        if move < 0.45:
            standing.append(joined(line, rng.choice("abcde"), rng.choice([1, 30, 700, 4000])))
        elif move < 0.75 and (head := line.head()):
            assert head.number == min(p.number for p in standing if p.client == head.client), seed
            line.leave(head, planned=True)
            standing.remove(head)
            (away if rng.random() < 0.4 else []).append(head)
        elif move < 0.85 and away:
            back = away.pop(rng.randrange(len(away)))
            line.join(back)
            standing.append(back)
        elif move < 0.92 and standing:
            gone = standing.pop(rng.randrange(len(standing)))
            line.leave(gone, planned=False)
        else:
            line.charge(rng.choice("abcdef"), rng.randrange(3000))
    while standing:
        head = line.head()
        assert head.number == min(p.number for p in standing if p.client == head.client), seed
        line.leave(head, planned=True)
        standing.remove(head)
    assert line.head() is None
    assert line._clients == {}, seed
