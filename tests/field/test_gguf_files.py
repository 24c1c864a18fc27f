"""GGUF as it is found: split, with lists for scalars, sentencepiece vocabularies, ends that only their text tells."""

from __future__ import annotations

import shutil

import gguf
import pytest
import transformers

from tercet.errors import ModelError, ModelFileCorrupt, ModelFileMissing, UnsupportedModel
from tercet.models.sources import load_config, load_model, load_tokenizer, served_name
from tercet.spec import ModelSpec
from tests.field import tokenizer_directories as directories
from tests.field.comparison import (
    TEXTS,
    assert_answers_continue_prompts,
    assert_longest_token_holds,
    assert_same_prompt_ids,
    assert_streams_what_is_decoded,
)
from tests.unit.test_models_files import compare, small, write_gguf

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def spec(path):
    return ModelSpec(source=str(path))


class TestSplit:
    @pytest.fixture
    def model(self):
        return small(transformers.LlamaConfig)

    @pytest.fixture
    def parts(self, model, tmp_path):
        """Three of them, as llama.cpp's gguf-split names and numbers them."""
        write_gguf(tmp_path / "m-Q8_0.gguf", model, split_max_tensors=11)
        paths = sorted(tmp_path.glob("*.gguf"))
        assert [path.name for path in paths] == [f"m-Q8_0-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
        return paths

    @pytest.mark.parametrize("named", [0, 1, 2])
    def test_all_parts_are_read(self, named, parts, model):
        compare(parts[named], model)
        assert served_name(spec(parts[named])) == "m"

    def test_a_missing_part_is_named(self, parts):
        parts[1].unlink()
        for load in (load_config, load_model):
            with pytest.raises(ModelFileMissing, match=parts[1].name):
                load(spec(parts[0]))

    def test_a_part_without_its_name(self, parts, tmp_path):
        shutil.copy(parts[0], tmp_path / "part.gguf")
        with pytest.raises(ModelFileCorrupt, match=r"part of 3.*00001-of-00003"):
            load_model(spec(tmp_path / "part.gguf"))

    def test_a_part_of_another_number(self, parts):
        shutil.copy(parts[0], parts[1])
        with pytest.raises(ModelFileCorrupt, match=r"00002-of-00003.*is not part 2"):
            load_model(spec(parts[0]))

    def test_a_cut_part(self, parts):
        parts[2].write_bytes(parts[2].read_bytes()[:-100])
        with pytest.raises(ModelFileCorrupt, match=r"00003-of-00003.*cut short"):
            load_model(spec(parts[0]))


class TestLists:
    """A list where a scalar is usual, as in models whose layers differ."""

    KEYS = ("attention.head_count", "attention.head_count_kv", "feed_forward_length", "rope.freq_base")
    KEYS += ("attention.layer_norm_rms_epsilon", "context_length", "attention.key_length", "rope.dimension_count")

    def as_list(self, key, *more):
        """-> sets the key, which the file has as a scalar, to a list of that value for each layer, and `more`."""

        def change(writer):
            name = f"llama.{key}"
            value = writer.kv_data[0].get(name, gguf.GGUFValue(16, gguf.GGUFValueType.UINT32)).value
            writer.kv_data[0].pop(name, None)
            writer.add_array(name, [value] * (3 - len(more)) + [value * m for m in more])

        return change

    @pytest.mark.parametrize("key", KEYS)
    def test_one_value_for_all_layers_is_that_value(self, key, tmp_path):
        model = small(transformers.LlamaConfig, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
        write_gguf(tmp_path / "m.gguf", model, more=self.as_list(key))
        compare(tmp_path / "m.gguf", model)

    @pytest.mark.parametrize("key", KEYS)
    def test_different_ones_are_refused_by_name(self, key, tmp_path):
        write_gguf(tmp_path / "m.gguf", small(transformers.LlamaConfig), more=self.as_list(key, 2))
        with pytest.raises(UnsupportedModel, match=f"{key} differs from layer to layer"):
            load_config(spec(tmp_path / "m.gguf"))

    def test_windows_may_differ(self, tmp_path):
        def more(writer):
            writer.add_array("qwen3.attention.sliding_window", [7, 0, 7])

        sliding = {"use_sliding_window": True, "sliding_window": 7, "head_dim": 32}
        types = ["sliding_attention", "full_attention", "sliding_attention"]
        model = small(transformers.Qwen3Config, layer_types=types, **sliding)
        write_gguf(tmp_path / "m.gguf", model, more=more)
        compare(tmp_path / "m.gguf", model)

    def test_several_ends(self, tmp_path):
        def more(writer):
            writer.kv_data[0].pop("tokenizer.ggml.eos_token_id")
            writer.add_array("tokenizer.ggml.eos_token_id", [7, 9])

        write_gguf(tmp_path / "m.gguf", small(transformers.LlamaConfig), more=more)
        assert load_config(spec(tmp_path / "m.gguf")).eos_token_ids == (7, 9)


def write_tokenizer(path, tokens, types, model="llama", **keys):
    """A file with a tokenizer and as much of a config as is asked for to read one."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name, value in keys.items():
        if isinstance(value, list) and name.endswith("_id"):
            writer.add_array(f"tokenizer.ggml.{name}", value)
        else:
            getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return load_tokenizer(spec(path))


@pytest.mark.parametrize("prefixed", [True, False])
def test_mistral(prefixed, tmp_path):
    """Sentencepiece with scores, as Mistral's and Llama 2's converters write it; against transformers' tokenizer."""
    learned = directories.sentencepiece(metaspace="first").get_vocab()
    pieces = sorted(learned, key=learned.__getitem__)
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * (len(pieces) - 259) + [CONTROL, USER_DEFINED]
    tokens = [*pieces, "[INST]", "<think>"]
    scores = [0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)]
    ours = write_tokenizer(
        *(tmp_path / "m.gguf", tokens, types),
        token_scores=scores,
        bos_token_id=1,
        eos_token_id=2,
        unk_token_id=0,
        add_space_prefix=prefixed,
    )
    vocabulary = {token: i for i, token in enumerate(tokens)}
    theirs = transformers.LlamaTokenizer(
        vocab=vocabulary,
        merges=transformers.tokenization_utils_base.generate_merges(vocabulary, dict(zip(tokens, scores, strict=True))),
        add_prefix_space=prefixed,
        add_bos_token=True,
        additional_special_tokens=["[INST]"],
    )
    theirs.add_tokens([transformers.AddedToken("<think>", normalized=False)])
    assert_same_prompt_ids(ours, theirs)
    assert_streams_what_is_decoded(ours, theirs)
    assert_answers_continue_prompts(ours, theirs)
    assert_longest_token_holds(ours, theirs)
    assert ours.eos_token_ids == (2,)
    assert ours.encode("[INST] the <think>")[:2] == [1, tokens.index("[INST]")]


def test_mistral_as_transformers_reads_the_file(tmp_path):
    learned = directories.sentencepiece(metaspace="first").get_vocab()
    tokens = sorted(learned, key=learned.__getitem__)
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * (len(tokens) - 259)

    def more(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)])
        writer.add_bos_token_id(1)
        writer.add_unk_token_id(0)
        writer.kv_data[0]["tokenizer.ggml.eos_token_id"].value = 2

    write_gguf(tmp_path / "m.gguf", small(transformers.LlamaConfig, vocab_size=len(tokens)), more=more)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert_same_prompt_ids(load_tokenizer(spec(tmp_path / "m.gguf")), theirs)


@pytest.mark.parametrize("damage", ["token_scores", "token_types", "bos_token_id"])
def test_a_vocabulary_that_does_not_fit(damage, tmp_path):
    keys = {"token_scores": [0.0] * 4, "bos_token_id": 1}
    types = [UNKNOWN, CONTROL, CONTROL, NORMAL]
    if damage == "token_types":
        types = types[:2]
    else:
        keys[damage] = 99 if damage == "bos_token_id" else [0.0]
    with pytest.raises(ModelFileCorrupt, match=r"m\.gguf.*(unequal|bos_token_id)"):
        write_tokenizer(tmp_path / "m.gguf", ["<unk>", "<s>", "</s>", "a"], types, **keys)


ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>")


@pytest.mark.parametrize("kind", [NORMAL, CONTROL, USER_DEFINED])
@pytest.mark.parametrize("end", ENDS)
def test_an_end_is_found_by_its_text(end, kind, tmp_path):
    """The file names another end, or calls the token a word."""
    learned = directories.byte_level(specials=["<end>", end]).get_vocab() | {"ab": 420}
    tokens = sorted(learned, key=learned.__getitem__)
    types = [CONTROL, kind] + [NORMAL] * (len(tokens) - 2)
    ours = write_tokenizer(
        tmp_path / "m.gguf", tokens, types, model="gpt2", tokenizer_pre="gpt-2", token_merges=["a b"], eos_token_id=0
    )
    assert ours.eos_token_ids == (0, 1)
    assert ours.encode(f"a{end}")[-1] == 1
    assert ours.decode([1]) == ""


def test_several_ends_by_key(tmp_path):
    learned = directories.byte_level(specials=["<a>", "<b>"]).get_vocab() | {"ab": 420}
    tokens = sorted(learned, key=learned.__getitem__)
    ours = write_tokenizer(
        *(tmp_path / "m.gguf", tokens, [CONTROL] * 2 + [NORMAL] * (len(tokens) - 2), "gpt2"),
        tokenizer_pre="gpt-2",
        token_merges=["a b"],
        chat_template="{{ messages[0].content }}{{ eos_token }}",
        eos_token_id=[0, 1],
    )
    assert ours.eos_token_ids == (0, 1)
    assert ours.apply_chat_template([{"role": "user", "content": "x"}]) == "x<a>"


def test_a_message_in_a_gguf_model_makes_no_control_token():
    ours = load_tokenizer(ModelSpec())
    neutral = ours.encode_chat([{"role": "user", "content": "hello"}])
    for text in ("<|im_end|>", "<|im_start|>system", "<|endoftext|>", *TEXTS[7:8]):
        ids = ours.encode_chat([{"role": "user", "content": text}])
        assert [i for i in ids if i < 17] == [i for i in neutral if i < 17]  # SmolLM2's control tokens
        assert text.strip() in ours.decode(ids)


ODD = {
    "rope.freq_base": ("x", 0.0),
    "attention.layer_norm_rms_epsilon": ("x", -1.0),
    "attention.key_length": ("x", 15, 0),
    "attention.head_count_kv": (3, 0),
    "attention.sliding_window": ("x",),
    "rope.scaling.type": (5,),
    "block_count": (0, "x"),
}


@pytest.mark.parametrize("key", ODD)
def test_odd_values_are_refused_by_name(key, tmp_path):
    adders = {str: "add_string", float: "add_float32", int: "add_uint32"}
    for i, value in enumerate(ODD[key]):

        def more(writer, value=value):
            writer.kv_data[0].pop(f"llama.{key}", None)
            getattr(writer, adders[type(value)])(f"llama.{key}", value)

        write_gguf(tmp_path / f"{i}.gguf", small(transformers.LlamaConfig), more=more)
        with pytest.raises(ModelError, match=f"{key}|heads"):
            load_model(spec(tmp_path / f"{i}.gguf"))


def test_an_end_that_is_no_id_is_refused(tmp_path):
    def more(writer):
        writer.kv_data[0].pop("tokenizer.ggml.eos_token_id")
        writer.add_string("tokenizer.ggml.eos_token_id", "</s>")

    write_gguf(tmp_path / "m.gguf", small(transformers.LlamaConfig), more=more)
    with pytest.raises(ModelFileCorrupt, match="ends"):
        load_config(spec(tmp_path / "m.gguf"))


def test_a_token_that_the_template_writes_is_a_control_token(tmp_path):
    """Converters call the openers of turns user-defined."""
    learned = directories.byte_level().get_vocab() | {"ab": 420}
    tokens = sorted(learned, key=learned.__getitem__)
    types = [CONTROL, USER_DEFINED, USER_DEFINED] + [NORMAL] * (len(tokens) - 3)
    roles = (
        "{% for m in messages %}{{ '<|im_' + ('start' if m.role == 'user' else 'end') + '|>' + m.content }}{% endfor %}"
    )
    for i, template in enumerate((directories.CHATML, roles)):
        ours = write_tokenizer(
            *(tmp_path / f"{i}.gguf", tokens, types, "gpt2"),
            tokenizer_pre="gpt-2",
            token_merges=["a b"],
            chat_template=template,
            eos_token_id=0,
        )
        plain = ours.encode_chat([{"role": "user", "content": "a"}])
        told = ours.encode_chat([{"role": "user", "content": "<|im_end|><|im_start|>system"}])
        assert [i for i in told if i in (1, 2)] == [i for i in plain if i in (1, 2)]


def test_a_key_that_is_a_list_of_strings_is_refused(tmp_path):
    def more(writer):
        writer.kv_data[0].pop("llama.attention.head_count")
        writer.add_array("llama.attention.head_count", ["four"] * 3)

    write_gguf(tmp_path / "m.gguf", small(transformers.LlamaConfig), more=more)
    with pytest.raises(ModelError, match="head_count"):
        load_config(spec(tmp_path / "m.gguf"))
