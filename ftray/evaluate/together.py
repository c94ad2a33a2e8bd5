"""Several runs on one page: what each trained, how its held-out loss went, what it came to, and what was evaluated."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from ftray.evaluate import plots, sections
from ftray.evaluate.record import RunRecord, read_record
from ftray.evaluate.report import compare, environment, evaluations, findings_of, headline, state, unit
from ftray.manifest import is_local, write_text


def write_comparison(folders: Sequence[str], to: str) -> str:
    """Write the page to `to` (a path or fsspec URI) and return it. Raises UserError for a folder without a run."""
    write_text(to, render(folders))
    return to


def render(folders: Sequence[str]) -> str:
    """The page as text."""
    records = [read_record(folder) for folder in folders]
    names = _names(records)
    context = {
        "names": names,
        "runs": [_run(record, name) for record, name in zip(records, names, strict=True)],
        "plot": _plot(records, names),
        "evaluated": _evaluated(records, names),
    }
    return environment().get_template("together.html").render(context)


def _names(records: Sequence[RunRecord]) -> list[str]:
    """The runs' names; those of one name have the ends of their folders too."""
    plain = [str(record.run.get("name", "run")) for record in records]
    ends = [record.folder.rstrip("/").rsplit("/", 1)[-1] for record in records]
    return [
        f"{name} ({end})" if plain.count(name) > 1 and end != name else name
        for name, end in zip(plain, ends, strict=True)
    ]


def _run(record: RunRecord, name: str) -> dict[str, Any]:
    found, start, summary = compare(record), record.last("start"), record.summary
    steps = record.by_step("step")
    report = os.path.relpath(os.path.join(record.folder, "report.html")) if is_local(record.folder) else None
    return {
        "name": name,
        "headline": headline(record),
        "state": state(record),
        "base": found["base"] if found else None,
        "tuned": found["tuned"] if found else None,
        "step": found["step"] if found else None,
        "steps": steps[-1]["step"] if steps else None,
        "rate": (record.run.get("train") or {}).get("learning_rate"),
        "trained": start.get("trainable_parameters"),
        "seconds": summary.get("seconds") or sum(event.get("seconds") or 0.0 for event in steps),
        "memory": summary.get("peak_memory_gib"),
        "findings": findings_of(record),
        "unit": unit(record),
        "report": report,
    }


def _plot(records: Sequence[RunRecord], names: Sequence[str]) -> Markup | None:
    """Held-out losses of all runs; None where no run has any."""
    series = []
    for record, name in zip(records, names, strict=True):
        found = evaluations(record)
        if found:
            series.append((name, (np.array([e["step"] for e in found]), np.array([e["loss"] for e in found]))))
    return Markup(plots.held_out_curves(series, unit(records[0]))) if series else None


def _evaluated(records: Sequence[RunRecord], names: Sequence[str]) -> dict[str, Any] | None:
    """Each run's own line of its evaluation, with the bases' of the first; None where nothing was evaluated. Scores of
    other questions do not compare, so only runs that were asked the same as the first one are in."""
    lines: list[dict[str, Any]] = []
    first: dict[str, Any] | None = None
    left_out = []
    for record, name in zip(records, names, strict=True):
        found = sections.evaluated(record)
        if found is None:
            continue
        asked = _asked(record)
        if first is None:
            first = found | {"asked": asked}
            lines += [row for row in found["rows"] if not row["tuned"]]
        if asked != first["asked"]:
            left_out.append(name)
            continue
        own = sections.own_system(record)
        lines += [row | {"name": name} for row in found["rows"] if row["name"] == own]
    if first is None:
        return None
    notes = [f"{name} was evaluated on other questions, or in another way" for name in left_out]
    return first | {"rows": lines, "notes": notes}


def _asked(record: RunRecord) -> tuple[Any, ...]:
    found = record.evaluation
    settings = {key: value for key, value in found["settings"].items() if key not in ("examples", "choose")}
    return found.get("sources"), found.get("questions"), found.get("references"), repr(sorted(settings.items()))
