"""Each rule of `tokenizer.ggml.pre` on a small BPE, against transformers' own tokenizer of that family."""

from __future__ import annotations

import base64
import json

import gguf
import pytest
import tokenizers
import transformers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.integrations.mistral.tokenizer import MistralConverter

from tercet.errors import InvalidRequest, ModelFileCorrupt, UnsupportedModel
from tercet.models.bytelevel import token_bytes
from tercet.models.sources import load_tokenizer
from tercet.models.tokenizer_gguf import _pre_tokenizer
from tercet.spec import ModelSpec

TEXTS = (
    " ",
    "Hello, world!",
    "It's 12345.67 €, isn't it?\n\n\tYes;  two  spaces   1",
    "naïve café — Ελληνικά, кириллица, العربية, ไทย",
    "日本語のテキスト、한국어 문장",
    "IT'S 12345 it'll\r\n\r\n  x\u00e9 e\u0301 !!\n",
)

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def trained():
    """-> tokens by id, merges: as a file has them."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*TEXTS, "12 123 1234 12345  123\n\n12   " * 9, "IT'S  \n\n  'LL"] * 3, trainer)
    vocabulary = backend.get_vocab()
    merges = [tuple(merge) for merge in json.loads(backend.to_str())["model"]["merges"]]
    return sorted(vocabulary, key=vocabulary.__getitem__), merges


def load(path, trained, pre, **metadata):
    tokens, merges = trained
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(metadata.pop("model", "gpt2"))
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(metadata.pop("merges", [" ".join(m) for m in merges]))
    writer.add_bos_token_id(0)
    for name, value in metadata.items():
        getattr(writer, name)(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return load_tokenizer(ModelSpec(source=str(path)))


def references(trained):
    tokens, merges = trained
    vocabulary = {token: i for i, token in enumerate(tokens)}
    gpt2 = transformers.GPT2Tokenizer(vocab=vocabulary, merges=merges)
    qwen2 = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=merges)
    llama3 = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(LLAMA3), "isolated")
    bytelevel = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    llama3.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, bytelevel])
    return {
        "gpt-2": gpt2.backend_tokenizer,
        None: gpt2.backend_tokenizer,
        "qwen2": qwen2.backend_tokenizer,
        "llama-bpe": llama3,
    }


@pytest.mark.parametrize("pre", ["gpt-2", None, "qwen2", "llama-bpe"])
def test_cut(pre, trained, tmp_path):
    ours, reference = load(tmp_path / "m.gguf", trained, pre), references(trained)[pre]
    for text in TEXTS:
        assert ours.encode(text, add_special=False) == reference.encode(text, add_special_tokens=False).ids, text


def test_bos(trained, tmp_path):
    def first(name, pre, **metadata):
        return load(tmp_path / name, trained, pre, **metadata).encode("")

    assert first("a.gguf", "gpt-2") == []
    assert first("b.gguf", "gpt-2", add_add_bos_token=True) == [0]
    assert first("c.gguf", "llama-bpe") == [0]
    assert first("d.gguf", "llama-bpe", add_add_bos_token=False) == []


def test_tekken(trained, tmp_path):
    """Against transformers' reading of Mistral's own tekken.json, the same vocabulary in it."""
    tokens, merges = trained
    ranks = [{"token_bytes": base64.b64encode(token_bytes(t)).decode(), "rank": i} for i, t in enumerate(tokens[1:])]
    settings = {"pattern": GGUF_PRE_TOKENIZER_SPLITS["tekken"], "default_num_special_tokens": 1, "version": "v3"}
    special = [{"rank": 0, "token_str": "<|endoftext|>", "is_control": True}]
    content = {"config": settings, "vocab": ranks, "special_tokens": special}
    (tmp_path / "tekken.json").write_text(json.dumps(content))
    theirs = MistralConverter(str(tmp_path / "tekken.json")).converted()
    ours = load(tmp_path / "m.gguf", (tokens, merges), "tekken")
    for text in (*TEXTS, "HelloWorld aBC 1234 //\n/ x"):
        assert ours.encode(text, add_special=False) == theirs.encode(text, add_special_tokens=False).ids, text


def test_cuts_are_those_of_transformers():
    """Its table of the same names, as far as we read them."""
    for name in ("llama-bpe", "llama3", "llama-v3", "qwen2", "tekken"):
        split = json.loads(_pre_tokenizer(name).__getstate__())["pretokenizers"][0]
        assert split["pattern"] == {"Regex": GGUF_PRE_TOKENIZER_SPLITS[name]}, name


@pytest.mark.parametrize(("pre", "options"), [("deepseek-llm", {}), ("gpt-2", {"model": "bert"})])
def test_unknown_is_refused_by_name(pre, options, trained, tmp_path):
    with pytest.raises(UnsupportedModel, match=options.get("model", pre)):
        load(tmp_path / "m.gguf", trained, pre, **options)


def test_merges_of_other_tokens(trained, tmp_path):
    with pytest.raises(ModelFileCorrupt, match="merges"):
        load(tmp_path / "m.gguf", trained, "gpt-2", merges=["nobody knows"])


def test_no_template(trained, tmp_path):
    with pytest.raises(InvalidRequest, match="no chat template"):
        load(tmp_path / "m.gguf", trained, "gpt-2").apply_chat_template([])
