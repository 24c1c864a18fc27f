"""Writes docs/spec.md, the reference of the cluster spec, from the code that checks one.

python docs/make_spec.py [--check]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tercet.cluster.spec_text import field_comments
from tercet.spec import ClusterSpec

Schema = dict[str, Any]
PATH = Path(__file__).parent / "spec.md"
UNBOUNDED = 2**31  # a limit above this bounds nothing that anybody would say
WORDS = {
    "integer": "whole number",
    "number": "number",
    "boolean": "`true`, `false`",
    "string": "text",
    "null": "`null`",
}
HEAD = """# The cluster spec

Every key that a spec may have. This page is made of the code that checks specs (`python docs/make_spec.py`);
`tercet spec SPEC` prints the same with the values of a spec, and `tercet validate SPEC` checks one. A key that is not
here is refused, with its line. `--set KEY.PATH=VALUE` sets one on the command line.
"""


def main() -> None:
    text = "\n".join([HEAD, *_sections()]).rstrip() + "\n"
    if "--check" not in sys.argv:
        PATH.write_text(text)
    elif not PATH.exists() or PATH.read_text() != text:
        sys.exit(f"{PATH.name} is not what the code says; run python docs/make_spec.py")


def _sections() -> Iterator[str]:
    whole = ClusterSpec.model_json_schema()
    parts: dict[str, Schema] = whole["$defs"]
    told = field_comments()

    # given: what it has where it is left out as a whole
    def section(path: str, name: str, part: Schema, given: Schema) -> Iterator[str]:
        yield f"## {path or 'The top level'}\n"
        if path and (about := part.get("description", "")):
            yield f"{about.splitlines()[0]}\n"
        yield "| key | value | default | what it means |\n|---|---|---|---|"
        below = []
        for key, its in part["properties"].items():
            inner, many = _part_of(its)
            if inner is not None and inner in parts and "properties" in parts[inner]:
                below.append((".".join(filter(None, (path, key, many))), inner, its.get("default") or {}))
            default = _default(its, inner)
            if key in part.get("required", ()):
                default = f"`{json.dumps(given[key])}`" if key in given else "required"
            yield f"| `{key}` | {_value(its, parts)} | {default} | {_cell(told.get((name, key), ''))} |"
        yield ""
        for each, inner, defaults in below:
            yield from section(each, inner, parts[inner], defaults)

    yield from section("", "ClusterSpec", whole, {})


def _part_of(its: Schema) -> tuple[str | None, str]:
    """The name of the part that stands there, and what stands for its keys if there are many."""
    for found in (its, *its.get("anyOf", ())):
        if "$ref" in found:
            return found["$ref"].rpartition("/")[2], ""
        for inner in (found.get("additionalProperties"), *found.get("patternProperties", {}).values()):
            if isinstance(inner, dict) and "$ref" in inner:
                return inner["$ref"].rpartition("/")[2], "ROLE" if "propertyNames" in found else "NAME"
    return None, ""


def _value(its: Schema, parts: dict[str, Schema]) -> str:
    if "anyOf" in its:
        return " or ".join(_value(each, parts) for each in its["anyOf"])
    if "$ref" in its:
        found = parts[its["$ref"].rpartition("/")[2]]
        return "keys below" if "properties" in found else _value(found, parts)
    if "enum" in its:
        return ", ".join(f"`{each}`" for each in its["enum"])
    kind = its.get("type", "")
    if kind == "array":
        return f"list of {_value(its['items'], parts)}"
    if kind == "object":
        inner, _ = _part_of(its)
        return "keys below, by name" if inner in parts else "names and texts"
    return WORDS[kind] + _range(its)


def _range(its: Schema) -> str:
    least, most = its.get("minimum"), its.get("maximum")
    if "exclusiveMinimum" in its:
        return f" above {its['exclusiveMinimum']}"
    bounded = most is not None and most < UNBOUNDED
    if least is not None and bounded:
        return f", {least} to {most}"
    return f", at least {least}" if least is not None else ""


def _default(its: Schema, inner: str | None) -> str:
    """Of a part with keys it is theirs."""
    if inner is not None and its.get("default") is not None:
        return ""
    empty = {"array": [], "object": {}}.get(its.get("type", ""))  # which pydantic does not tell
    default = its.get("default", empty)
    return "" if default is None and "default" not in its else f"`{json.dumps(default)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    main()
