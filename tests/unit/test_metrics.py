"""Metrics: names, buckets, bounds, formats; what docs/metrics.md, the dashboard and the alerts say of them."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from tercet.errors import Cancelled, InvalidRequest, WorkerLost
from tercet.metrics import CHAT, TEXT_COMPLETION, Metrics, encoder_for
from tercet.metrics.clients import MOST_CLIENTS, OTHER, BoundedLabels
from tests.all_metrics import described, full_metrics, table_rows
from tests.machine import ROOT
from tests.prometheus import DEPLOY, promtool
from tests.queries import ALERTS, expressions, families_of, names_in

OPERATING = (ROOT / "docs" / "operating.md").read_text()
BUCKETS = {  # as the conventions have them
    "request_duration": "0.01 0.02 0.04 0.08 0.16 0.32 0.64 1.28 2.56 5.12 10.24 20.48 40.96 81.92",
    "time_to_first_token": "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1.0 2.5 5.0 7.5 10.0",
    "time_per_output_token": "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1.0 2.5",
}


def samples(metrics: Metrics, family: str) -> list[tuple[dict[str, str], float]]:
    families = text_string_to_metric_families(metrics.exposition().decode())
    return [(s.labels, s.value) for f in families for s in f.samples if s.name == family]


def test_the_page_has_every_metric_as_it_is_and_no_other():
    rows = {line for line in (ROOT / "docs" / "metrics.md").read_text().splitlines() if line.startswith("| `")}
    assert rows == table_rows()


def test_names_and_units_follow_prometheus():
    assert promtool("check", "metrics", stdin=full_metrics().exposition()) == ""


def test_every_metric_has_its_own_help():
    told = [text for _, _, text in described(full_metrics()).values()]
    assert all(text and text == text.strip() for text in told)
    assert len(set(told)) == len(told)


@pytest.mark.parametrize("name", BUCKETS)
def test_buckets_and_labels_of_opentelemetry(name):
    series = samples(full_metrics(), f"gen_ai_server_{name}_seconds_bucket")
    assert [labels["le"] for labels, _ in series] == [*BUCKETS[name].split(), "+Inf"]
    own = {"gen_ai_operation_name": "chat", "gen_ai_provider_name": "tercet", "gen_ai_request_model": "m"}
    assert {**own, "le": "+Inf"}.items() <= series[-1][0].items()


def test_a_request_is_counted_once_however_it_ends():
    metrics = Metrics()
    for error in (InvalidRequest("no"), WorkerLost("gone"), ConnectionResetError(), RuntimeError()):
        with pytest.raises(type(error)), metrics.request(TEXT_COMPLETION, "a"):
            raise error
    with metrics.request(CHAT, "a"):
        pass
    with metrics.request(CHAT, "b") as asked:
        asked.error = Cancelled  # told within an answer that had begun
    outcomes = {(s["client"], s["outcome"]): value for s, value in samples(metrics, "tercet_client_requests_total")}
    assert outcomes == {("a", "ok"): 1, ("a", "refused"): 1, ("a", "failed"): 2, ("a", "cancelled"): 1} | {
        ("b", "cancelled"): 1
    }
    timed = samples(metrics, "gen_ai_server_request_duration_seconds_count")
    assert {(s["gen_ai_operation_name"], s["error_type"]): value for s, value in timed} == {
        ("chat", ""): 1,
        ("chat", "cancelled"): 1,
        ("text_completion", "invalid_request"): 1,
        ("text_completion", "worker_lost"): 1,
        ("text_completion", "cancelled"): 1,
        ("text_completion", "internal_error"): 1,
    }


def test_the_first_clients_keep_their_labels_and_all_others_share_one():
    bounded = BoundedLabels(3)
    assert [bounded.label(name) for name in "abcdaebd"] == ["a", "b", "c", OTHER, "a", OTHER, "b", OTHER]


def test_the_clients_that_have_series_are_bounded():
    metrics = Metrics()
    for number in range(MOST_CLIENTS + 500):
        metrics.spent(f"client-{number}", 1, 2)
        with metrics.request(CHAT, f"client-{number}"):
            pass
    for family, total in (("requests", 1), ("prompt_tokens", 1), ("generation_tokens", 2)):
        series = samples(metrics, f"tercet_client_{family}_total")
        assert len(series) == MOST_CLIENTS + 1
        assert sum(value for _, value in series) == total * (MOST_CLIENTS + 500)
        assert {s["client"]: value for s, value in series}[OTHER] == total * 500


@pytest.mark.parametrize(
    ("accept", "media"),
    [
        ("", "text/plain; version=0.0.4"),
        ("*/*", "text/plain; version=0.0.4"),
        ("application/openmetrics-text", "application/openmetrics-text; version=1.0.0"),
        ("application/openmetrics-text;version=1.0.0,*/*;q=0.1", "application/openmetrics-text; version=1.0.0"),
        ("application/openmetrics-text;version=x\x01;escaping=y", "application/openmetrics-text; version=1.0.0"),
        ("text/plain;version=junk", "text/plain; version=0.0.4"),
    ],
)
def test_the_format_is_the_one_that_is_asked_for(accept, media):
    encode, content_type = encoder_for(accept)
    assert content_type.startswith(media)
    text = encode(full_metrics().collected()).decode()
    assert text.endswith("# EOF\n") == ("openmetrics" in media)
    read = openmetrics_families if "openmetrics" in media else text_string_to_metric_families
    assert "tercet_ready" in {family.name for family in read(text)}


@pytest.mark.parametrize(("where", "expression"), expressions())
def test_every_query_names_metrics_that_exist(where, expression):
    known = described(full_metrics()).keys() | {"up"}
    names = families_of(names_in(expression), known)
    assert names
    assert names <= known


def test_names_are_found_wherever_a_query_has_them():
    query = (
        'topk(3, sum by (le, role) (rate(a_bucket{b="c d"}[5m] offset 1m))) / on (x) group_left (y) e:f > bool 2 and g'
    )
    assert names_in(query) == {"a_bucket", "e:f", "g"}


def test_alerts_say_what_is_wrong_and_where_to_read_on():
    sections = {title.lower() for title in re.findall(r"^### (\S+)$", OPERATING, re.MULTILINE)}
    for rule in ALERTS:
        assert rule["for"]
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"]
        page, _, section = rule["annotations"]["runbook_url"].partition("#")
        assert (page, section) == ("docs/operating.md", rule["alert"].lower())
    assert {rule["alert"].lower() for rule in ALERTS} == sections


def test_each_alert_fires_for_what_is_wrong_and_for_nothing_else():
    promtool("check", "config", DEPLOY / "prometheus.yaml")
    promtool("test", "rules", DEPLOY / "alerts_test.yaml")
    fired = yaml.safe_load((DEPLOY / "alerts_test.yaml").read_text())["tests"][0]["promql_expr_test"][-1]
    told = {re.findall(r'alertname="(\w+)"', sample["labels"])[0] for sample in fired["exp_samples"]}
    assert told == {rule["alert"] for rule in ALERTS}


def test_panels_of_the_dashboard_lie_beside_each_other():
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "tercet.json").read_text())
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(places)
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["datasource", "cluster"]
