"""What `roles.*.expert_placement` may say: each wrong value is refused with its key and what to do."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from tercet.spec import ExpertPlacementSpec, ParallelSpec, RoleSpec

SPREAD = {"data": 2, "expert": 2}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"policy": "lp"}, "'ilp', 'eplb' or 'none'"),
        ({"policy": None}, "policy"),
        ({"window_size": 0}, "greater than or equal to 1"),
        ({"window_size": 1.5}, "window_size"),
        ({"window_size": 1501}, r"step_interval: 3000 steps have no two windows of 1501 \(window_size\)"),
        ({"step_interval": 1999}, "step_interval: 1999 steps have no two windows of 1000"),
        ({"step_interval": -1}, "step_interval"),
        ({"objective": "interlayer"}, "should be 'balance', 'internode' or 'internode_dedup'"),
        (
            {"objective": "internode", "policy": "eplb"},
            "policy eplb cannot solve for internode; use policy ilp",
        ),
        (
            {"objective": "internode", "policy": "none"},
            "policy none cannot solve for internode; use policy ilp",
        ),
        ({"objective": "internode_dedup", "max_moved_bytes": 5}, "max_moved_bytes: objective internode_dedup does not"),
        ({"objective": "internode", "dispatch_interval": 2000}, "dispatch_interval: objective internode does not"),
        ({"max_moved_bytes": -1}, "greater than or equal to 0"),
        ({"policy": "eplb", "max_moved_bytes": 5}, "max_moved_bytes: policy eplb places everything anew; use ilp"),
        ({"time_limit_s": 0.0}, "greater than or equal to 0.1"),
        ({"time_limit_s": float("nan")}, "time_limit_s"),
        ({"time_limit_s": float("inf")}, "time_limit_s"),
        ({"min_gain": 1.1}, "less than or equal to 1"),
        ({"min_gain": -0.1}, "greater than or equal to 0"),
        ({"min_gain": float("nan")}, "min_gain"),
        ({"num_redundant_experts": 2}, "num_redundant_experts"),
        ({"dispatch_interval": 999}, "999 steps have no window of 1000 .window_size.; at least 1000"),
        ({"dispatch_interval": 0}, "dispatch_interval"),
        ({"dispatch_interval": 3000}, "3000 steps are not below step_interval, 3000"),
        ({"policy": "eplb", "dispatch_interval": 4000}, "4000 steps are not below step_interval, 3000"),
    ],
)
def test_a_wrong_value_is_refused(wrong, said):
    with pytest.raises(ValidationError, match=said):
        ExpertPlacementSpec.model_validate(wrong)


def test_it_is_refused_where_it_would_have_no_effect():
    with pytest.raises(ValidationError, match=r"expert_placement: it has no effect where parallelism\.expert is 1"):
        RoleSpec.model_validate({"expert_placement": {"window_size": 10, "step_interval": 20}})
    assert RoleSpec.model_validate({"expert_placement": {"policy": "none"}}).expert_placement.policy == "none"
    assert RoleSpec.model_validate({"expert_placement": {}}) == RoleSpec()  # as `tercet spec` prints it
    shares = {"dispatch_interval": 1000}
    with pytest.raises(ValidationError, match=r"among replicas, and parallelism\.expert_redundancy is 0"):
        RoleSpec.model_validate({"parallelism": SPREAD, "expert_placement": shares})
    replicated = SPREAD | {"expert_redundancy": 2}
    role = RoleSpec.model_validate({"parallelism": replicated, "expert_placement": shares})
    assert role.expert_placement.dispatch_interval == 1000
    role = RoleSpec.model_validate({"parallelism": SPREAD, "expert_placement": {"policy": "eplb"}})
    assert role.parallelism == ParallelSpec(**SPREAD)
    assert role.expert_placement.policy == "eplb"


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"window_size": 1, "step_interval": 2},
        {"min_gain": 0.0},
        {"max_moved_bytes": 0},
        *({"policy": policy, "dispatch_interval": 1000} for policy in ("ilp", "eplb", "none")),
        {"objective": "internode"},
        {"policy": "none", "dispatch_interval": 4000},
    ],
)
def test_what_may_be_said(given):
    found = ExpertPlacementSpec.model_validate(given)
    assert found.model_dump(exclude_unset=True) == given
