"""What crosses the worker's stream is what was sent."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from tercet.core import Leg, Load, PromptImage, Role, SamplingParams, Ticket, TraceContext
from tercet.wire.codec import leg_from_proto, leg_to_proto, load_from_proto, load_to_proto
from tercet.wire.gen import worker_pb2 as pb

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
WHOLE = Leg(
    Ticket("r.1", 2, 3),
    Role.PREFILL,
    (5, 6, 7),
    2,
    SamplingParams(max_tokens=3, seed=-4, stop_token_ids=(9,), logprobs=0, prompt_logprobs=1),
    1.5,
    "there",
    (PromptImage(b"digest", (1, 2, 3), ((0, 6),), b"file"),),
    TraceContext(PARENT, "vendor=1"),
)


@pytest.mark.parametrize("leg", [WHOLE, replace(WHOLE, trace=TraceContext(PARENT)), replace(WHOLE, trace=None)])
def test_a_leg_comes_over_with_every_field(leg):
    start = pb.Command.FromString(leg_to_proto(leg).SerializeToString()).start
    assert leg_from_proto(start) == leg


def test_no_field_of_the_leg_above_is_left_at_its_default():
    bare = Leg(*(getattr(WHOLE, field.name) for field in fields(Leg)[:6]))
    assert all(getattr(WHOLE, field.name) != getattr(bare, field.name) for field in fields(Leg)[6:])


def test_a_load_comes_over():
    load = Load(running=1, spans_dropped=2, rank_losses=3)
    assert load_from_proto(pb.Load.FromString(load_to_proto(load).SerializeToString())) == load
