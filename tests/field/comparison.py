"""A tokenizer of ours against transformers' of the same files."""

from __future__ import annotations

import random
import unicodedata

TEXTS = (
    "",
    " ",
    "the cat",
    " the cat  sat ",
    "Hello, world! It's 12345.67 €, isn't it?\n\n\tYes;  two  spaces   1",
    "naïve café — Ελληνικά, кириллица, עברית, 한국어 🙂",
    "e\u0301 ﬁ ½ \u200b \ufeff İ ẞ",
    "<|im_start|>user\nhi<|im_end|> <s>x</s> [CLS] [SEP] <think>",
    "a <MASK> b<SEP> \n c <BOTH> d<WORD>e <WORD> <SEP><WORD> <both> <WORD>x 雪 <mask>",
    "def f(x):\r\n    return x ** 2  # <comment>\r\n",
)


def assert_same_prompt_ids(ours, theirs):
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"], text
        assert ours.encode(text, add_special=False) == theirs(text, add_special_tokens=False)["input_ids"], text


def streamed(detokenizer, ids):
    return "".join([detokenizer.push(i) for i in ids]) + detokenizer.flush()


def any_ids(theirs, length):
    """Random ids, ids of texts, and a mixture: what a model may say."""
    rng = random.Random(length)
    said = theirs(" ".join(TEXTS[2:6]))["input_ids"]
    kinds = [range(len(theirs)), said, [*said, *range(len(theirs))]]
    return [[rng.choice(kind) for _ in range(length)] for kind in kinds]


def assert_streams_what_is_decoded(ours, theirs):
    for length in (1, 2, 3, 5, 8, 13, 40) * 20:
        for ids in any_ids(theirs, length):
            assert streamed(ours.detokenizer(), ids) == theirs.decode(ids, skip_special_tokens=True), ids
    for text in TEXTS:
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def assert_answers_continue_prompts(ours, theirs):
    """No space is lost where the answer begins."""
    for text in ("the cat", " the", "Hello, world!", "naïve 🙂", "1"):
        prompt = ours.encode(text)
        said = theirs.decode(prompt, skip_special_tokens=True)
        for answer in [*any_ids(theirs, 9), ours.encode(" the mat", add_special=False)]:
            whole = theirs.decode(prompt + answer, skip_special_tokens=True)
            if whole.startswith(said):  # bytes may spoil the prompt's last character
                assert streamed(ours.detokenizer(prompt), answer) == whole[len(said) :], (text, answer)


def assert_longest_token_holds(ours, theirs):
    """No text makes fewer tokens than it says."""
    if ours.longest_token is not None:
        texts = [
            *TEXTS,
            *("\u1f82" * 50, unicodedata.normalize("NFD", "\u1f82") * 50, " " * 300, "\n" * 300, "🙂" * 50),
        ]
        for text in [*texts, *theirs.get_vocab()]:
            assert len(text) <= ours.longest_token * len(ours.encode(text, add_special=False)), text
