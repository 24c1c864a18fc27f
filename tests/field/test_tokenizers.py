"""What a model's files say of text, against transformers' own reading: prompt ids, ends, decoded and streamed text."""

from __future__ import annotations

import json
import random
import threading
import unicodedata

import pytest
import sentencepiece
import transformers

from tercet.errors import ModelFileCorrupt, UnsupportedModel
from tercet.models.longest_token import COMPOSED
from tercet.models.sources import load_model, load_tokenizer
from tercet.models.tokenizer_hf import _class_of
from tercet.spec import ModelSpec
from tests.field import tokenizer_directories as directories
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
    test_prompt_ids(ours, theirs)
    test_streamed_text_is_the_decoded_text(ours, theirs)
    test_an_answer_continues_its_prompt(ours, theirs)
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


def test_longest_token(ours, theirs):
    """No text makes fewer tokens than it says."""
    if ours.longest_token is not None:
        texts = [
            *TEXTS,
            *("\u1f82" * 50, unicodedata.normalize("NFD", "\u1f82") * 50, " " * 300, "\n" * 300, "🙂" * 50),
        ]
        for text in [*texts, *theirs.get_vocab()]:
            assert len(text) <= ours.longest_token * len(ours.encode(text, add_special=False)), text


def test_longest_token_is_known_where_it_matters():
    assert load_tokenizer(ModelSpec()).longest_token == 81
    longest = (len(unicodedata.normalize("NFD", chr(code))) for code in range(0x110000))
    assert max(longest) == COMPOSED
