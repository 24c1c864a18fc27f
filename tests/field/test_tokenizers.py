"""What a model's files say of text, against transformers' own reading: prompt ids, ends, decoded and streamed text."""

from __future__ import annotations

import random

import pytest
import transformers

from tercet.models.sources import load_tokenizer
from tercet.spec import ModelSpec
from tests.field.tokenizer_directories import MAKERS

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
CHATS = (
    [{"role": "user", "content": "the cat sat"}],
    [{"role": "user", "content": " Hello,  world! "}, {"role": "assistant", "content": "It's 1.\n"}] * 2
    + [{"role": "user", "content": "naïve 日本 🙂"}],
)


@pytest.fixture(scope="module", params=MAKERS)
def directory(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    MAKERS[request.param](path)
    return path


@pytest.fixture(scope="module")
def ours(directory):
    return load_tokenizer(ModelSpec(source=str(directory)))


@pytest.fixture(scope="module")
def theirs(directory):
    return transformers.AutoTokenizer.from_pretrained(directory)


def expected(theirs, chat, prompt=True):
    return theirs.apply_chat_template(chat, add_generation_prompt=prompt)["input_ids"]


def test_prompt_ids(ours, theirs):
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"], text
        assert ours.encode(text, add_special=False) == theirs(text, add_special_tokens=False)["input_ids"], text


def test_chat_ids(ours, theirs):
    for chat in CHATS:
        for prompt in (True, False):
            assert ours.apply_chat_template(chat, prompt) == theirs.apply_chat_template(
                chat, add_generation_prompt=prompt, tokenize=False
            )
            assert ours.encode_chat(chat, prompt) == expected(theirs, chat, prompt), chat


def test_ends(directory, ours, theirs):
    """What generate() stops at: the ends of the configs; and the tokenizer's own."""
    try:
        config = transformers.GenerationConfig.from_pretrained(directory)
    except OSError:
        config = transformers.AutoConfig.from_pretrained(directory)
    said = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    assert set(ours.eos_token_ids) == {*said, theirs.eos_token_id} - {None}


def streamed(detokenizer, ids):
    return "".join([detokenizer.push(i) for i in ids]) + detokenizer.flush()


def any_ids(theirs, length):
    """Random ids, ids of texts, and a mixture: what a model may say."""
    rng = random.Random(length)
    said = theirs(" ".join(TEXTS[2:6]))["input_ids"]
    kinds = [range(len(theirs)), said, [*said, *range(len(theirs))]]
    return [[rng.choice(kind) for _ in range(length)] for kind in kinds]


def test_streamed_text_is_the_decoded_text(ours, theirs):
    for length in (1, 2, 3, 5, 8, 13, 40) * 20:
        for ids in any_ids(theirs, length):
            assert streamed(ours.detokenizer(), ids) == theirs.decode(ids, skip_special_tokens=True), ids
    for text in TEXTS:
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_an_answer_continues_its_prompt(ours, theirs):
    """No space is lost where the answer begins."""
    for text in ("the cat", " the", "Hello, world!", "naïve 🙂", "1"):
        prompt = ours.encode(text)
        said = theirs.decode(prompt, skip_special_tokens=True)
        for answer in [*any_ids(theirs, 9), ours.encode(" the mat", add_special=False)]:
            whole = theirs.decode(prompt + answer, skip_special_tokens=True)
            if whole.startswith(said):  # bytes may spoil the prompt's last character
                assert streamed(ours.detokenizer(prompt), answer) == whole[len(said) :], (text, answer)


class TestControlTokensInText:
    """A message's text never becomes a control token; every other text is tokenised as ever."""

    def control(self, ours, theirs):
        """All but the one for unknown characters, which ordinary text makes too."""
        added = {i: token.content for i, token in theirs.added_tokens_decoder.items() if token.special}
        unknown = getattr(theirs.backend_tokenizer.model, "unk_token", None) or theirs.unk_token
        return {i: text for i, text in added.items() if text != unknown} | {
            i: theirs.convert_ids_to_tokens(i) for i in ours.eos_token_ids
        }

    def test_none_comes_of_a_message(self, ours, theirs):
        control = self.control(ours, theirs)
        neutral = self.counted(ours.encode_chat([{"role": "user", "content": "the cat zz sat"}]), control)
        for text in [*control.values(), "".join(control.values()), "<".join(control.values())]:
            for content in (f"the cat {text} sat", text, f"{text}{text}", f"x{text[:-1]}{text}"):
                ids = ours.encode_chat([{"role": "user", "content": content}])
                assert self.counted(ids, control) == neutral, content
                if theirs.decode(theirs("<|[é]>", add_special_tokens=False)["input_ids"]) == "<|[é]>":
                    assert content.strip() in ours.decode(ids)

    def counted(self, ids, control):
        return [i for i in ids if i in control]

    def test_what_only_resembles_one_is_tokenised_as_ever(self, ours, theirs):
        """These take the long way round and come to the same ids."""
        for chat in CHATS:
            for end in ("<", "<|", "[", "<|im_", "</", " <s", "[SE", "< \n"):
                told = [m | {"content": m["content"] + end} for m in chat]
                assert ours.encode_chat(told) == expected(theirs, told)

    def test_the_switch(self, directory, theirs):
        parsing = load_tokenizer(ModelSpec(source=str(directory), control_tokens_in_text=True))
        for text in theirs.all_special_tokens:
            chat = [{"role": "user", "content": f"the {text} cat"}]
            assert parsing.encode_chat(chat) == expected(theirs, chat)
