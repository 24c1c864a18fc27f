"""The tokenizer against transformers and against full decodes, in many scripts; chat templates and their faults."""

from __future__ import annotations

import subprocess
import sys

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.errors import InvalidRequest, ModelFileCorrupt, ModelFileMissing, UnsupportedModel
from tercet.models.chat import MAX_CHARS, ChatTemplate
from tercet.models.sources import load_tokenizer, locate
from tercet.spec import ModelSpec

SPEC = ModelSpec()
TEXTS = (
    "",
    " ",
    "Hello, world!",
    "It's 12345.67 €, isn't it?\n\n\tYes;  two  spaces   1",
    "naïve café — Ελληνικά, кириллица, עברית, العربية, हिन्दी, ไทย",
    "日本語のテキスト、한국어 문장, 中文字符。",
    "👩‍👩‍👧‍👦 🇨🇭 e\u0301 \u200b \ufeff \x00 \x7f",
    "def f(x):\r\n    return x ** 2  # <comment>\r\n",
    "<|im_start|>user\nhi<|im_end|>",
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(SPEC)


@pytest.fixture(scope="module")
def reference():
    """transformers reads the same file, but cuts text as GPT-2 does; SmolLM2 cuts out every digit before that."""
    path = locate(SPEC)
    found = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    found.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [digits, found.backend_tokenizer.pre_tokenizer]
    )
    return found


@pytest.mark.parametrize("text", TEXTS)
def test_encode_and_decode_as_transformers(text, tokenizer, reference):
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    if "<|" not in text:
        assert tokenizer.decode(ids) == text


@given(text=st.text(max_size=80))
@settings(deadline=None)
def test_incremental_is_full_decode(text, tokenizer):
    ids = tokenizer.encode(text)
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.push(i) for i in ids]
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids)


@given(ids=st.lists(st.integers(0, 49151), max_size=40))
@settings(deadline=None)
def test_any_ids_decode_as_transformers(ids, tokenizer, reference):
    """A model may say anything, bytes that are no UTF-8 included."""
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_no_piece_holds_half_a_character(tokenizer):
    ids = tokenizer.encode("🦙")
    detokenizer = tokenizer.detokenizer()
    assert len(ids) > 1
    assert [detokenizer.push(i) for i in ids] == [""] * (len(ids) - 1) + ["🦙"]
    cut = tokenizer.detokenizer()
    assert [cut.push(ids[0]), cut.flush(), cut.flush()] == ["", "\ufffd", ""]


def test_special_tokens(tokenizer):
    assert tokenizer.eos_token_ids == (2, 0)  # <|im_end|> by key, <|endoftext|> by its text
    assert tokenizer.vocab_size == 49152
    assert tokenizer.token_text(2) == "<|im_end|>"
    assert tokenizer.decode([1, 2]) == ""
    assert tokenizer.token_text(10**9) == ""


MESSAGES = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<b>&amp;</b>\n"}],
    [{"role": r, "content": c} for r, c in (("user", "1"), ("assistant", "2"), ("user", "3 é 🦙"))],
]


@pytest.mark.parametrize("messages", MESSAGES)
@pytest.mark.parametrize("prompt", [True, False])
def test_chat_template_as_transformers(messages, prompt, tokenizer, reference):
    expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert tokenizer.apply_chat_template(messages, prompt) == expected


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[3].role.upper() }}", "refused"),
        ("{{ 1 + messages }}", "refused"),
        ("{{ messages.__class__.__mro__ }}", "refused"),
        ("{% for i in range(90000) %}{{ 'x' * 9000 }}{% endfor %}", str(MAX_CHARS)),
    ],
)
def test_template_faults_are_the_requests(text, told):
    with pytest.raises(InvalidRequest, match=told):
        ChatTemplate(text, {}).render([{"role": "user", "content": "hi"}])


def test_template_that_is_none():
    with pytest.raises(UnsupportedModel, match="line 2"):
        ChatTemplate("\n{% for %}", {})


def test_no_torch():
    """The gateway's process must not pay for it."""
    code = (
        "import sys; from tercet.spec import ModelSpec; from tercet.models import sources as s;"
        "s.load_config(ModelSpec()); s.load_tokenizer(ModelSpec()); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("strips", [True, False])
def test_sentencepiece_style(strips, tmp_path):
    """Llama 2's form in a directory: spaces as U+2581, characters that lack as bytes, a space put before the text."""
    tokens = ["<unk>", "<s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a", "é"]
    model = tokenizers.models.BPE(
        vocab={t: i for i, t in enumerate(tokens)}, merges=[("▁", "a")], byte_fallback=True, unk_token="<unk>"
    )
    backend = tokenizers.Tokenizer(model)
    prepend = [tokenizers.normalizers.Prepend("▁")] if strips else []
    backend.normalizer = tokenizers.normalizers.Sequence([*prepend, tokenizers.normalizers.Replace(" ", "▁")])
    d = tokenizers.decoders
    strip = [d.Strip(" ", 1, 0)] if strips else []
    backend.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), *strip])
    backend.add_special_tokens(["<s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    transformers.LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    ours = load_tokenizer(ModelSpec(source=str(tmp_path)))
    for text in ("a b", " a", "  aé 日本 🦙", ""):
        assert ours.decode(ours.encode(text)) == backend.decode(ours.encode(text)) == text
    assert ours.token_text(tokens.index("▁a")) == " a"


class TestDirectory:
    """tokenizer.json, tokenizer_config.json and the template's three places."""

    @pytest.fixture
    def directory(self, reference, tmp_path):
        reference.save_pretrained(tmp_path)
        transformers.LlamaConfig(eos_token_id=2, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
        return tmp_path

    def test_same_as_gguf(self, directory, tokenizer):
        ours = load_tokenizer(ModelSpec(source=str(directory)))
        for text in TEXTS:
            assert ours.encode(text) == tokenizer.encode(text)
        assert ours.apply_chat_template(MESSAGES[1]) == tokenizer.apply_chat_template(MESSAGES[1])
        assert ours.eos_token_ids == (2,)

    def test_faults(self, directory):
        (directory / "tokenizer.json").write_text("{")
        with pytest.raises(ModelFileCorrupt, match=r"tokenizer\.json"):
            load_tokenizer(ModelSpec(source=str(directory)))
        (directory / "tokenizer.json").unlink()
        with pytest.raises(ModelFileMissing, match=r"tokenizer\.json"):
            load_tokenizer(ModelSpec(source=str(directory)))
