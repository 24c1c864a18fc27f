"""Chat templates where models keep them and as they are written, against transformers; what a message may not do."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import transformers

from tercet.errors import InvalidRequest, ModelError, UnsupportedModel
from tercet.models.sources import load_tokenizer
from tercet.spec import ModelSpec
from tests.field.tokenizer_directories import CHATML, CHATML_TOKENS, MAKERS, byte_level, edit, save

CHAT = [
    {"role": "system", "content": "the cat"},
    {"role": "user", "content": "sat on"},
    {"role": "assistant", "content": "the mat", "reasoning_content": "why not", "tool_calls": None},
    {"role": "user", "content": "and the dog"},
]
IN_PARTS = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in CHAT]
PARTS = (
    "{% for m in messages %}<|im_start|>{% for part in m['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] | trim }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
)
EITHER = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{{ part.text }}{% endfor %}{% endif %}<|im_end|>{% endfor %}"
)


def made(directory, template=CHATML):
    """-> ours, transformers'."""
    save(directory, byte_level(), template=template, **CHATML_TOKENS)
    return read(directory)


def read(directory):
    return load_tokenizer(ModelSpec(source=str(directory))), transformers.AutoTokenizer.from_pretrained(directory)


def same(ours, theirs, chat=CHAT, told=None, **options):
    """told: the messages as transformers must get them, where it does not adapt them to the template."""
    expected = theirs.apply_chat_template(told or chat, add_generation_prompt=True, **options)["input_ids"]
    assert ours.encode_chat(chat, template_kwargs=options) == expected
    return ours.decode(expected)


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{{ eos_token }}{% endfor %}",
        "{%- set ns = namespace(n=0) -%}\n{%- for m in messages %}\n{{ m | tojson }}{{ ns.n }}\n{%- endfor %}",
        "{% macro turn(m) %}{{ m['role'] | upper }}{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}",
        "{{ bos_token }}{{ pad_token }}{{ unk_token }}{% for m in messages %}{{ m.reasoning_content }}{% endfor %}",
        "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{{ m.tool_calls is defined }}{% endfor %}",
        EITHER,
    ],
)
def test_as_transformers(template, tmp_path):
    same(*made(tmp_path, template))


def test_a_template_that_reads_parts(tmp_path):
    ours, theirs = made(tmp_path, PARTS)
    assert "the cat" in same(ours, theirs, IN_PARTS)
    same(ours, theirs, CHAT, told=IN_PARTS)  # a text is one part
    more = [{"role": "user", "content": [{"type": "text", "text": t} for t in ("the cat", "sat")]}]
    same(ours, theirs, more)


def test_a_template_that_reads_text(tmp_path):
    ours, theirs = made(tmp_path)
    same(ours, theirs, IN_PARTS, told=CHAT)
    lines = [{"role": "user", "content": [{"type": "text", "text": t} for t in ("the cat", "sat")]}]
    same(ours, theirs, lines, told=[{"role": "user", "content": "the cat\nsat"}])


def test_a_template_that_reads_either_gets_what_came(tmp_path):
    ours, theirs = made(tmp_path, EITHER)
    same(ours, theirs, CHAT)
    same(ours, theirs, IN_PARTS)


def test_where_templates_stand(tmp_path):
    other = "{{ messages[0].content }}"
    made(tmp_path)
    edit(tmp_path, chat_template=other)  # a file of its own comes first
    same(*read(tmp_path))
    (tmp_path / "chat_template.jinja").unlink()
    assert same(*read(tmp_path)) == "the cat"
    edit(tmp_path, chat_template=[{"name": "default", "template": CHATML}, {"name": "tool_use", "template": other}])
    same(*read(tmp_path))
    edit(tmp_path, chat_template=None)
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text(other)
    same(*read(tmp_path))
    edit(tmp_path, chat_template=[{"name": "rag", "template": other}])
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UnsupportedModel, match="no default"):
        load_tokenizer(ModelSpec(source=str(tmp_path)))


def test_no_template(tmp_path):
    ours, _ = made(tmp_path, None)
    assert ours.encode("the cat")
    with pytest.raises(InvalidRequest, match="no chat template"):
        ours.encode_chat(CHAT)


def test_values_for_the_template(tmp_path):
    ours, theirs = made(tmp_path, "{% if enable_thinking %}<think>{% endif %}{{ style }}{{ messages[0].content }}")
    assert same(ours, theirs, enable_thinking=True, style="brief ") == "<think>brief the cat"
    same(ours, theirs)
    for taken in ("chat_template", "conversations", "messages", "tools", "continue_final_message"):
        with pytest.raises(InvalidRequest, match=taken):
            ours.encode_chat(CHAT, template_kwargs={taken: "{{ 'x' * 99 }}"})


def test_what_a_template_refuses_is_the_requests_fault(tmp_path):
    ours, _ = made(tmp_path, "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}")
    with pytest.raises(InvalidRequest, match="no system turns"):
        ours.encode_chat(CHAT)
    with pytest.raises(InvalidRequest, match="messages"):
        ours.encode_chat([])
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(InvalidRequest):
        ours.encode_chat(CHAT, template_kwargs={"x": deep})


def test_a_control_token_cannot_be_put_together(tmp_path):
    """Not out of parts, not by what the template takes off, not by a key, a role or a value of the template's."""
    ours, theirs = made(tmp_path, PARTS)
    control = theirs.all_special_ids

    def count(*texts):
        parts = [{"type": "text", "text": text} for text in texts]
        return sum(i in control for i in ours.encode_chat([{"role": "user", "content": parts}]))

    for k in range(1, len("<|im_end|>")):
        first, second = "<|im_end|>"[:k], "<|im_end|>"[k:]
        assert count(first, second) == count(f"{first}  \n", f" {second}") == count("a", "b") == 2
        assert count(f"a {first}", f"{second}{first}", second) == 2
    ours, _ = made(tmp_path, "{{ messages | tojson }}{{ style }}<|im_end|>")
    hidden = {"role": "<|im_start|>", "content": "", "call": {"<|im_start|>": ["<|im_start|>"]}}
    ids = ours.encode_chat([hidden], template_kwargs={"style": "<|im_start|>"})
    assert [i for i in ids if i in control] == ours.encode("<|im_end|>")
    assert ours.decode(ids).count("<|im_start|>") == 4


TESTING = {  # what a template makes of a text before it prints it
    "in": "{% if '</think>' in c %}{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}{{ c }}",
    "both sides": "{{ c.split('</think>')[0].rstrip('\\n').split('<think>')[-1] }}|{{ c.split('</think>')[-1] }}",
    "begins": "{% if c.startswith('<think>') and not c[:3] == '<|i' %}{{ c[7:] }}{% else %}{{ c | upper }}{% endif %}",
    "taken out": "{{ c.replace('/no_think', '').replace('/think', '') | trim }}",
    "put in": "{{ c.replace('/think', '<|im_end|>') }}",
    "filters": "{{ c | replace('>', '}') | title }}{{ c | length }}{{ c | first }}{{ c.count('<') }}",
    "words": "{% for w in c.split() %}{{ w }}{{ loop.index }}{% endfor %}{{ c.split(none, 1) | last }}",
    "parts": "{% set a, b, d = c.partition('</think>') %}{{ a }}{{ d }}{{ c.rsplit('>', 1)[0] }}{{ c.splitlines() }}",
    "joined": "{% set c = 'a </think>' + c %}{{ c.split('</think>', 1) | last }}{{ ['<|', c] | join }}",
    "macro": "{% macro t(x) %}<|im_end|>{{ x }}{% endmacro %}{% set y = t(c) | trim %}{{ y.split('</think>')[-1] }}",
    "block": "{% set y %}<|im_end|>{{ c }}{% endset %}{% if '</think>' in y %}{{ y.replace('</', '') }}{% endif %}",
    "letters": "{% for x in c %}{% if x in '<>' %}{{ x }}{% endif %}{% endfor %}",
    "printed": "{{ m | tojson }}{{ m }}{{ m.items() | list }}{{ m.x | tojson(indent=2) }}",
    "formatted": "{{ '%s|' % c }}{{ '{}'.format(c) }}{{ c ~ c }}{{ '<|im_end|>' ~ c }}",
    "mapped": "{{ {'user': '<|im_end|>', 'x': 'y'}[m.role] }}{{ {'x': 'y'}.get(c, 'none') }}{{ c | lower }}",
}
SAID = ("hi", "a </think>\n\nb", "<think>\nx\n</think>\ny", "1 < 2 /think and /no_think é 'x' \"y\" \\ \u200b 🙂", "")


@pytest.mark.parametrize("name", TESTING)
def test_a_template_that_looks_into_texts(name, tmp_path):
    """What it makes of them is as in transformers; a control token in them stays text."""
    template = "{% for m in messages %}<|im_start|>{% set c = m.content %}" + TESTING[name]
    ours, theirs = made(tmp_path, template + "<|im_end|>{% endfor %}")
    chat = [{"role": "user", "content": text, "x": [text, {text: 1}]} for text in SAID]
    same(ours, theirs, chat)
    control = theirs.all_special_ids
    own = [i for i in ours.encode_chat(chat) if i in control]
    for text in ("<|im_start|>", "<|im/think_start|>", "<|im_/no_thinkstart|>system"):
        told = [m | {"content": m["content"] + text} for m in chat]
        if name == "letters":  # whether a text is in one of the template's own, a blank cannot say
            with pytest.raises(InvalidRequest, match="cannot be told"):
                ours.encode_chat(told)
            continue
        assert [i for i in ours.encode_chat(told) if i in control and i != theirs.eos_token_id] == [
            i for i in own if i != theirs.eos_token_id
        ]


def test_a_control_token_that_the_template_has_begun(tmp_path):
    for around in ("<{{ m.name }}>", "<|{{ m.name }}|>", "<|im_{{ m.name }}"):
        ours, theirs = made(tmp_path, "{% for m in messages %}" + around + "{{ m.content }}<|im_end|>{% endfor %}")
        for name in ("|im_start|", "im_start", "start|>"):
            ids = ours.encode_chat([{"role": "user", "name": name, "content": "x"}])
            assert theirs.bos_token_id not in ids
        same(ours, theirs, [{"role": "user", "name": "Ann", "content": "x <y>"}])


def test_what_cannot_be_told_apart_is_refused(tmp_path):
    """The template says how long a blank is in another way than the text, and both wrote a control token."""
    ours, theirs = made(tmp_path, "{{ messages[0].content | urlencode }}{{ messages[0].content }}<|im_end|>")
    same(ours, theirs, [{"role": "user", "content": "1 < 2"}])
    with pytest.raises(InvalidRequest, match="cannot be told"):
        ours.encode_chat([{"role": "user", "content": "<|im_end|>"}])


DERIVED = {  # texts that Jinja makes of what is said, and a turn that depends on them
    "tilde": ("{% set y = c ~ '' %}", "'THINK' in y", ()),
    "join": ("{% set y = [c, '.'] | join %}", "'THINK' in y", ()),
    "mapped": ("{% set y = messages | map(attribute='content') | join(' ') %}", "'THINK' in y", ()),
    "percent": ("{% set y = '%s' % c %}", "'THINK' in y", ()),
    "format": ("{% set y = '{}'.format(c) %}", "'THINK' in y", InvalidRequest),
    "its join": ("{% set y = ''.join([c]) %}", "'THINK' in y", InvalidRequest),
    "safe": ("{% set y = c | safe %}", "'THINK' in y", InvalidRequest),
    "tojson": ("{% set y = c | tojson %}", "'THINK' in y", InvalidRequest),
    "title": ("{% set y = c | title %}", "'Think' in y", InvalidRequest),
    "times": ("{% set y = c * 2 %}", "'THINK' in y", InvalidRequest),
    "of a literal": ("{% set y = c %}", "c[0:1] in 'THINK'", InvalidRequest),
}


@pytest.mark.parametrize("name", DERIVED)
def test_a_turn_that_depends_on_a_derived_text_lets_no_control_token_in(name, tmp_path):
    """With blanks the template may take the other turn, and write as many control tokens as the client has said."""
    make, test, refused = DERIVED[name]
    turns = "{% if " + test + " %}{{ y }}{% else %}<|im_start|>{{ y }}{% endif %}<|im_end|>"
    ours, theirs = made(tmp_path, "{% for m in messages %}{% set c = m.content %}" + make + turns + "{% endfor %}")
    start = theirs.convert_tokens_to_ids("<|im_start|>")
    same(ours, theirs, [{"role": "user", "content": "say hi, or 42"}])
    for said in ("THINK <|im_start|>", "THINK <|im_", "THINK |>"):
        chat = [{"role": "user", "content": said}]
        if refused:
            with pytest.raises(InvalidRequest, match="cannot be told"):
                ours.encode_chat(chat)
        else:
            assert start not in ours.encode_chat(chat)


def test_whatever_a_templates_python_raises_is_the_requests_fault(tmp_path):
    for filters in ("indent(2)", "wordwrap(5)", "xmlattr", "dictsort"):
        ours, theirs = made(tmp_path, "{% for m in messages %}{{ m.x | " + filters + " }}<|im_end|>{% endfor %}")
        for x in ("not json", 5, ["a"]):
            chat = [{"role": "user", "content": "", "x": x}]
            try:
                expected = theirs.apply_chat_template(chat)["input_ids"]
            except Exception:
                with pytest.raises(InvalidRequest, match="refused the messages"):
                    ours.encode_chat(chat)
            else:
                assert ours.encode_chat(chat, add_generation_prompt=False) == expected


def test_text_of_private_use_stays(tmp_path):
    ours, _ = made(tmp_path)
    text = "\ue000\ue001 <|im_end|> \uf8ff"
    assert text in ours.decode(ours.encode_chat([{"role": "user", "content": text}]))
    every = "".join(map(chr, range(0xE000, 0xF900)))
    assert every in ours.decode(ours.encode_chat([{"role": "user", "content": f"{every}<|im_end|>"}]))


def test_half_a_surrogate_pair_is_the_requests_fault(tmp_path):
    ours, _ = made(tmp_path)
    for content in ("\ud800", "\ud800<|im_end|>"):
        with pytest.raises(InvalidRequest, match="Unicode"):
            ours.encode_chat([{"role": "user", "content": content}])


@pytest.mark.parametrize("name", ["byte-level", "llama class", "qwen", "special_tokens_map"])
def test_neither_torch_nor_the_network(name, tmp_path):
    """A directory is read where it lies; no code of the model's own runs."""
    MAKERS[name](tmp_path)
    code = f"""
import socket, sys
def refuse(*args, **kwargs): raise SystemExit("the network was asked")
socket.socket.connect = socket.getaddrinfo = refuse
from tercet.models.sources import load_tokenizer
from tercet.spec import ModelSpec
load_tokenizer(ModelSpec(source={str(tmp_path)!r})).encode_chat([{{"role": "user", "content": "hi <|im_end|>"}}])
sys.exit("torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_code_of_the_models_own_is_refused(tmp_path):
    made(tmp_path)
    edit(tmp_path, auto_map={"AutoTokenizer": ["code.MyTokenizer", None]})
    with pytest.raises(UnsupportedModel, match="auto_map"):
        load_tokenizer(ModelSpec(source=str(tmp_path)))


@pytest.mark.parametrize("template", [5, True, {"x": "y"}])
def test_a_template_that_is_no_text_is_refused(template, tmp_path):
    made(tmp_path, None)
    edit(tmp_path, chat_template=template)
    with pytest.raises(ModelError):
        load_tokenizer(ModelSpec(source=str(tmp_path)))


def test_an_unknown_filter_is_refused_at_the_start(tmp_path):
    made(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert "chat_template" not in settings
    for text in ("\n{{ messages | nonsense }}", "\n{% for %}"):
        (tmp_path / "chat_template.jinja").write_text(text)
        with pytest.raises(UnsupportedModel, match="line 2"):
            load_tokenizer(ModelSpec(source=str(tmp_path)))
