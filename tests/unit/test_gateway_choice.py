"""The text of one choice: where it begins behind its prompt, and what its last token adds."""

from __future__ import annotations

import pytest

from tercet.core import Done, FinishReason, GenerateRequest, SamplingParams, TokenEvent
from tercet.metrics import Metrics
from tercet.models.sources import load_tokenizer
from tercet.roles.gateway.choice import Choice
from tercet.spec import ModelSpec
from tests.field.tokenizer_directories import MAKERS

METRICS = Metrics(dict)


def answer(tokenizer, prompt, tokens, finish):
    """The text of an answer whose last token has `finish`."""
    ids = tuple(tokenizer.encode(prompt))
    request = GenerateRequest("r", ids, SamplingParams(), deadline=0.0)
    choice = Choice(0, request, tokenizer.detokenizer(ids), (), arrived=0.0)
    events = [*map(TokenEvent, tokens[:-1]), TokenEvent(tokens[-1], finish=finish)]
    return "".join(choice.push(e, METRICS).text for e in events) + choice.finish(Done(finish)).text


@pytest.mark.parametrize("name", ["unflagged end", "byte-level", "legacy sentencepiece", "metaspace always"])
def test_the_end_is_no_text_and_a_space_is(name, tmp_path):
    """Also an end that nobody called special, and a stop token that the client named."""
    MAKERS[name](tmp_path)
    tokenizer = load_tokenizer(ModelSpec(source=str(tmp_path)))
    words = tokenizer.encode("x the mat", add_special=False)
    after = words[next(k for k in range(len(words)) if tokenizer.decode(words[:k]).endswith("x")) :]  # " the mat"
    for end in tokenizer.eos_token_ids:
        assert answer(tokenizer, "the cat", [*after, end], FinishReason.STOP) == " the mat"
    assert answer(tokenizer, "the cat", after, FinishReason.LENGTH) == " the mat"
    stopped = answer(tokenizer, "the cat", after, FinishReason.STOP)
    assert stopped == " the mat".removesuffix(tokenizer.token_text(after[-1]))
