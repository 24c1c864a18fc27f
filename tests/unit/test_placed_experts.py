"""Experts where a file says: the model's layers get its rows, and what does not fit is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from examples.make_tiny_model import Family, make
from tercet.cluster import preflight
from tercet.distributed.expert_map import default_map
from tercet.errors import UnsupportedSpec
from tercet.models.sources import load_config
from tercet.roles.placed import placed_experts
from tercet.spec import ModelSpec, ParallelSpec
from tests.helpers import spec_of

EXPERTS, RANKS, REDUNDANCY = 8, 2, 4


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    made = tmp_path_factory.mktemp("tiny")
    make(Family.DEEPSEEK_V3, made)
    return str(made)


@pytest.fixture
def config(source):
    return load_config(ModelSpec(source=source))


@pytest.fixture
def wanted(tmp_path):
    return ParallelSpec(data=2, expert=RANKS, expert_redundancy=REDUNDANCY, expert_plan=str(tmp_path / "plan.json"))


def plan_of(layers: int) -> list[list[int]]:
    """Each layer another one."""
    draw = torch.Generator().manual_seed(0)
    return [[*torch.randperm(EXPERTS, generator=draw).tolist(), layer % 8, 1, 2, 3] for layer in range(layers)]


def test_each_layer_with_experts_has_its_row(config, wanted, tmp_path):
    layers = config.mixture.layers
    assert 0 not in layers  # so that numbers of the model's layers and of the plan's differ
    plan = plan_of(len(layers))
    (tmp_path / "plan.json").write_text(json.dumps({"ranks": RANKS, "phy2log": plan, "more": "is not read"}))
    found = placed_experts(wanted, config)
    for row, layer in zip(plan, layers, strict=True):
        assert found.experts_on(0, layer) + found.experts_on(1, layer) == row
    assert found.digest != placed_experts(wanted.model_copy(update={"expert_plan": None}), config).digest


def test_without_a_file_experts_lie_in_their_order(config):
    alone = placed_experts(ParallelSpec(data=2, expert=RANKS, expert_redundancy=REDUNDANCY), config)
    assert torch.equal(alone.phy2log, default_map(EXPERTS, REDUNDANCY, RANKS).phy2log)
    assert placed_experts(ParallelSpec(tensor=2), config) is None


GOOD = {"ranks": RANKS, "phy2log": plan_of(3)}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "there is no such file"),
        ("", "it is no JSON"),
        ("[" * 100_000, "it is no JSON"),
        ("[]", "it has no `ranks` and `phy2log`"),
        ("{}", "`tercet experts show --plan` print plans"),
        (json.dumps({"ranks": RANKS}), "it has no `ranks` and `phy2log`"),
        (json.dumps(GOOD | {"phy2log": [[0, 1], [2]]}), "no table of whole numbers"),
        (json.dumps(GOOD | {"phy2log": "x"}), "no table"),
        (json.dumps(GOOD | {"phy2log": {"a": 1}}), "no table"),
        (json.dumps(GOOD | {"phy2log": [[None]]}), "no table"),
        (json.dumps(GOOD | {"phy2log": []}), "not whole numbers"),
        (json.dumps(GOOD | {"phy2log": 3}), "not whole numbers"),
        (json.dumps(GOOD | {"phy2log": [[0.5] * 12] * 3}), "not whole numbers"),
        (json.dumps(GOOD | {"phy2log": [[True] * 12] * 3}), "not whole numbers"),
        (json.dumps(GOOD | {"phy2log": [[2**70] * 12] * 3}), "no table"),
        (json.dumps(GOOD | {"ranks": 4}), "it is for 4 ranks, and not for 2"),
        (json.dumps(GOOD | {"phy2log": plan_of(2)}), "it is for 2 layers of 12 slots, and the model has 3 layers"),
        (json.dumps(GOOD | {"phy2log": [row[:10] for row in plan_of(3)]}), "3 layers of 10 slots"),
        (json.dumps(GOOD | {"phy2log": [[0] * 12] * 3}), "no slot holds experts"),
        (json.dumps(GOOD | {"phy2log": [[8] * 12] * 3}), "the model has 8"),
        (json.dumps(GOOD | {"phy2log": [[-1] * 12] * 3}), "the model has 8"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_starts(source, config, wanted, tmp_path, content, told):
    assert len(config.mixture.layers) == 3
    if content is not None:
        (tmp_path / "plan.json").write_text(content)
    spec = spec_of("aggregated", 1, source=source)
    (role,) = spec.roles
    spec = spec.model_copy(update={"roles": {role: spec.roles[role].model_copy(update={"parallelism": wanted})}})
    with pytest.raises(UnsupportedSpec, match=r"expert_plan .*plan\.json: ") as refused:
        preflight.check_degrees_if_here(spec)
    assert told in str(refused.value)


def test_it_takes_experts_on_several_ranks():
    with pytest.raises(ValidationError, match=r"expert_plan: plan\.json has no effect where expert is 1"):
        ParallelSpec(tensor=2, expert_plan="plan.json")


def test_dense_models_are_refused_by_their_degrees(config, wanted):
    with pytest.raises(AssertionError):
        placed_experts(wanted, replace(config, mixture=None))
