"""A dozen small tokenizers as model directories, each of another kind. `MAKERS`: name -> makes the directory."""

from __future__ import annotations

import base64
import json

import tokenizers
import transformers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tercet.models.bytelevel import token_bytes

CORPUS = [
    "Hello, world! It's 12345.67 €, isn't it?\n\n\tYes;  two  spaces   1",
    "the cat sat on the mat and the dog did not sit on the cat, don't you see?",
    "naïve café — Ελληνικά, кириллица, 日本語のテキスト 🙂",
    "user system assistant im start end of text def f(x): return x ** 2",
    "Wie geht es dir? Mir geht es gut. 1 12 123 1234",
] * 4
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CUTTING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% set c = m.content.replace('/no_think', '') %}"
    "{% if m.role == 'assistant' and '</thought>' in c %}{% set c = c.split('</thought>')[-1].lstrip() %}{% endif %}"
    "{{ c | trim }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<thought>{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA3_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def trained(backend, trainer):
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def byte_level(specials=SPECIALS, pre=None, normalizer=None, size=420):
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if normalizer:
        backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    return trained(backend, trainer)


def sentencepiece(specials=("<unk>", "<s>", "</s>"), metaspace=None, strip=True, legacy=False):
    """BPE with byte fallback. legacy: the space before the text is a normalizer's."""
    learned = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    learned.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=260, special_tokens=[*specials, *BYTES], show_progress=False)
    trained(learned, trainer)
    model = json.loads(learned.to_str())["model"]
    merges = [tuple(m) for m in model["merges"]]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=model["vocab"], merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", metaspace, split=False)
    strips = [decoders.Strip(" ", 1, 0)] if strip else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strips])
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    return backend


def with_bos(backend, token="<s>"):
    backend.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=None, special_tokens=[(token, backend.token_to_id(token))]
    )
    return backend


def unigram(normalizer=None):
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always")
    backend.decoder = decoders.Metaspace("▁", "always")
    if normalizer:
        backend.normalizer = normalizer
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    return trained(backend, trainer)


def wordpiece():
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=True)
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    return trained(backend, trainers.WordPieceTrainer(vocab_size=220, special_tokens=specials, show_progress=False))


def wordlevel():
    """No decoder: tokens are joined by spaces."""
    backend = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    specials = ["<unk>", "<s>", "</s>"]
    return trained(backend, trainers.WordLevelTrainer(vocab_size=90, special_tokens=specials, show_progress=False))


def end_of_word():
    """As GPT-1 and CLIP: a word's last piece ends in </w>."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.BPEDecoder("</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], end_of_word_suffix="</w>", show_progress=False
    )
    return trained(backend, trainer)


def added():
    """Added tokens of every kind, over a normalizer that changes the case."""
    backend = byte_level(normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]))
    backend.add_special_tokens(
        [
            AddedToken("<MASK>", lstrip=True, normalized=False),
            AddedToken("<SEP>", rstrip=True, normalized=False),
            AddedToken("<BOTH>", lstrip=True, rstrip=True, normalized=True),
            AddedToken("<WORD>", single_word=True, normalized=False),
            AddedToken("<SEP><WORD>", normalized=False),
            AddedToken("雪", normalized=False),
        ]
    )
    backend.add_tokens(
        ["<think>", "é", AddedToken("</think>", normalized=False), AddedToken("<WORD>x", normalized=False)]
    )
    return backend


def save(directory, backend, config=None, template=CHATML, **options):
    """transformers' own directory, with a config of the Llama family."""
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **options)
    made.chat_template = template
    made.save_pretrained(directory)
    config = config or transformers.LlamaConfig(eos_token_id=None, bos_token_id=None)
    config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
    config.save_pretrained(directory)


def edit(directory, **changes):
    """Change tokenizer_config.json; None takes a key away."""
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))


CHATML_TOKENS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
S_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def truncating(directory):
    backend = byte_level()
    backend.enable_truncation(7)
    backend.enable_padding(length=9, pad_token="<|endoftext|>", pad_id=0)
    save(directory, backend, **CHATML_TOKENS)


def llama3(directory):
    cut = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_CUT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend = byte_level(pre=cut)
    backend.model.ignore_merges = True
    save(directory, with_bos(backend, "<|endoftext|>"), eos_token="<|im_end|>", bos_token="<|endoftext|>")
    edit(directory, tokenizer_class="LlamaTokenizer")  # as many hub repositories say


def qwen(directory):
    save(
        directory,
        byte_level(normalizer=normalizers.NFC()),
        transformers.Qwen2Config(eos_token_id=2),
        eos_token="<|endoftext|>",
    )
    edit(directory, tokenizer_class="Qwen2Tokenizer")


def gpt2(directory):
    save(directory, byte_level(), **CHATML_TOKENS)
    edit(directory, tokenizer_class="GPT2Tokenizer")


def llama_class(directory):
    save(directory, with_bos(sentencepiece(metaspace="first")), template=INST, **S_TOKENS)
    edit(directory, tokenizer_class="LlamaTokenizerFast", legacy=False, add_prefix_space=True)


def special_tokens_map(directory):
    """bos and eos stand in special_tokens_map.json alone, as old versions wrote it."""
    save(directory, with_bos(sentencepiece(legacy=True)), template=INST, **S_TOKENS)
    edit(directory, bos_token=None, eos_token=None, unk_token=None, added_tokens_decoder=None)
    content = {name: {"content": text, "lstrip": False, "rstrip": False} for name, text in S_TOKENS.items()}
    (directory / "special_tokens_map.json").write_text(json.dumps(content))


def flags(directory):
    """No post-processor, but flags."""
    backend = sentencepiece(metaspace="always")
    save(directory, backend, template=INST, **S_TOKENS)
    edit(directory, add_bos_token=True, add_eos_token=True, tokenizer_class="LlamaTokenizer")


def unflagged_end(directory):
    """The end of a turn is an added token that nobody called special."""
    backend = byte_level(specials=["<|endoftext|>"])
    backend.add_tokens(["<|im_start|>", "<|im_end|>"])
    save(directory, backend, eos_token="<|endoftext|>")
    (directory / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [0, backend.token_to_id("<|im_end|>")]})
    )


def turns_unflagged(directory):
    """The template cuts away thoughts, and takes words out; nobody called its tokens special."""
    backend = byte_level(specials=["<|endoftext|>"])
    backend.add_tokens(
        [AddedToken(t, normalized=False) for t in ("<|im_start|>", "<|im_end|>", "<thought>", "</thought>")]
    )
    save(directory, backend, template=CUTTING, eos_token="<|endoftext|>")


def normalized_specials(normalizer):
    """Control tokens are looked for in the text as it is normalised."""

    def make(directory):
        backend = byte_level(specials=["<|endoftext|>"], normalizer=normalizer)
        tokens = ("<|im_start|>", "<|im_end|>", "</thought>")
        backend.add_special_tokens([AddedToken(t, special=True, normalized=True) for t in tokens])
        save(directory, backend, template=CUTTING, eos_token="<|im_end|>", bos_token="<|im_start|>")

    return make


def spaces_first(directory):
    backend = byte_level()
    tokens = (" <sep>", "<sep>", "\t<x>", "\n\nUser:")
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in tokens])
    save(directory, backend, **CHATML_TOKENS)


def hole(directory):
    """The vocabulary leaves out some ids, so that its last ones are beyond its size."""
    state = json.loads(byte_level().to_str())
    state["model"]["vocab"] |= {"Ġthe": 420, "Ġcat": 421, "Ġon": 422}
    save(directory, tokenizers.Tokenizer.from_str(json.dumps(state)), **CHATML_TOKENS)


def clean_words(directory):
    save(directory, wordpiece(), eos_token="[SEP]", cls_token="[CLS]", template="{{ messages[0].content }}[SEP]")
    edit(directory, clean_up_tokenization_spaces=True)


def split_special(directory):
    """Control tokens are parsed nowhere."""
    save(directory, byte_level(), **CHATML_TOKENS)
    edit(directory, split_special_tokens=True)


def vocabulary_and_merges(directory):
    backend = byte_level(normalizer=normalizers.NFC())
    save(directory, backend, transformers.Qwen2Config(eos_token_id=2), eos_token="<|im_end|>")
    (directory / "tokenizer.json").unlink()
    backend.model.save(str(directory))


def tekken(directory):
    """Mistral's own file, without one of transformers'."""
    backend = byte_level(specials=["<s>", "</s>", "[INST]", "[/INST]"])
    learned = backend.get_vocab()
    ordinary = sorted(learned, key=learned.__getitem__)[4:]
    ranks = [{"token_bytes": base64.b64encode(token_bytes(t)).decode(), "rank": i} for i, t in enumerate(ordinary)]
    special = [{"rank": i, "token_str": backend.id_to_token(i), "is_control": True} for i in range(4)]
    settings = {"pattern": LLAMA3_CUT, "default_num_special_tokens": 4, "version": "v3"}
    content = {"config": settings, "vocab": ranks, "special_tokens": special}
    (directory / "tekken.json").write_text(json.dumps(content))
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}")
    transformers.MistralConfig(architectures=["MistralForCausalLM"], eos_token_id=1).save_pretrained(directory)


def byte_level_and_more(directory):
    """A decoder of several steps, whose tokens hold pieces of characters."""
    backend = byte_level()
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("#", "♯")])
    save(directory, backend, **CHATML_TOKENS)


def simple(backend, template=CHATML, **options):
    return lambda directory: save(directory, backend(), template=template, **options)


MAKERS = {
    "byte-level": simple(byte_level, **CHATML_TOKENS),
    "truncation and padding saved": truncating,
    "llama 3": llama3,
    "qwen": qwen,
    "gpt2 class": gpt2,
    "legacy sentencepiece": simple(lambda: with_bos(sentencepiece(legacy=True)), INST, **S_TOKENS),
    "metaspace always": simple(lambda: with_bos(sentencepiece(metaspace="always")), INST, **S_TOKENS),
    "metaspace first": simple(lambda: with_bos(sentencepiece(metaspace="first")), INST, **S_TOKENS),
    "metaspace never": simple(lambda: sentencepiece(metaspace="never", strip=False), INST, **S_TOKENS),
    "llama class": llama_class,
    "unigram": simple(unigram, INST, **S_TOKENS),
    "unigram nfkc": simple(lambda: with_bos(unigram(normalizers.NFKC())), INST, **S_TOKENS),
    "wordpiece": simple(wordpiece, "[CLS]{{ messages[0].content }}[SEP]", eos_token="[SEP]", cls_token="[CLS]"),
    "wordpiece cleaned": clean_words,
    "wordlevel": simple(wordlevel, "<s> {{ messages[0].content }} </s>", **S_TOKENS),
    "end of word": simple(end_of_word, INST, **S_TOKENS),
    "added tokens": simple(added, **CHATML_TOKENS),
    "special_tokens_map": special_tokens_map,
    "flags": flags,
    "unflagged end": unflagged_end,
    "turns unflagged": turns_unflagged,
    "normalized nfc": normalized_specials(normalizers.NFC()),
    "normalized lower": normalized_specials(normalizers.Sequence([normalizers.NFKD(), normalizers.Lowercase()])),
    "normalized replace": normalized_specials(
        normalizers.Sequence([normalizers.Replace("«", "<"), normalizers.Replace("``", "<|im_end|>")])
    ),
    "spaces first": spaces_first,
    "hole": hole,
    "split special tokens": split_special,
    "vocabulary and merges": vocabulary_and_merges,
    "tekken": tekken,
    "byte-level and more": byte_level_and_more,
}
