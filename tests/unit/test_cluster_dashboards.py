"""Dashboards, alerts and what Prometheus asks: all of it is of series that somebody makes."""

from __future__ import annotations

import importlib.util
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.cluster import CLUSTER, ROOT, TEXTS, anchor

OBSERVABILITY = CLUSTER / "observability"
DASHBOARDS = [OBSERVABILITY / "training.json", ROOT / "serve" / "grafana.json"]
METRIC = re.compile(r"\b((?:ray|ftray)_[a-z0-9_]+)\b")


@cache
def known_metrics() -> frozenset[str]:
    """Series that somebody makes: ours by the code that counts, Ray's by the names in its own dashboards and code."""
    names: set[str] = set()
    for name in re.findall(r'"(ftray_[a-z_]+)"', (ROOT / "serve" / "metrics.py").read_text(encoding="utf-8")):
        names |= {name, *(f"{name}_{end}" for end in ("total", "bucket", "count", "sum"))}
    text = (ROOT / "ftray" / "train" / "gauges.py").read_text(encoding="utf-8")
    names |= {f"ray_{name}" for name in re.findall(r'"(ftray_train_[a-z_]+)"', text)}
    ray = importlib.util.find_spec("ray")
    assert ray is not None
    assert ray.submodule_search_locations is not None
    folder = Path(ray.submodule_search_locations[0]) / "dashboard" / "modules" / "metrics" / "dashboards"
    for file in folder.glob("*.py"):
        names |= set(re.findall(r"\b(ray_[a-z0-9_]+)\b", file.read_text(encoding="utf-8")))
    # written by the GCS, in C++, and read by Ray Data
    collector = Path(ray.submodule_search_locations[0]) / "data" / "_internal" / "usage" / "collector.py"
    names |= set(re.findall(r"\b(ray_[a-z_]+_total)\b", collector.read_text(encoding="utf-8")))
    agent = folder.parents[1] / "reporter" / "reporter_agent.py"
    names |= {f"ray_{name}" for name in re.findall(r'"(node_[a-z_]+)"', agent.read_text(encoding="utf-8"))}
    return frozenset(names)


def expression_errors(expression: str) -> str | None:
    import promql_parser

    plain = re.sub(r"\$\{?\w+\}?", "x", re.sub(r"\$__(rate_interval|range)\b", "5m", expression))
    try:
        promql_parser.parse(plain)
    except ValueError as error:
        return f"{expression}: {error}"
    unknown = set(METRIC.findall(expression)) - known_metrics()
    return f"{expression}: nobody makes {', '.join(sorted(unknown))}" if unknown else None


def dashboard_errors(board: dict[str, Any]) -> list[str]:
    """What Grafana would not show, or show on top of each other."""
    found = [f"no {key}" for key in ("title", "uid", "schemaVersion", "panels", "templating") if key not in board]
    cells: dict[tuple[int, int], str] = {}
    ids: set[int] = set()
    variables = {each["name"] for each in board["templating"]["list"]}
    for panel in board["panels"]:
        title = panel.get("title", "?")
        if unknown := panel.keys() - PANEL_KEYS:
            found.append(f"{title}: {', '.join(sorted(unknown))}")
        if panel.get("type") not in ("row", "stat", "timeseries", "heatmap", "table", "bargauge", "gauge", "barchart"):
            found.append(f"{title}: type {panel.get('type')}")
        if panel.get("id") in ids:
            found.append(f"{title}: id {panel['id']} a second time")
        ids.add(panel.get("id"))
        at = panel["gridPos"]
        for cell in ((x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])):
            if cell in cells or cell[0] >= 24:
                found.append(f"{title}: over {cells.get(cell, 'the edge')}")
                break
            cells[cell] = title
        if panel.get("type") != "row" and not panel.get("targets"):
            found.append(f"{title}: nothing to draw")
        for target in panel.get("targets", []):
            found += [error] if (error := expression_errors(target["expr"])) else []
            used = set(re.findall(r"\$\{?([a-z]\w*)\}?", target["expr"])) - {"__rate_interval", "__range"}
            found += [f"{title}: no variable {name}" for name in sorted(used - variables)]
    return found


PANEL_KEYS = {
    *("type", "title", "description", "datasource", "gridPos", "fieldConfig", "options", "targets", "id", "collapsed"),
    *("panels", "interval", "maxDataPoints", "transformations", "links", "repeat", "pluginVersion"),
}


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda f: f.name)
def test_dashboards_can_be_drawn(file: Path) -> None:
    assert dashboard_errors(json.loads(file.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda b: b.pop("uid"),
        lambda b: b["panels"][1].update(id=b["panels"][2]["id"]),
        lambda b: b["panels"][1].update(typ="stat"),
        lambda b: b["panels"][1].update(type="graphs"),
        lambda b: b["panels"][1]["gridPos"].update(b["panels"][2]["gridPos"]),
        lambda b: b["panels"][1]["targets"][0].update(expr="ray_ftray_train_stepp"),
        lambda b: b["panels"][1]["targets"][0].update(expr="sum(ray_ftray_train_step"),
        lambda b: b["panels"][1]["targets"][0].update(expr='ray_ftray_train_step{run=~"$runs"}'),
    ],
)
def test_a_wrong_dashboard_is_refused(spoil: Any) -> None:
    board = json.loads(TEXTS[OBSERVABILITY / "training.json"])
    spoil(board)
    assert dashboard_errors(board)


def test_the_training_dashboard_draws_all_that_a_run_tells() -> None:
    from ftray.train.gauges import GAUGES, STEP

    drawn = set(METRIC.findall(TEXTS[OBSERVABILITY / "training.json"]))
    assert {f"ray_{name}" for name, _ in [STEP, *GAUGES.values()]} <= drawn


def test_every_gauge_is_of_a_value_that_a_run_tells() -> None:
    from ftray.train.gauges import GAUGES
    from ftray.train.sinks import point_of

    step = point_of(
        dict.fromkeys(
            ("step", "loss", "learning_rate", "grad_norm", "target_tokens_per_second", "seconds", "epoch", "skipped"), 1
        )
        | {"kind": "step"}
    )
    held_out = point_of({"kind": "evaluation", "step": 1, "loss": 1.0})
    assert step is not None
    assert held_out is not None
    assert step.values.keys() | held_out.values.keys() >= GAUGES.keys()


def test_alerts_ask_for_what_exists_and_lead_to_the_runbook() -> None:
    groups = yaml.safe_load(TEXTS[OBSERVABILITY / "alerts.yaml"])["groups"]
    anchors = {anchor(title) for title in re.findall(r"^#+ (.*)$", TEXTS[CLUSTER / "RUNBOOK.md"], flags=re.M)}
    rules = [rule for group in groups for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert expression_errors(rule["expr"]) is None
        assert rule["annotations"].keys() == {"summary", "runbook"}
        file, _, place = rule["annotations"]["runbook"].partition("#")
        assert file == "RUNBOOK.md"
        assert place in anchors


@pytest.mark.parametrize(
    "expression", ["rate(ftray_request_total[5m])", "rate(ftray_requests_total[5m]", "ray_node_mem"]
)
def test_a_wrong_expression_is_refused(expression: str) -> None:
    assert expression_errors(expression)


def test_prometheus_asks_ports_and_labels_that_the_pods_have() -> None:
    config = yaml.safe_load(TEXTS[OBSERVABILITY / "prometheus.yaml"])
    assert config.keys() == {"global", "rule_files", "scrape_configs"}
    assert all((OBSERVABILITY / name).is_file() for name in config["rule_files"])
    known = {
        "job_name",
        "file_sd_configs",
        "static_configs",
        "kubernetes_sd_configs",
        "relabel_configs",
        "authorization",
    }
    for job in config["scrape_configs"]:
        assert job.keys() <= known
    text = TEXTS[CLUSTER / "kuberay" / "rayservice.yaml"]
    assert "name: serve, containerPort: 8000" in text
    assert "name: metrics, containerPort: 8080" in text
