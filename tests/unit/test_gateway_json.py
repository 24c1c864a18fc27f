"""What stands outside a JSON body's strings is counted without parsing it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tercet.errors import InvalidRequest
from tercet.roles.gateway import json_body
from tercet.roles.gateway.bounds import JSON_NODES
from tercet.roles.gateway.json_body import json_object

TEXT = st.text(alphabet='ab"\\[]{}:,é\n', max_size=8)
TREES = st.recursive(
    st.none() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
)


def counted(value):
    """(lists and objects, keys) of a tree."""
    if isinstance(value, list):
        below = [counted(item) for item in value]
        return 1 + sum(n for n, _ in below), sum(k for _, k in below)
    if isinstance(value, dict):
        below = [counted(item) for item in value.values()]
        return 1 + sum(n for n, _ in below), len(value) + sum(k for _, k in below)
    return 0, 0


@given(TREES, st.booleans(), st.sampled_from([None, 2]))
def test_brackets_and_keys_outside_of_strings(value, ascii_only, indent):
    outside = json_body._outside(json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode())
    assert (outside.count(b"{") + outside.count(b"["), outside.count(b":")) == counted(value)


@pytest.mark.parametrize(
    ("body", "taken"),
    [
        (b'{"a":[' + b",".join([b"[]"] * (JSON_NODES - 2)) + b"]}", True),
        (b'{"a":[' + b",".join([b"[]"] * (JSON_NODES - 1)) + b"]}", False),
        (b"{" + b",".join(b'"%d":0' % i for i in range(JSON_NODES)) + b"}", True),
        (b"{" + b",".join(b'"%d":0' % i for i in range(JSON_NODES + 1)) + b"}", False),
        (b'{"a":"' + b"[{:" * 500_000 + b'"}', True),  # a text
        (b'{"a":"' + b'[\\"{:' * 300_000 + b'"}', True),
        (b'{"a":[' + b",".join([b'"["'] * 500_000) + b"]}", True),  # texts
        (b"[" + b'"":' * 500_000, False),
    ],
)
def test_the_bound_is_exact(body, taken):
    if taken:
        assert json_object(body)
    else:
        with pytest.raises(InvalidRequest, match="more than 65536"):
            json_object(body)


def test_of_equal_keys_the_last_one_counts():
    assert json_object(b'{"a": 1, "a": 2}') == {"a": 2}
