"""What an evaluation leaves in a run's folder: `evaluation/result.json`, and the answers in `evaluation/answers.jsonl`.

The report reads them; `result.json` alone is what `ftray evaluate --json` prints.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ftray import __version__
from ftray.errors import ArtefactError, UserError
from ftray.evaluate.diagnosis import in_words
from ftray.evaluate.evaluation import LOSS, Outcome, Result, perplexity
from ftray.evaluate.matrix import Matrix, matrix_json
from ftray.evaluate.record import read_record
from ftray.evaluate.report import findings_of
from ftray.evaluate.scores.metric import Metric
from ftray.manifest import join, read_text, write_text
from ftray.redact import redact, redact_values

FOLDER = "evaluation"
RESULT = "result.json"
MATRIX = "matrix.json"
ANSWERS = "answers.jsonl"


def write_result(folder: str, found: dict[str, Any], rows: Sequence[dict[str, Any]] | None = None) -> str:
    """Write what `to_json` and `answer_rows` give into a run's folder (a path or fsspec URI); returns where. `rows`
    None: they are there already."""
    place = join(folder, FOLDER)
    if rows is not None:
        write_text(join(place, ANSWERS), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_text(join(place, RESULT), json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return place


def read_result(folder: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What `write_result` wrote. Raises UserError where there is none, ArtefactError where it is damaged."""
    place = join(folder, FOLDER)
    try:
        rows = [json.loads(line) for line in read_text(join(place, ANSWERS)).split("\n")[:-1]]
        return json.loads(read_text(join(place, RESULT))), rows
    except FileNotFoundError:
        raise UserError("no evaluation is kept here", where=place, hint="the same command without --kept") from None
    except ValueError as error:
        raise ArtefactError(f"the kept evaluation is damaged: {error}", where=place) from None


def write_matrix(folder: str, matrix: Matrix) -> str:
    """Write `evaluation/matrix.json` into a run's folder; returns where."""
    place = join(folder, FOLDER, MATRIX)
    write_text(place, json.dumps(matrix_json(matrix), indent=1, ensure_ascii=False) + "\n")
    return place


def to_json(result: Result) -> dict[str, Any]:
    """All but the answers, as plain values; not judged yet."""
    task = result.task
    return {
        "format": 1,
        "ftray": __version__,
        "task": task.name,
        "settings": redact_values(task.settings.model_dump(mode="json")),
        "sources": [redact(source.path) for source in task.sources],
        "questions": len(task.questions),
        "references": sum(len(question.references) for question in task.questions),
        "loss_rows": len(task.rows),
        "seed": task.seed,
        "metrics": [_metric(metric) for metric in result.metrics],
        "systems": [_system(outcome) for outcome in result.outcomes],
        "differences": [
            {"system": one, "than": other, "metrics": {name: _difference(value) for name, value in by_metric.items()}}
            for (one, other), by_metric in result.differences.items()
        ],
        "judged": [],
        "overlap": _overlap(result),
        "diagnosis": {
            outcome.system.name: in_words(findings_of(read_record(outcome.system.run_folder)))
            for outcome in result.outcomes
            if outcome.system.run_folder is not None
        },
        "seconds": round(result.seconds, 2),
    }


def _overlap(result: Result) -> dict[str, Any]:
    """What of the held-out rows is in the training rows, with the first of each kind."""
    found = result.overlap
    if found is None:
        return {"rows": 0, "lines": [f"not looked for: {result.task.train_missing or 'there are no training rows'}"]}
    shown = [
        {"held_out": redact(d.held_out.where), "train": redact(d.train.where), "likeness": _rounded(d.likeness)}
        for d in (*found.exact[:_SHOWN], *found.near[:_SHOWN])
    ]
    counts = {"rows": found.rows, "exact": len(found.exact), "near": len(found.near)}
    return counts | {"lines": [redact(line) for line in found.in_words()], "first": shown}


_SHOWN = 20
"""Duplicates of each kind that are listed."""


def answer_rows(result: Result) -> list[dict[str, Any]]:
    """One for each question: what was asked, the references, and each system's answer with its scores."""
    rows = []
    for i, question in enumerate(result.task.questions):
        answers = {}
        for outcome in result.outcomes:
            if not outcome.answers:
                continue
            answer = outcome.answers[i]
            scores = {m.name: _rounded(outcome.measured[m.name].by_row[i]) for m in result.metrics}
            answers[outcome.system.name] = {
                "answer": answer.text,
                "prompt_tokens": answer.prompt_tokens,
                "tokens": answer.tokens,
                "ended": answer.reason,
                "scores": scores,
            }
        asked = {"prompt": question.asked.prompt, "references": list(question.references)}
        rows.append({"number": i + 1, "where": redact(question.asked.where), **asked, "answers": answers})
    return rows


def _metric(metric: Metric) -> dict[str, Any]:
    return {"name": metric.name, "unit": metric.unit, "higher_is_better": metric.higher_is_better}


def _system(outcome: Outcome) -> dict[str, Any]:
    system, answers, loss = outcome.system, outcome.answers, outcome.loss
    scores = {
        name: {
            "score": _rounded(measured.score),
            "low": _rounded(around.low) if (around := outcome.intervals[name]) else None,
            "high": _rounded(around.high) if around else None,
        }
        for name, measured in outcome.measured.items()
        if name != LOSS
    }
    around = outcome.intervals.get(LOSS)
    return {
        "name": system.name,
        "kind": system.kind,
        "where": redact(system.where),
        "step": system.step,
        "method": system.run.method.name if system.run and system.kind != "base" else None,
        "examples": system.examples,
        "examples_shown": _mean(outcome.shown) if system.examples else 0,
        "loss": _rounded(loss),
        "loss_low": _rounded(around.low) if around else None,
        "loss_high": _rounded(around.high) if around else None,
        "perplexity": _rounded(perplexity(loss)) if loss is not None else None,
        "target_tokens": int(outcome.target_tokens.sum()) if outcome.target_tokens is not None else None,
        "rows_too_long": outcome.skipped_rows,
        "scores": scores,
        "prompt_tokens": _mean([answer.prompt_tokens for answer in answers]),
        "answer_tokens": _mean([answer.tokens for answer in answers]),
        "cut_off": sum(answer.reason == "length" for answer in answers),
        "seconds": round(outcome.seconds, 2),
    }


def _difference(value: Any) -> dict[str, float | None] | None:
    if value is None:
        return None
    fields = {"value": value.value, "low": value.low, "high": value.high, "p": value.p}
    return {name: _rounded(number) for name, number in fields.items()}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(float(value), 6)


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 2) if values else None


def decoding_text(decoding: dict[str, Any]) -> str:
    """`greedy, up to 128 tokens`."""
    if decoding["beams"] > 1:
        text = f"beam search with {decoding['beams']} beams, length penalty {decoding['length_penalty']:g}"
        if decoding["no_repeat_ngram"]:
            text += f", no {decoding['no_repeat_ngram']}-gram twice"
    elif decoding["temperature"] == 0:
        text = "greedy"
    else:
        text = f"sampled at temperature {decoding['temperature']:g}"
        text += f", top_p {decoding['top_p']:g}" if decoding["top_p"] < 1 else ""
        text += f", top_k {decoding['top_k']}" if decoding["top_k"] else ""
        text += f", seed {decoding['seed']}"
    return f"{text}, up to {decoding['max_tokens']:,} tokens"
