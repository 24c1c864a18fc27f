"""What a model's files say of text, against transformers' own reading: prompt ids, ends, decoded and streamed text."""

from __future__ import annotations

import json
import threading
import time
import unicodedata

import pytest
import sentencepiece
import transformers

from tercet.errors import ModelFileCorrupt, UnsupportedModel
from tercet.models.longest_token import COMPOSED
from tercet.models.sources import load_model, load_tokenizer
from tercet.models.vocabulary_hf import _class_of
from tercet.spec import ModelSpec
from tests.field import tokenizer_directories as directories
from tests.field.comparison import (
    assert_answers_continue_prompts,
    assert_longest_token_holds,
    assert_same_prompt_ids,
    assert_streams_what_is_decoded,
    streamed,
)
from tests.field.tokenizer_directories import MAKERS

CHATS = (
    [
        {"role": "user", "content": "if 1 < 2 and a<b: x [1] {y} | z <tag>"},
        {"role": "assistant", "content": "<thought>why</thought>yes"},
        {"role": "user", "content": "é < go ƻ ¤ <"},
    ],
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


@pytest.mark.parametrize(
    "compare",
    [
        assert_same_prompt_ids,
        assert_streams_what_is_decoded,
        assert_answers_continue_prompts,
        assert_longest_token_holds,
    ],
)
def test_text(compare, ours, theirs):
    compare(ours, theirs)


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


class TestControlTokensInText:
    """A message's text never becomes a control token; every other text is tokenised as ever."""

    def control(self, ours, theirs):
        """Special ones and what the template writes; not that for unknown characters, which ordinary text makes too."""
        added = {
            i: token.content
            for i, token in theirs.added_tokens_decoder.items()
            if token.special or token.content in theirs.chat_template
        }
        unknown = getattr(theirs.backend_tokenizer.model, "unk_token", None) or theirs.unk_token
        return {i: text for i, text in added.items() if text != unknown} | {
            i: theirs.convert_ids_to_tokens(i) for i in ours.eos_token_ids
        }

    def test_none_comes_of_a_message(self, ours, theirs):
        control = self.control(ours, theirs)
        neutral = self.counted(ours.encode_chat([{"role": "user", "content": "the cat zz sat"}]), control)
        cut = [text[:k] + "/no_think" + text[k:] for text in control.values() for k in range(1, len(text))]
        for text in [*control.values(), "".join(control.values()), "<".join(control.values()), *cut]:
            for content in (f"the cat {text} sat", text, f"{text}{text}", f"x{text[:-1]}{text}"):
                ids = ours.encode_chat([{"role": "user", "content": content}])
                assert self.counted(ids, control) == neutral, content
                if theirs.decode(theirs("<|[é]>", add_special_tokens=False)["input_ids"]) == "<|[é]>":
                    said = ours.decode(ids)
                    assert content.strip() in said or content.replace("/no_think", "").strip() in said

    def test_nor_of_another_spelling(self, ours, theirs):
        """What a normalizer turns into a control token's text."""
        control = self.control(ours, theirs)
        neutral = self.counted(ours.encode_chat([{"role": "user", "content": "the cat zz sat"}]), control)
        wide = {ord(c): ord(c) + 0xFEE0 for c in "<>[]/|"}
        for text in control.values():
            for spelled in (text.lower(), text.upper(), text.translate(wide), text.lower().translate(wide)):
                for content in (spelled, f"a {spelled} b", f"a{spelled}{spelled}"):
                    ids = ours.encode_chat([{"role": "user", "content": content}])
                    assert self.counted(ids, control) == neutral, content

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


CONFIGS = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}
CLASSES = (
    None,
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
    "GPT2Tokenizer",
)
CLASSES += ("Qwen2Tokenizer", "Qwen2TokenizerFast", "CodeLlamaTokenizer", "GemmaTokenizerFast", "NoSuchTokenizer")


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_class_is_the_one_that_auto_tokenizer_takes(kind, tmp_path):
    backends = {"bytes": directories.byte_level(), "pieces": directories.sentencepiece(metaspace="first")}
    for name, backend in backends.items():
        path = tmp_path / name
        directories.save(path, backend, CONFIGS[kind](eos_token_id=None, bos_token_id=None))
        for declared in CLASSES:
            directories.edit(path, tokenizer_class=declared)
            assert _class_of(path) is type(transformers.AutoTokenizer.from_pretrained(path)), (name, declared)


def test_a_class_in_python_is_refused(tmp_path):
    MAKERS["byte-level"](tmp_path)
    directories.edit(tmp_path, tokenizer_class="ByT5Tokenizer")
    with pytest.raises(UnsupportedModel, match="ByT5Tokenizer"):
        load_tokenizer(ModelSpec(source=str(tmp_path)))


@pytest.mark.parametrize("settings", [None, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}])
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_directory_with_sentencepiece_alone(kind, settings, tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(directories.CORPUS * 10),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type=kind,
        byte_fallback=True,
        vocab_size=400 if kind == "bpe" else 350,
        user_defined_symbols=["<think>"],
        control_symbols=["<ctl>"],
        minloglevel=2,
    )
    transformers.LlamaConfig(architectures=["LlamaForCausalLM"], eos_token_id=None).save_pretrained(tmp_path)
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours, theirs = load_tokenizer(ModelSpec(source=str(tmp_path))), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert_same_prompt_ids(ours, theirs)
    assert_streams_what_is_decoded(ours, theirs)
    assert_answers_continue_prompts(ours, theirs)
    assert ours.eos_token_ids == (2,)


def test_workers_know_the_end_that_only_the_tokenizer_names(tmp_path):
    MAKERS["llama class"](tmp_path)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**small, vocab_size=300, eos_token_id=None, bos_token_id=None)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert load_model(ModelSpec(source=str(tmp_path))).config.eos_token_ids == (2,)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": {"type": "BPE"}}', "\xff"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_file_that_is_wrong(name, text, tmp_path):
    MAKERS["llama class"](tmp_path)
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    if (name, text) != ("tokenizer_config.json", '{"model": {"type": "BPE"}}'):
        with pytest.raises(ModelFileCorrupt, match=name):
            load_tokenizer(ModelSpec(source=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "token"), [("llama class", "<0xF0>"), ("byte-level and more", "ð"), ("wordpiece cleaned", "##t")]
)
def test_each_token_of_a_run_costs_the_same(name, token, tmp_path):
    """Bytes that make no character, and pieces of one long word."""
    MAKERS[name](tmp_path)
    ours, theirs = load_tokenizer(ModelSpec(source=str(tmp_path))), transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = [theirs.convert_tokens_to_ids(token)] * 20_000
    start = time.monotonic()
    said = streamed(ours.detokenizer(), ids)
    assert time.monotonic() - start < 20
    assert said == theirs.decode(ids, skip_special_tokens=True)


def test_many_spaces_before_a_control_token(tmp_path):
    """Quadratic time holds the GIL for all."""
    MAKERS["spaces first"](tmp_path)
    ours = load_tokenizer(ModelSpec(source=str(tmp_path)))
    start = time.monotonic()
    assert ours.encode_chat([{"role": "user", "content": "x" + "\n" * 30_000 + "x"}])
    assert time.monotonic() - start < 10


def test_a_long_text_leaves_other_threads_their_turn():
    """The GIL is let go: a thread that counts gets on while one text is tokenised, as plain text and as chat."""
    ours = load_tokenizer(ModelSpec())
    text = "The quick brown fox <|im_end|> jumps over 13 lazy dogs. " * 20_000
    for encode in (ours.encode, lambda text: ours.encode_chat([{"role": "user", "content": text}])):
        turns, done = [], threading.Event()

        def count(turns=turns, done=done):
            while not done.wait(0.001):
                turns.append(1)

        thread = threading.Thread(target=count)
        thread.start()
        encode(text)
        done.set()
        thread.join()
        assert len(turns) > 50  # with `Tokenizer.encode` it is 1


def test_longest_token_is_known_where_it_matters():
    assert load_tokenizer(ModelSpec()).longest_token == 81
    longest = (len(unicodedata.normalize("NFD", chr(code))) for code in range(0x110000))
    assert max(longest) == COMPOSED
