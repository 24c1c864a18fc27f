"""A spec as YAML: every key that it may have, its value, and what `tercet/spec/` says of it."""

from __future__ import annotations

import ast
import inspect
import io
import json
import tokenize
from collections.abc import Iterator, Mapping
from textwrap import wrap
from types import ModuleType
from typing import Any

from pydantic import BaseModel

from tercet.spec import ClusterSpec, base, cluster, gateway, role

WIDTH = 100
Comments = Mapping[tuple[str, str], str]  # (class, field) -> what is said of it


def spec_text(spec: ClusterSpec) -> str:
    """`load_spec` reads the same spec from it. What the spec does not say stands there with its default, as `#key`."""
    return "\n".join(_lines(spec, field_comments(), "", said=True)) + "\n"


def _lines(part: BaseModel, comments: Comments, indent: str, *, said: bool) -> Iterator[str]:
    for name in type(part).model_fields:
        comment = comments.get((type(part).__name__, name), "")
        long = len(comment) > WIDTH // 2
        yield from (f"{indent}# {line}" for line in wrap(comment, WIDTH - len(indent)) if long)
        its = said and name in part.model_fields_set
        yield from _entry(name, getattr(part, name), "" if long else comment, comments, indent, said=its)


def _entry(name: str, value: Any, comment: str, comments: Comments, indent: str, *, said: bool) -> Iterator[str]:
    behind, mark = f"  # {comment}" if comment else "", "" if said else "#"
    if isinstance(value, BaseModel):
        yield f"{indent}{mark}{name}:{behind}"
        yield from _lines(value, comments, f"{indent}  ", said=said)
    elif isinstance(value, dict) and any(isinstance(each, BaseModel) for each in value.values()):
        yield f"{indent}{mark}{name}:{behind}"
        for number, (key, each) in enumerate(value.items()):  # the same keys in each: explained once
            yield from _entry(str(key), each, "", {} if number else comments, f"{indent}  ", said=said)
    else:
        yield f"{indent}{mark}{name}: {json.dumps(value)}{behind}"  # JSON is YAML


def field_comments() -> Comments:
    return {key: told for module in (base, role, gateway, cluster) for key, told in _comments_of(module).items()}


def _comments_of(module: ModuleType) -> Comments:
    """Those above a field and behind it."""
    source = inspect.getsource(module)
    lines = source.splitlines()
    found = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    comments = {}
    for made in (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)):
        for field in (node for node in made.body if isinstance(node, ast.AnnAssign)):
            first = field.lineno
            while lines[first - 2].lstrip().startswith("#"):
                first -= 1
            assert isinstance(field.target, ast.Name)
            told = [found[line] for line in range(first, (field.end_lineno or first) + 1) if line in found]
            comments[made.name, field.target.id] = " ".join(told)
    return comments
