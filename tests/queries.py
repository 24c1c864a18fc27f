"""The queries of deploy/: of the dashboard and of the alerts, and which metrics each names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

import yaml

from tests.machine import ROOT

DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "tercet.json").read_text())
ALERTS = [
    rule
    for group in yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
]
WINDOW = "10s"  # for Grafana's $__rate_interval
_LEFT_OUT = (  # what holds no metric's name: strings, matchers, ranges, lists of labels
    r'"[^"]*"',
    r"\{[^}]*\}",
    r"\[[^\]]*\]",
    r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)",
)
_KEYWORDS = {"and", "or", "unless", "bool", "offset"}


def expressions() -> list[tuple[str, str]]:
    """(where it stands, query), with values for Grafana's variables."""
    panels = [(f"panel {p['title']}", target["expr"]) for p in DASHBOARD["panels"] for target in p.get("targets", ())]
    filled = [(w, e.replace("$__rate_interval", WINDOW).replace("$cluster", ".*")) for w, e in panels]
    return filled + [(f"alert {rule['alert']}", rule["expr"]) for rule in ALERTS]


def names_in(expression: str) -> set[str]:
    for pattern in _LEFT_OUT:
        expression = re.sub(pattern, " ", expression)
    return set(re.findall(r"(?<![\w.])[a-zA-Z_:][\w:]*\b(?!\s*\()", expression)) - _KEYWORDS


def families_of(names: Iterable[str], known: Iterable[str]) -> set[str]:
    """The histogram of a _bucket, _sum or _count, if it is known; else the name itself."""
    stems = {name: re.sub(r"_(bucket|sum|count)$", "", name) for name in names}
    return {stem if stem in known else name for name, stem in stems.items()}
