"""Prompts that are refused before they are read, and ids that the model has no embedding of."""

import pytest

from tercet.errors import ContextTooLong, InvalidRequest
from tercet.roles.gateway.ask import Chat, ServedModel
from tercet.roles.gateway.offloop import OffLoop
from tercet.roles.gateway.tokenising import PIECE, SHORT, Tokenising
from tests.fakes.tokenizer import CONTEXT, EOS, VOCAB, ByteTokenizer


class Tokenizer(ByteTokenizer):
    """Counts what it reads, and knows a token more than the model."""

    longest_token = None

    def __init__(self, chars=1):
        self.chars = chars  # of a token
        self.read = 0

    def encode(self, text, add_special=True):
        self.read += len(text)
        if "<pad>" in text:
            return [VOCAB]
        return list(text.encode())[:: self.chars]

    def token_text(self, token_id):
        return "<pad>" if token_id == VOCAB else super().token_text(token_id)


def tokenising(tokenizer, context=CONTEXT, most=16):
    return Tokenising(ServedModel("m", tokenizer, VOCAB, context), most, OffLoop())


async def ids(made, prompt):
    return (await made.encoded([prompt], "me"))[0].ids


@pytest.mark.parametrize("prompt", ["x" * (SHORT + 1), Chat(({"role": "user", "content": "x" * SHORT},) * 2)])
async def test_too_many_characters_are_never_read(prompt):
    tokenizer = Tokenizer()
    with pytest.raises(ContextTooLong, match=r"characters, at most 2048 can fit \(limits.max_chars_per_token\)"):
        await ids(tokenising(tokenizer), prompt)
    assert tokenizer.read == 0


async def test_a_short_text_is_counted_in_tokens():
    tokenizer = Tokenizer()
    tokenizer.longest_token = 1
    assert len(await ids(tokenising(tokenizer), "x" * SHORT)) == SHORT  # and refused by that number


async def test_what_the_tokenizer_says_of_its_longest_token_bounds_it_closer():
    tokenizer = Tokenizer()
    tokenizer.longest_token = 4
    with pytest.raises(ContextTooLong, match="at most 512 can fit"):
        await ids(tokenising(tokenizer), "x" * (SHORT + 1))
    assert await ids(tokenising(tokenizer), "x" * 100) == (ord("x"),) * 100


async def test_tool_calls_and_reasoning_count_as_text():
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": "x" * SHORT}}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    with pytest.raises(ContextTooLong):
        await ids(tokenising(Tokenizer()), Chat((message,)))


async def test_a_text_far_too_long_is_read_only_until_that_is_known():
    tokenizer = Tokenizer()
    context = PIECE
    with pytest.raises(ContextTooLong, match=f"prompt has more than {context} tokens"):
        await ids(tokenising(tokenizer, context), "x" * (PIECE * 16))
    assert tokenizer.read == 2 * PIECE


async def test_a_long_text_of_few_tokens_is_read():
    tokenizer = Tokenizer(chars=8)
    assert len(await ids(tokenising(tokenizer, PIECE), "x" * (PIECE * 4))) == PIECE // 2


@pytest.mark.parametrize("count", [CONTEXT, 100_000])
async def test_too_many_ids_are_refused_by_their_number(count):
    with pytest.raises(ContextTooLong, match=f"prompt has {count} tokens, the context of m holds {CONTEXT}"):
        await ids(tokenising(Tokenizer()), (1,) * count)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("<pad>", f"token id {VOCAB} of the text '<pad>' is outside the vocabulary"),
        (Chat(({"role": "user", "content": "<pad>"},)), f"token id {VOCAB} of the text '<pad>'"),
        ((1, VOCAB), f"token id {VOCAB} is outside the vocabulary"),
        ((-1,), "token id -1 is outside the vocabulary"),
        ((10**30,), "is outside the vocabulary"),
    ],
)
async def test_an_id_without_an_embedding_is_refused_whoever_made_it(prompt, says):
    with pytest.raises(InvalidRequest, match=says):
        await ids(tokenising(Tokenizer()), prompt)


async def test_the_prompt_as_an_answer_repeats_it():
    made = tokenising(Tokenizer())
    assert await made.text("Zürich", (1, 2), "me") == "Zürich"
    assert await made.text((), (*"Zürich".encode(), EOS), "me") == "Zürich"
