"""What a prefill worker tells a decode worker about the first token: the note in WRITTEN.

The mover does not parse it. It comes from a peer, so each field is checked.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import msgpack

from tercet.core import STAGES, StageSeconds, TopLogprobs
from tercet.errors import ProtocolViolation


@dataclass(frozen=True)
class FirstToken:
    token_id: int  # sampled from the prompt's last logits
    logprob: float | None
    top_logprobs: TopLogprobs  # (token id, logprob), most likely first
    cached_tokens: int
    stages: StageSeconds  # that the request has passed, each once
    transport: str

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Every token id in it."""
        return (self.token_id, *(token_id for token_id, _ in self.top_logprobs))

    def encode(self) -> bytes:
        note: bytes = msgpack.packb(astuple(self))
        return note

    @classmethod
    def decode(cls, note: bytes) -> FirstToken:
        """Raises ProtocolViolation unless every field is there with its type."""
        try:
            fields = msgpack.unpackb(note)
        except (ValueError, msgpack.exceptions.UnpackException) as error:
            raise ProtocolViolation(f"a first token is no msgpack: {error}") from error
        match fields:
            case [int(token_id), logprob, list(top), int(cached_tokens), list(stages), str(transport)] if (
                _is_count(token_id)
                and (logprob is None or _is_logprob(logprob))
                and all(map(_is_alternative, top))
                and _is_count(cached_tokens)
                and all(map(_is_stage, stages))
                and len({name for name, _ in stages}) == len(stages)
            ):
                pairs = tuple((int(token), float(value)) for token, value in top)
                return cls(token_id, logprob, pairs, cached_tokens, tuple(map(tuple, stages)), transport)
        raise ProtocolViolation(f"no first token: {fields!r:.200}")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**32  # as on the gateway's wire


def _is_logprob(value: object) -> bool:
    return type(value) is float and value < math.inf  # false for nan


def _is_alternative(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and _is_count(value[0]) and _is_logprob(value[1])


def _is_stage(value: object) -> bool:
    """A known stage with its seconds; an unknown one must not reach clients."""
    match value:
        case [str(name), float(seconds)]:
            return name in STAGES and 0 <= seconds < math.inf
    return False
