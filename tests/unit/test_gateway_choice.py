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
    choice = Choice(0, request, tokenizer, (), arrived=0.0)
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


def test_offsets_stand_behind_text_that_was_held(tmp_path):
    """Bytes wait for the token behind them, which then brings their character and its own text."""
    MAKERS["llama class"](tmp_path)
    tokenizer = load_tokenizer(ModelSpec(source=str(tmp_path)))
    e_acute = [byte + 3 for byte in "é".encode()]  # behind <unk>, <s>, </s>
    assert tokenizer.decode(e_acute) == "é"
    after = tokenizer.encode("x the", add_special=False)[-1]
    request = GenerateRequest("r", (5,), SamplingParams(logprobs=0), deadline=0.0)
    choice = Choice(0, request, tokenizer, (), arrived=0.0)
    deltas = [choice.push(TokenEvent(token, -0.5), METRICS) for token in (*e_acute, after, after)]
    text = "".join(delta.text for delta in deltas)
    word = tokenizer.token_text(after)
    assert text == "é" + 2 * word
    assert [delta.offset for delta in deltas] == [0, 0, 1, 1 + len(word)]
