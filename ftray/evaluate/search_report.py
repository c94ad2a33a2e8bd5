"""SEARCH/report.html: one page about a search, in one file that needs no network. `write_search_report(folder)` makes
it again any time, from outcome.json and search.yaml."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from markupsafe import Markup

from ftray.config.search import PLANNED
from ftray.errors import UserError
from ftray.evaluate import search_plots
from ftray.evaluate.importance import importances
from ftray.evaluate.report import count, duration, environment, loss, short
from ftray.manifest import join, read_text, write_text
from ftray.redact import redact

_SHOWN = 200
"""Trials in the table at most; the rest is counted."""
_ENOUGH = 0.6
"""Share of trials that must have come to a step before all are compared there."""
_STATES = {"finished": "finished", "stopped": "stopped early", "aside": "set aside", "open": "unfinished"}


def write_search_report(folder: str) -> str:
    """Write `report.html` into a search's folder and return its path. Raises UserError where there is no search."""
    try:
        outcome = json.loads(read_text(join(folder, "outcome.json")))
        text = redact(read_text(join(folder, "search.yaml")))
    except FileNotFoundError:
        raise UserError("this folder holds no outcome.json, so it is no search", where=folder) from None
    where = join(folder, "report.html")
    write_text(where, render(outcome, text))
    return where


def render(outcome: dict[str, Any], text: str) -> str:
    """The page as text. `outcome`: as of `ftray.tune.outcome`; `text`: the search file."""
    return environment().get_template("search.html").render(page(outcome, text))


def page(outcome: dict[str, Any], text: str) -> dict[str, Any]:
    """What the template shows, by name."""
    each, metric = outcome["each"], outcome["metric"][0]
    at, compared = comparable(outcome)
    shares = importances([t["parameters"] for t, _ in compared], [_worse(v, outcome) for _, v in compared])
    return {
        "name": outcome["name"],
        "outcome": outcome,
        "metric": metric,
        "state": {"text": "budget spent", "tone": "warn"}
        if outcome["reason"] == "budget"
        else {"text": outcome["reason"], "tone": "warn" if outcome["open"] else "good"},
        "headline": headline(outcome),
        "tiles": tiles(outcome),
        "keys": list(dict.fromkeys(key for t in each for key in t["parameters"])),
        "rows": [_row(t, outcome) for t in ranked(outcome)[:_SHOWN]],
        "rows_more": max(0, len(each) - _SHOWN),
        "best": outcome["best"],
        "artefact_note": artefact_note(outcome),
        "best_rows": [(k, word(v)) for k, v in outcome["best"]["parameters"].items()] if outcome["best"] else [],
        "failed": [{"name": f"{t['index']:04d}", "error": redact(t["error"])} for t in each if t["error"]],
        "compared": {"step": at, "trials": len(compared)},
        "shares": shares,
        "plots": {name: Markup(svg) for name, svg in draw(outcome, compared, shares).items()},
        "yaml": text,
    }


def artefact_note(outcome: dict[str, Any]) -> str:
    """Of which step the best trial's artefact is, and where that is not the step that won."""
    best, metric = outcome["best"], outcome["metric"][0]
    if not best or not best["artefact"] or best.get("artefact_step") is None:  # as earlier versions wrote it
        return ""
    note = f", of step {best['artefact_step']:,}"
    if best["artefact_step"] == best["step"] or metric in PLANNED:
        return note
    if best["artefact_loss"] is not None:
        note += f" with a held-out loss of {loss(best['artefact_loss'])}"
    return f"{note}, and not of step {best['step']:,}, where {metric} was best"


def headline(outcome: dict[str, Any]) -> str:
    named = [(outcome[state], word) for state, word in _STATES.items()]
    return f"{outcome['trials']:,} trials: " + ", ".join(f"{n:,} {word}" for n, word in named if n)


def tiles(outcome: dict[str, Any]) -> list[dict[str, str]]:
    best, shown = outcome["best"], []
    if best:
        value = best["values"][outcome["metric"][0]]
        shown.append((f"Best {outcome['metric'][0]}", loss(value), f"trial {best['index']:04d}, step {best['step']:,}"))
    whole = sum(t["all_steps"] or t["steps"] for t in outcome["each"])
    share = f"{100 * outcome['steps'] / whole:.0f} % of all trials' to their end" if whole else ""
    below = share if whole > outcome["steps"] else "in all"
    shown.append(("Steps", count(outcome["steps"]), below))
    if outcome["target_tokens"]:
        shown.append(("Trained on", short(outcome["target_tokens"]), "target tokens"))
    shown.append(("Time", duration(outcome["seconds"]), "of the search"))
    return [{"label": label, "value": value, "below": below} for label, value, below in shown]


def ranked(outcome: dict[str, Any]) -> list[dict[str, Any]]:
    """All trials, the best first, those without a value last."""
    metric, sign = outcome["metric"][0], 1 if outcome["mode"][0] == "min" else -1

    def key(trial: dict[str, Any]) -> tuple[float, int]:
        value = trial["values"].get(metric)
        return (sign * value if value is not None else math.inf, trial["index"])

    return sorted(outcome["each"], key=key)


def comparable(outcome: dict[str, Any]) -> tuple[int | None, list[tuple[dict[str, Any], float]]]:
    """(step, trials with their values there). Stopped trials cannot be compared by their best, which came early: all
    are taken at the last step that most of them reached."""
    curves = {t["index"]: dict(map(tuple, t["curve"])) for t in outcome["each"] if t["curve"]}
    steps = sorted({step for curve in curves.values() for step in curve})
    enough = [s for s in steps if sum(s in curve for curve in curves.values()) >= max(2, _ENOUGH * len(curves))]
    if not enough:
        metric = outcome["metric"][0]
        return None, [(t, t["values"][metric]) for t in outcome["each"] if t["values"].get(metric) is not None]
    at = enough[-1]
    found = [(t, curves[t["index"]][at]) for t in outcome["each"] if at in curves.get(t["index"], {})]
    return at, [(t, value) for t, value in found if value is not None and math.isfinite(value)]


def _worse(value: float, outcome: dict[str, Any]) -> float:
    return value if outcome["mode"][0] == "min" else -value


def draw(
    outcome: dict[str, Any], compared: list[tuple[dict[str, Any], float]], shares: dict[str, float]
) -> dict[str, str]:
    """SVG by name; a plot without points is left out."""
    each, metric, best = outcome["each"], outcome["metric"], outcome["best"]
    drawn = {}
    lines = [([s for s, _ in t["curve"]], [np.nan if v is None else v for _, v in t["curve"]]) for t in each]
    if any(x for x, _ in lines):
        at = next((i for i, t in enumerate(each) if best and t["index"] == best["index"]), None)
        drawn["curves"] = search_plots.curves(lines, [t["state"] == "finished" for t in each], at, metric[0])
    if len(compared) > 1:
        at = next((i for i, (t, _) in enumerate(compared) if best and t["index"] == best["index"]), None)
        drawn["parallel"] = search_plots.parallel(
            [t["parameters"] for t, _ in compared], [v for _, v in compared], at, metric[0], outcome["mode"][0] == "max"
        )
    if len(compared) > 3 and shares:
        drawn["importance"] = search_plots.bars(shares)
    if len(metric) > 1 and outcome["front"]:
        both = [t for t in each if all(t["values"].get(name) is not None for name in metric[:2])]
        members = {t["index"] for t in outcome["front"]}
        points = [(t["values"][metric[0]], t["values"][metric[1]]) for t in both]
        front = [i for i, t in enumerate(both) if t["index"] in members]
        drawn["front"] = search_plots.trade_offs(points, front, metric[:2])
    return drawn


def _row(trial: dict[str, Any], outcome: dict[str, Any]) -> dict[str, Any]:
    best = outcome["best"] and trial["index"] == outcome["best"]["index"]
    return {
        "name": f"{trial['index']:04d}",
        "best": bool(best),
        "state": _STATES[trial["state"]],
        "steps": trial["steps"],
        "values": [trial["values"].get(name) for name in outcome["metric"]],
        "parameters": {key: word(value) for key, value in trial["parameters"].items()},
    }


def word(value: Any) -> str:
    """A parameter's value in a few letters."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict | list):
        return json.dumps(value)
    return str(value)
