"""report.html: one page about a run, in one file that needs no network. `write_report(folder)` makes it again any time.

Everything in it is read from the run's folder; whatever is missing there (a run that was killed, data that are gone)
is left out of the page, and said.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from markupsafe import Markup

from ftray.evaluate import plots, sections
from ftray.evaluate.diagnosis import Curves, Finding, diagnose
from ftray.evaluate.record import Event, RunRecord, read_record
from ftray.manifest import join, write_text
from ftray.redact import redact
from ftray.train.card import METHOD_NAMES

_SHOWN = 100
"""Rows of a table at most; the rest is counted."""


def write_report(folder: str) -> str:
    """Write `report.html` into a run's folder and return its path. Raises UserError where there is no run."""
    where = join(folder, "report.html")
    write_text(where, render(read_record(folder)))
    return where


def render(record: RunRecord) -> str:
    """The page as text."""
    return environment().get_template("report.html").render(page(record))


def environment() -> Any:
    """jinja2's, with the pages' templates and filters."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.PackageLoader("ftray.evaluate"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"count": count, "loss": loss, "duration": duration, "share": share, "short": short}
    made.filters |= {"signed": signed, "capitalize_first": capitalize_first}
    return made


def page(record: RunRecord) -> dict[str, Any]:
    """What the template shows, by name."""
    comparison = compare(record)
    return {
        "name": record.run.get("name", "run"),
        "headline": headline(record),
        "state": state(record),
        "tiles": tiles(record, comparison),
        "comparison": comparison,
        "unit": unit(record),
        "evaluations": some_evaluations(record, comparison),
        "plots": {name: Markup(svg) for name, svg in draw(record, comparison).items()},
        "captions": captions(record),
        "findings": findings_of(record),
        "evaluated": sections.evaluated(record),
        "examples": sections.examples(record),
        "extremes": sections.extremes(record),
        "matrix": sections.matrix(record),
        "data": data_section(record),
        "happened": happened(record)[:_SHOWN],
        "happened_more": max(0, len(happened(record)) - _SHOWN),
        "unquantized": record.last("start").get("unquantized") or [],
        "yaml": record.text,
    }


# ------------------------------------------------------------------------------------------------------------ the facts


def headline(record: RunRecord) -> str:
    """ "QLoRA of rank 16 on Llama-3.1-8B, 2 workers, bf16"."""
    method, model = _part(record, "method"), _part(record, "model")
    text = METHOD_NAMES.get(str(method.get("name")), str(method.get("name", "a run")))
    if "rank" in method:
        text += f" of rank {method['rank']}"
    path = str(model.get("path", "")).rstrip("/")
    text += f" on {'the embedded base' if path == 'embedded' else redact(path).rsplit('/', 1)[-1]}"
    return f"{text}, {_workers(_part(record, 'workers'))}, {_part(record, 'train').get('precision')}"


def _workers(given: dict[str, Any]) -> str:
    if given.get("count") is None and given.get("max") is not None:
        return f"{given.get('min') or 1} to {given['max']} workers"
    count = given.get("count") or 1
    return f"{count} {'worker' if count == 1 else 'workers'}"


def state(record: RunRecord) -> dict[str, str]:
    """How the run ended, as a word and its tone for the badge."""
    reason = record.last("end").get("reason") or record.summary.get("reason")
    if not reason:
        return {"text": "not finished", "tone": "warn"}
    return {"text": str(reason), "tone": "warn" if reason == "stopped" else "good"}


def unit(record: RunRecord) -> str:
    """What the loss is a mean over."""
    return "pair" if _part(record, "objective").get("name") == "dpo" else "target token"


def evaluations(record: RunRecord) -> list[Event]:
    """Held-out evaluations with a finite loss, step 0 first."""
    return [e for e in record.by_step("evaluation") if _finite(e.get("loss"))]


def some_evaluations(record: RunRecord, comparison: dict[str, Any] | None, most: int = 9) -> list[Event]:
    """Evaluations for a table: about `most`, spread evenly, with the first, the last and the one that counts."""
    found = evaluations(record)
    if len(found) <= most:
        return found
    chosen = {round(i * (len(found) - 1) / (most - 1)) for i in range(most)}
    chosen |= {i for i, e in enumerate(found) if comparison and e["step"] == comparison["step"]}
    return [found[i] for i in sorted(chosen)]


def compare(record: RunRecord) -> dict[str, Any] | None:
    """Base against tuned on the held-out rows; None without both. `tuned` is what the artefact holds, or would if the
    run ended here."""
    found = evaluations(record)
    base = next((e["loss"] for e in found if e["step"] == 0), record.summary.get("base_loss"))
    after = [e for e in found if e["step"] > 0]
    if base is None or not _finite(base) or not after:
        return None
    best, last = min(after, key=lambda e: e["loss"]), after[-1]
    tuned = best if _part(record, "train").get("keep_best", True) else last
    if (step := record.summary.get("artefact_step")) is not None:  # not the best where that commit was lost
        if step not in (measured := {e["step"]: e for e in after}):
            return None
        tuned = measured[step]
    return {
        "base": base,
        "tuned": tuned["loss"],
        "last": last["loss"],
        "step": tuned["step"],
        "last_step": last["step"],
        "which": "best" if tuned is best else "last" if tuned is last else "artefact",
        "base_perplexity": _perplexity(base),
        "tuned_perplexity": _perplexity(tuned["loss"]),
        "last_perplexity": _perplexity(last["loss"]),
        "target_tokens": tuned.get("target_tokens"),
    }


def tiles(record: RunRecord, comparison: dict[str, Any] | None) -> list[dict[str, str]]:
    """The figures at the top: label, value, and a line below."""
    steps, start, summary = record.by_step("step"), record.last("start"), record.summary
    shown = []
    if comparison:
        ratio = comparison["tuned"] / comparison["base"] if comparison["base"] else math.nan
        shown.append(("Held-out loss", loss(comparison["tuned"]), f"base {loss(comparison['base'])}, × {ratio:.2f}"))
        if unit(record) == "target token":
            below = f"base {short(comparison['base_perplexity'])}"
            shown.append(("Perplexity", short(comparison["tuned_perplexity"]), below))
    if steps:
        total = start.get("steps")
        targets = sum(e.get("target_tokens") or 0 for e in steps)
        below = f"of {count(total)}" if total and total != steps[-1]["step"] else f"{short(targets)} target tokens"
        shown.append(("Steps", count(steps[-1]["step"]), below))
        seconds = summary.get("seconds") or sum(e.get("seconds") or 0.0 for e in steps)
        shown.append(("Time", duration(seconds), "in training steps"))
        speed = np.nanmedian(record.series("step", "target_tokens_per_second")[1])
        if np.isfinite(speed):
            shown.append(("Speed", short(speed), "target tokens/s, median"))
    trained, parameters = start.get("trainable_parameters"), start.get("parameters")
    if trained and parameters:
        shown.append(("Trained", short(trained), f"parameters, {share(trained / parameters)} of {short(parameters)}"))
    if summary.get("peak_memory_gib"):
        shown.append(("Peak memory", f"{summary['peak_memory_gib']:.2f} GiB", "of one worker"))
    return [{"label": label, "value": value, "below": below} for label, value, below in shown]


def data_section(record: RunRecord) -> dict[str, Any] | None:
    """Counts, sources and reasons; None where the prepared data are gone."""
    facts = record.facts
    if not facts:
        return None
    rows, tokens, targets = (facts.get(k) or {} for k in ("rows", "tokens", "target_tokens"))
    splits = [
        {"name": name, "rows": rows.get(key), "tokens": tokens.get(key), "targets": targets.get(key)}
        for name, key in (("Training", "train"), ("Held-out", "held_out"))
        if rows.get(key)
    ]
    reasons = sorted((facts.get("rejected_by_reason") or {}).items(), key=lambda item: (-item[1], item[0]))
    sources = [{**s, "path": redact(str(s.get("path", "")))} for s in facts.get("sources") or []]
    return {
        "splits": splits,
        "read": rows.get("read"),
        "rejected": rows.get("rejected") or 0,
        "truncated": rows.get("truncated") or 0,
        "sequences": rows.get("sequences") if facts.get("packing") == "corpus" else None,
        "reasons": reasons[:_SHOWN],
        "reasons_more": max(0, len(reasons) - _SHOWN),
        "sources": sources[:_SHOWN],
        "max_length": facts.get("max_length"),
        "packing": facts.get("packing"),
        "digest": str(facts.get("digest") or ""),
    }


def happened(record: RunRecord) -> list[dict[str, Any]]:
    """Warnings, skipped steps, stops and resumes, in order, each with the step after which it came. The badge has the
    end."""
    lines, at = [], 0
    for event in record.events:
        kind = event.get("kind")
        if isinstance(event.get("step"), int):
            at = event["step"]
        if kind == "warning":
            lines.append({"step": at, "kind": "warning", "text": redact(str(event.get("text", "")))})
        elif kind == "skip":
            rows = ", ".join(map(str, (event.get("rows") or [])[:8]))
            text = f"{event.get('reason', 'not finite')}" + (f"; its rows: {rows}" if rows else "")
            lines.append({"step": at, "kind": "skipped step", "text": redact(text)})
        elif kind == "resume":
            lines.append({"step": at, "kind": "resumed", "text": f"went on after step {at:,}"})
        elif kind == "end" and event.get("reason") == "stopped":
            lines.append({"step": at, "kind": "stopped", "text": "asked to stop; everything was committed"})
    return lines


def findings_of(record: RunRecord) -> list[Finding]:
    """What the curves say went wrong; nothing about preferences, whose loss has another scale."""
    return diagnose(Curves.of(record)) if unit(record) == "target token" else []


# ------------------------------------------------------------------------------------------------------------ the plots


def draw(record: RunRecord, comparison: dict[str, Any] | None) -> dict[str, str]:
    """SVG by name; a plot without points is left out."""
    drawn = {}
    steps, losses = record.series("step", "loss")
    found = evaluations(record)
    if len(steps) or found:
        smoothed = plots.smooth(losses, window=max(5, len(losses) // 25))
        held_out = np.array([e["step"] for e in found]), np.array([e["loss"] for e in found])
        base = comparison["base"] if comparison else None
        best = comparison["step"] if comparison and comparison["which"] == "best" else None
        marks = [(finding.step, finding.kind) for finding in findings_of(record)]
        drawn["loss"] = plots.loss_curves((steps, losses), (steps, smoothed), held_out, base, best, unit(record), marks)
    if record.matrix.get("systems"):
        drawn["heat"] = sections.heat(record)
    clip = _part(record, "train").get("clip_norm")
    for name, key, label, axis in (
        ("rate", "learning_rate", "Learning rate against steps", "learning rate"),
        ("norm", "grad_norm", "Gradient norm before clipping against steps; a broken line at the limit", "norm"),
        ("speed", "target_tokens_per_second", "Target tokens a second; a broken line at the median", "tokens/s"),
        ("margin", "margin", "Mean margin between chosen and rejected rewards against steps", "nats"),
        ("accuracy", "accuracy", "Share of pairs whose chosen completion has the higher reward", "share"),
    ):
        series = record.series("step", key)
        if not np.isfinite(series[1]).any():
            continue
        level = {"norm": clip, "speed": float(np.nanmedian(series[1]))}.get(name)
        drawn[name] = plots.curve(name, label, series, axis, level=level)
    lengths = record.facts.get("length_histogram") or {}
    if lengths.get("counts"):
        drawn["lengths"] = plots.histogram(lengths["edges"], lengths["counts"], record.facts.get("max_length"))
    return drawn


def captions(record: RunRecord) -> dict[str, str]:
    """The line below a small plot, by the plot's name."""
    train = _part(record, "train")
    speed, clip = record.series("step", "target_tokens_per_second")[1], train.get("clip_norm")
    schedule = train.get("schedule") or {}
    median = f"{short(float(np.nanmedian(speed)))} a second" if np.isfinite(speed).any() else "–"
    return {
        "rate": f"{schedule.get('name', '')}, peak {train.get('learning_rate')}".lstrip(", "),
        "norm": f"Before clipping; broken line: the limit, {clip:g}" if clip else "Not clipped",
        "speed": f"Target tokens; broken line: the median, {median}",
        "margin": "Reward of the chosen completion less that of the rejected one",
        "accuracy": "Share of a step's pairs whose chosen completion has the higher reward",
    }


# ---------------------------------------------------------------------------------------------------------- the numbers


def count(value: Any) -> str:
    """1234567 → 1,234,567; – for nothing."""
    return f"{value:,.0f}" if _finite(value) else "–"


def loss(value: Any) -> str:
    return f"{value:.4f}" if _finite(value) else "–"


def short(value: Any) -> str:
    """Three digits and a unit: 1234567 → 1.23M."""
    if not _finite(value):
        return "–"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            scaled = value / (1e3 if unit == "k" else size)
            return f"{scaled:.{2 if abs(scaled) < 10 else 1 if abs(scaled) < 100 else 0}f}{unit}"
    return f"{value:,.0f}" if abs(value) >= 100 or float(value).is_integer() else f"{value:.2f}"


def signed(value: Any) -> str:
    return f"{value:+.3f}" if _finite(value) else "–"


def capitalize_first(text: str) -> str:
    return text[:1].upper() + text[1:]


def share(value: Any) -> str:
    return f"{100 * value:.3g}\N{NO-BREAK SPACE}%" if _finite(value) else "–"


def duration(seconds: Any) -> str:
    """92 → 1 min 32 s; 3.25 → 3.2 s."""
    if not _finite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _perplexity(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _finite(value: Any) -> bool:
    return isinstance(value, int | float | np.floating) and math.isfinite(value)


def _part(record: RunRecord, key: str) -> dict[str, Any]:
    value = record.run.get(key)
    return value if isinstance(value, dict) else {}
