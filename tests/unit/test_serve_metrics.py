"""Metrics, and the dashboard that draws them."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families

from serve import metrics
from serve.metrics import ADAPTER_COUNTERS, ENGINE_COUNTERS, ENGINE_GAUGES, Metrics

ROOT = Path(__file__).parents[2]
ROWS = json.loads((resources.files("serve") / "grafana.json").read_text(encoding="utf-8"))
_NAME = re.compile(r"\bftray_[a-z_]+\b")
_LABELS = re.compile(r"by \(([^)]*)\)|\b(\w+)=~|\{\{(\w+)\}\}")


def replica_stats() -> dict[str, Any]:
    fields = [field for table in (ENGINE_GAUGES, ENGINE_COUNTERS) for field, _ in table.values()]
    by_adapter = {field: {("acme", "ab" * 32): 3} for field, _ in ADAPTER_COUNTERS.values()}
    return {"replica": "r1", **dict.fromkeys(fields, 2), **by_adapter}


def samples(found: Metrics) -> dict[str, set[str]]:
    """{name of a series: its labels}"""
    series: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(found.page([replica_stats()]).decode()):
        for sample in family.samples:
            series.setdefault(sample.name, set()).update(sample.labels)
    return series


def used() -> Metrics:
    found = Metrics("i1")
    found.requests.labels("acme", "/v1/completions", "200").inc()
    found.refused.labels("acme", "overloaded").inc()
    own = found.series("acme", "ab" * 32)
    own.answers["stop"].inc()
    own.first_token.observe(0.1)
    return found


def expressions() -> list[tuple[str, str]]:
    targets = [target for panel in ROWS["panels"] for target in panel.get("targets", [])]
    variables = [v["query"]["query"] for v in ROWS["templating"]["list"] if v["type"] == "query"]
    return [(t["expr"], t["legendFormat"]) for t in targets] + [(query, "") for query in variables]


def test_the_dashboard_draws_what_is_there_and_all_of_it() -> None:
    there = samples(used())
    drawn = {name for expression, _ in expressions() for name in _NAME.findall(expression)}
    assert drawn <= there.keys()
    families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in there}
    assert families == {re.sub(r"_bucket$", "", name) for name in drawn}, "what nobody draws need not be counted"


def test_every_label_of_the_dashboard_is_one_of_its_series() -> None:
    there = samples(used())
    for expression, legend in expressions():
        names = _NAME.findall(expression)
        labels = {
            part.strip() for match in _LABELS.findall(expression + legend) for m in match for part in m.split(",")
        }
        for label in labels - {""}:
            assert any(label in there[name] for name in names), (label, expression)


def test_a_series_that_several_pods_tell_counts_once() -> None:
    """Prometheus asks every pod, and each page has all engines on it."""
    rules = yaml.safe_load((ROOT / "cluster" / "observability" / "alerts.yaml").read_text(encoding="utf-8"))["groups"]
    alerts = [rule["expr"] for group in rules for rule in group["rules"]]
    drawn = [expression for expression, _ in expressions() if not expression.startswith("label_values")]
    ours = [expression for expression in drawn + alerts if _NAME.search(expression)]
    assert len(ours) > 30
    for expression in ours:
        once = re.findall(r"max without \(instance, job, pod\) \((?:\w+\()?ftray_", expression)
        assert len(once) == len(_NAME.findall(expression)), expression


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in ROWS["panels"]:
        at = panel["gridPos"]
        own = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not own & cells, panel["title"]
        assert max(x for x, _ in own) < 24
        cells |= own
    ids = [panel["id"] for panel in ROWS["panels"]]
    assert len(set(ids)) == len(ids)


def test_series_are_bounded(monkeypatch) -> None:
    monkeypatch.setattr(metrics, "MOST_SERIES", 3)
    found = Metrics("i1")
    for i in range(10):
        found.series("acme", f"{i:064x}"[::-1]).answers["stop"].inc()
    found.series("acme", f"{7:064x}"[::-1])
    page = found.page([]).decode()
    assert len(set(re.findall(r'adapter="(\w+)"', page))) == 3
    assert page.count("ftray_request_seconds_count") == 3
