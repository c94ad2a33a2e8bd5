"""What the report shows of `ftray evaluate`: the table of systems, answers side by side, the matrix. From its files."""

from __future__ import annotations

from typing import Any

import numpy as np

from ftray.evaluate import plots
from ftray.evaluate.record import RunRecord

_EXAMPLES = 4
_EXTREMES = 3
_LONGEST = 900
"""Characters of a text that are shown."""


def evaluated(record: RunRecord) -> dict[str, Any] | None:
    """The comparison table; None where nothing was evaluated."""
    found = record.evaluation
    if not found.get("systems"):
        return None
    names = [metric["name"] for metric in found.get("metrics") or []]
    first = found["systems"][0]["name"]
    against = {d["system"]: d["metrics"] for d in found.get("differences") or [] if d.get("than") == first}
    rows = []
    for system in found["systems"]:
        differences = against.get(system["name"], {})
        cells = [_cell(system.get("loss"), system.get("loss_low"), system.get("loss_high"), differences.get("loss"))]
        for name in names:
            score = (system.get("scores") or {}).get(name) or {}
            cells.append(_cell(score.get("score"), score.get("low"), score.get("high"), differences.get(name)))
        rows.append({"name": system["name"], "tuned": system["kind"] != "base", "cells": cells,
                     "prompt": system.get("prompt_tokens"), "answer": system.get("answer_tokens")})  # fmt: skip
    return {
        "metrics": names,
        "rows": rows,
        "first": first,
        "questions": found.get("questions"),
        "references": found.get("references"),
        "loss_rows": found.get("loss_rows"),
        "decoding": _decoding(found),
        "notes": _notes(found),
    }


def _cell(score: float | None, low: float | None, high: float | None, difference: dict[str, Any] | None) -> Any:
    """A score with half of its interval, and how it differs from the first line's."""
    if score is None:
        return None
    half = (high - low) / 2 if low is not None and high is not None else None
    return {"score": score, "half": half, "p": difference.get("p") if difference else None}


def _decoding(found: dict[str, Any]) -> str:
    from ftray.evaluate.results import decoding_text

    return decoding_text(found["settings"]["decoding"]) if found.get("metrics") else ""


def _notes(found: dict[str, Any]) -> list[str]:
    """What has to be known beside the table."""
    from ftray.evaluate.judging import judged_text

    notes = [judged_text(judged) for judged in found.get("judged") or []]
    notes += list((found.get("overlap") or {}).get("lines") or [])
    for system in found["systems"]:
        shown, wanted = system.get("examples_shown"), system.get("examples")
        if wanted and shown is not None and shown < wanted:
            notes.append(f"{system['name']}: {shown:.1f} of {wanted} examples fitted into the prompt, on average")
        if system.get("rows_too_long"):
            notes.append(f"{system['name']}: {system['rows_too_long']:,} rows are too long, their loss is not in")
        if system.get("cut_off"):
            notes.append(f"{system['name']}: {system['cut_off']:,} answers were cut off")
    return notes


# ---------------------------------------------------------------------------------------------------------- the answers


def examples(record: RunRecord) -> list[dict[str, Any]]:
    """A few questions, evenly spread, with the answers of all systems side by side."""
    rows = record.answers
    if not rows:
        return []
    chosen = sorted({round(i * (len(rows) - 1) / max(_EXAMPLES - 1, 1)) for i in range(_EXAMPLES)})
    return [_shown(rows[i], record) for i in chosen]


def extremes(record: RunRecord) -> dict[str, Any] | None:
    """The run's own best and worst answers by the first metric that tells rows apart; None without any."""
    name = own_system(record)
    if name is None:
        return None
    for metric in record.evaluation.get("metrics") or []:
        if metric["name"] in ("words", "distinct_1", "distinct_2"):
            continue
        scored = [
            (answer["scores"][metric["name"]], row)
            for row in record.answers
            if (answer := row["answers"].get(name)) and metric["name"] in answer["scores"]
        ]
        scored.sort(key=lambda pair: pair[0])
        if len(scored) >= 2 * _EXTREMES and scored[0][0] < scored[-1][0]:
            return {
                "system": name,
                "metric": metric["name"],
                "best": [_shown(row, record, name) for _, row in scored[: -_EXTREMES - 1 : -1]],
                "worst": [_shown(row, record, name) for _, row in scored[:_EXTREMES]],
            }
    return None


def own_system(record: RunRecord) -> str | None:
    """The system of the table that is this very run; else the last one that was tuned."""
    tuned = [system["name"] for system in record.evaluation.get("systems") or [] if system["kind"] != "base"]
    name = record.run.get("name")
    return name if name in tuned else tuned[-1] if tuned else None


def _shown(row: dict[str, Any], record: RunRecord, only: str | None = None) -> dict[str, Any]:
    names = [metric["name"] for metric in record.evaluation.get("metrics") or []][:2]
    answers = [
        {
            "name": name,
            "text": _cut(answer["answer"]),
            "scores": ", ".join(f"{m} {answer['scores'][m]:.3g}" for m in names if m in answer["scores"]),
        }
        for name, answer in row["answers"].items()
        if only in (None, name)
    ]
    references = row.get("references") or [""]
    return {
        "number": row.get("number"),
        "where": row.get("where"),
        "prompt": _cut(row.get("prompt") or ""),
        "reference": _cut(references[0]),
        "more": len(references) - 1,
        "answers": answers,
    }


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


# ----------------------------------------------------------------------------------------------------------- the matrix


def matrix(record: RunRecord) -> dict[str, Any] | None:
    """What each system's loss changed by: its own task, the other tasks, general text. None without a matrix."""
    found = record.matrix
    if not found.get("systems"):
        return None
    changed, losses = _array(found["forgetting"]), _array(found["losses"])
    scores = _array(found["scores"])
    rows = []
    for i, system in enumerate(found["systems"]):
        own = system.get("own")
        others = [j for j in range(len(found["tasks"])) if j != own]
        rows.append(
            {
                "name": system["name"],
                "tuned": system["kind"] != "base",
                "own_loss": losses[i, own] if own is not None else None,
                "own": changed[i, own] if own is not None else None,
                "others": _mean(changed[i, others]),
                "own_score": None if own is None or np.isnan(scores[i, own]) else scores[i, own],
                "others_score": _mean(scores[i, others]),
            }
        )
    return {"rows": rows, "tasks": len(found["tasks"]), "scored": bool(np.isfinite(scores).any())}


def heat(record: RunRecord) -> str:
    """SVG of the change of loss since the base."""
    found = record.matrix
    names = [system["name"] for system in found["systems"]]
    own = [system.get("own") for system in found["systems"]]
    return plots.heat_map(names, [task["name"] for task in found["tasks"]], _array(found["forgetting"]), own)


def _array(values: list[list[float | None]]) -> np.ndarray:
    return np.array([[np.nan if value is None else value for value in row] for row in values], float)


def _mean(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None
