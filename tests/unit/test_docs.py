"""What pages of docs/ say of errors is what errors are."""

import re
from pathlib import Path

import pytest

from tercet.errors import TercetError

DOCS = Path(__file__).parents[2] / "docs"


def tree(root=TercetError):
    yield root
    for child in root.__subclasses__():
        yield from tree(child)


ERRORS = {error.code(): error for error in tree()}


@pytest.mark.parametrize(
    "line", re.findall(r"^\| `([A-Z_]+)` \| (.*) \|$", (DOCS / "grpc.md").read_text(), re.MULTILINE)
)
def test_statuses_of_grpc(line):
    status, codes = line
    for code in re.findall(r"`([a-z_]+)`", codes):
        assert ERRORS[code].grpc_status == status


def test_statuses_of_http():
    rows = re.findall(r"^\| `([a-z_]+)` \| (\d+) \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert sorted(code for code, _ in rows) == sorted(ERRORS)
    assert [(code, int(status)) for code, status in rows if ERRORS[code].http_status != int(status)] == []


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / link).exists(), link
