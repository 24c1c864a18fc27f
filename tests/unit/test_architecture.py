"""What the documents say is there is there: files, functions, rooms, floors, dependencies."""

from __future__ import annotations

import ast
import functools
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARCHITECTURE = ROOT / "ARCHITECTURE.md"
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))
DOCUMENTS = [ROOT / "README.md", ARCHITECTURE, *sorted((ROOT / "docs").glob("*.md")), *DECISIONS]

REFERENCE = re.compile(r"\b((?:tercet|proto|tests|benchmarks)/[\w/]+\.py):([A-Za-z_][\w.]*)")
PATH = re.compile(r"(?<![\w./:-])(?:\.ci|benchmarks|configs|deploy|docs|examples|proto|tercet|tests)/[\w.*/-]*")
LINK = re.compile(r"\]\(([^)#:]+)\)")
STEP = re.compile(r"^ ?\d+\. \*\*", re.MULTILINE)


@functools.cache
def names_in(path: Path) -> set[str]:
    """Functions, classes, their members, and names assigned at the top: `f`, `C`, `C.f`, `CONSTANT`."""
    return set(_names(ast.parse(path.read_text()).body, ""))


def _names(body: list[ast.stmt], prefix: str) -> list[str]:
    found = []
    for node in body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                found.append(prefix + name)
            case ast.ClassDef(name=name):
                found += [prefix + name, *_names(node.body, f"{prefix}{name}.")]
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                found.append(prefix + name)
    return found


def section(title: str) -> str:
    """The text below one heading of ARCHITECTURE.md."""
    return ARCHITECTURE.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]


def exists(path: str) -> bool:
    """A file, a folder, or a pattern that some file fits."""
    return any(ROOT.glob(path)) if "*" in path else (ROOT / path).exists()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_every_function_that_is_named_exists(document):
    named = REFERENCE.findall(document.read_text())
    missing = [f"{path}:{name}" for path, name in named if name.rstrip(".") not in names_in(ROOT / path)]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_every_path_that_is_named_exists(document):
    text = document.read_text()
    paths = {path.rstrip(".") for path in PATH.findall(text)}
    assert sorted(path for path in paths if not exists(path)) == []
    assert [link for link in LINK.findall(text) if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("title", ["Data path", "Control path"])
def test_every_step_names_a_function(title):
    steps = STEP.split(section(title))[1:]
    assert len(steps) >= 8
    assert [step for step in steps if not REFERENCE.search(step)] == []


def test_the_map_names_every_room():
    rooms = section("Rooms")
    packages = [f"{init.parent.relative_to(ROOT)}/" for init in ROOT.glob("tercet/**/__init__.py")]
    modules = [str(path.relative_to(ROOT)) for path in ROOT.glob("tercet/*.py") if path.stem != "__init__"]
    named = set(re.findall(r"tercet/[\w/]+/(?= )|tercet/\w+\.py", rooms))
    assert named == {*packages, *modules} - {"tercet/"}


def test_the_floors_are_those_that_are_held():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = config["tool"]["importlinter"]["contracts"]
    layers = next(c["layers"] for c in contracts if c["name"] == "floors")
    assert " > ".join(layers).replace("tercet.", "") in section("Rooms")


def test_every_dependency_has_its_reason():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    reasons = (ROOT / "docs" / "decisions" / "002-libraries.md").read_text()
    names = [re.match(r"[\w-]+", requirement)[0] for requirement in wanted]
    assert [name for name in names if f"`{name}`" not in reasons] == []


def test_decisions_are_numbered_without_a_gap():
    assert [int(path.name[:3]) for path in DECISIONS] == list(range(1, len(DECISIONS) + 1))
