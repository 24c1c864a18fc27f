"""How the time until the first token is told as stages, which follow each other and sum to it. Pure."""

from __future__ import annotations

from typing import NamedTuple

from tercet.core import StageSeconds


class LastImage(NamedTuple):
    """The last image of a prompt whose embeddings came."""

    at: float  # time.monotonic()
    transfer_s: float  # on their way from another worker; 0 from this one


def until_first_token(arrived: float, scheduled: float, image: LastImage | None, now: float) -> StageSeconds:
    """arrived: at the worker that computes the prompt; scheduled: its first chunk; now: the first token is sampled.

    Text before an image is computed while the image is encoded: that time is told as the image's."""
    if image is None or image.at > now:  # or a prefix cache had what it was for
        return (("queue", scheduled - arrived), ("prefill", now - scheduled))
    transfer = min(image.transfer_s, image.at - arrived)
    begun = max(scheduled, image.at)
    return (
        ("queue", begun - image.at),
        ("encode", image.at - transfer - arrived),
        ("embed_transfer", transfer),
        ("prefill", now - begun),
    )
