"""Which workers a request gets: who is blamed for a failure, who is asked again, and who is not asked at all."""

from __future__ import annotations

import pytest

from tercet.core import Load, PairState, Role, WorkerInfo
from tercet.errors import DigestMismatch, LeaseExpired, PeerDown, PeerUnreachable, WorkerLost
from tercet.roles.router.directory import WorkerView
from tercet.roles.router.policy import History, Plan, choose, score_of


def view(name, tokens=0, pairs=()):
    info = WorkerInfo(name, Role.PREFILL if name[0] == "p" else Role.DECODE, 1, "", "", "")
    return WorkerView(info, Load(pairs=pairs), up=True, tokens=tokens)


def plan_of(prefill, decode):
    return Plan(prefill, decode, score_of(prefill, decode, History()))


def names(plan):
    return (plan.prefill.info.worker_id, plan.decode.info.worker_id)


P = [view("p0"), view("p1", 50)]
D = [view("d0"), view("d1", 50)]


def chosen(history, prefills=P, decodes=D):
    """What is chosen after as many pauses as it takes."""
    for _ in range(3):
        if (plan := choose(prefills, decodes, history)) is not None:
            return plan
    raise AssertionError("nobody is chosen")


def test_the_least_loaded():
    assert names(choose(P, D, History())) == ("p0", "d0")


def test_nobody_has_room():
    assert choose([], D, History()) is None
    assert choose(P, [], History()) is None


def test_one_worker_that_does_both():
    both = [view("a0", 5), view("a1")]
    plan = choose(both, both, History())
    assert names(plan) == ("a1", "a1")
    assert len(plan.workers) == 1


def test_a_busy_worker_is_passed_over_until_none_is_left():
    history = History(busy={D[0]})
    assert names(choose(P, D, history)) == ("p0", "d1")
    history.busy.add(D[1])
    assert choose(P, D, history) is None  # a pause
    assert names(choose(P, D, history)) == ("p0", "d0")


def test_a_pair_with_a_known_fault_is_the_last_choice():
    cut_off = [view("p0", pairs=(PairState("d0", fault="no route"),)), view("p1", 99)]
    assert names(choose(cut_off[:1], D, History())) == ("p0", "d1")
    assert names(choose(cut_off, D[:1], History())) == ("p1", "d0")
    assert names(choose(cut_off[:1], D[:1], History())) == ("p0", "d0")  # there is no other


@pytest.mark.parametrize("prefills", [P[:1], P])
def test_a_decode_worker_that_cannot_be_reached_is_not_asked_again(prefills):
    history = History()
    plan = choose(prefills, D, history)
    history.failed(plan, plan.prefill, PeerUnreachable("no route"))
    assert chosen(history, prefills).decode is D[1]


def test_a_prefill_worker_that_reaches_nobody_is_not_asked_for_ever():
    """Whoever is cut off, with two of each a healthy pair is found with the next attempt."""
    history = History()
    history.failed(plan_of(P[0], D[0]), P[0], PeerUnreachable("no route"))
    assert names(chosen(history)) == ("p1", "d1")


@pytest.mark.parametrize("error", [PeerDown("gone"), LeaseExpired("silent"), DigestMismatch("corrupt")])
def test_a_worker_that_keeps_kv_is_asked_again_once(error):
    history = History()
    history.failed(plan_of(P[0], D[0]), D[0], error)
    assert names(chosen(history)) == ("p1", "d0")
    history.failed(plan_of(P[1], D[0]), D[0], error)
    assert chosen(history).decode is D[1]


def test_with_one_prefill_worker_the_kept_one_is_asked_again_after_a_pause():
    history = History()
    history.failed(plan_of(P[0], D[0]), D[0], PeerDown("the link broke"))
    assert choose(P[:1], D, history) is None
    assert names(choose(P[:1], D, history)) == ("p0", "d0")
    history.failed(plan_of(P[0], D[0]), D[0], PeerDown("the link broke"))
    assert names(chosen(history, P[:1])) == ("p0", "d1")


def test_a_kept_worker_without_room_is_not_waited_for():
    history = History()
    history.failed(plan_of(P[0], D[0]), D[0], PeerDown("the link broke"))
    assert names(choose(P, D[1:], history)) == ("p1", "d1")


@pytest.mark.parametrize("lost", ["prefill", "decode"])
def test_who_died_is_to_blame(lost):
    history = History()
    plan = plan_of(P[0], D[0])
    dead = getattr(plan, lost)
    history.failed(plan, dead, WorkerLost("killed"))
    again = chosen(history)
    assert dead not in again.workers
    assert history.deaths == {dead.incarnation}
    if lost == "prefill":
        assert again.decode is D[0]  # what had landed there is used


def test_a_fault_that_stays_leads_to_every_pair():
    """No pair is tried twice before each was tried, whichever fails."""
    history, tried = History(), []
    for _ in range(4):
        plan = chosen(history)
        tried.append(names(plan))
        history.failed(plan, plan.prefill, PeerUnreachable("no route"))
    assert len(set(tried)) == 4
