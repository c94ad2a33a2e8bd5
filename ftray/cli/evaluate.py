"""`ftray evaluate`: what runs, adapters, models and endpoints are worth, beside the bases that they began as."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from ftray.cli.console import open_console
from ftray.cli.words import count, duration, facts, json_text, table
from ftray.config import Evaluation, Run, load_run
from ftray.config.explain import explain
from ftray.errors import ConfigError, FtrayError, RunError

if TYPE_CHECKING:
    from ftray.evaluate.systems import System

_OVERRIDE = re.compile(r"[a-z_]+(?:\.[a-z_0-9]+)*=")


def evaluate_command(
    names: list[str],
    *,
    like: str | None,
    metrics: str | None,
    examples: str | None,
    judge: str | None,
    prices: str | None,
    kept: bool,
    to: str | None,
    registry: str | None,
    workers: int | None,
    as_json: bool,
    verbose: bool,
) -> None:
    overrides = [name for name in names if _OVERRIDE.match(name)]
    systems_named = [name for name in names if name not in overrides]
    if not systems_named:
        raise ConfigError("which system?", hint="name a run, a folder, an adapter of a registry or an endpoint")
    if metrics is not None:
        overrides.append(f"metrics=[{metrics}]")
    if examples is not None:
        overrides.append(f"examples=[{examples}]")

    from ftray.cli.export import quiet
    from ftray.cli.publish import VARIABLE
    from ftray.evaluate.evaluation import evaluate, task_of
    from ftray.evaluate.judging import judge_of
    from ftray.evaluate.results import answer_rows, to_json, write_result
    from ftray.evaluate.systems import resolved

    paid, written, failure = _prices(prices, judge), None, None
    with open_console(as_json=as_json) as console, nullcontext() if verbose else quiet():
        with resolved(systems_named, registry or os.environ.get(VARIABLE)) as systems:
            folder = to or next((s.run_folder for s in systems if s.run_folder is not None), None)
            as_run = load_run(like) if like else next((s.run for s in systems if s.run is not None), None)
            settings = settings_of(as_run, overrides) or Evaluation()
            endpoint = judge_of(judge, settings.metrics) if judge else None
            if kept:
                found, rows = _kept(folder, systems, settings)
            else:
                task = task_of(systems, as_run, settings)
                with _workers(workers, registry, verbose, console) as computing:
                    result = evaluate(systems, task, console, computing)
                found, rows = to_json(result), answer_rows(result)
        if folder is not None and not kept:
            console({"kind": "status", "text": "writing the result"})
            written = write_result(folder, found, rows)
        if endpoint is not None:
            failure = _judge(endpoint, found, rows, paid, console)
            written = write_result(folder, found) if folder is not None else None
    report = _report(folder, console) if folder is not None else None
    if as_json:
        print(json_text({"kind": "evaluation", **found, "written": written, "report": report}, ensure_ascii=False))
    else:
        print(f"\n{result_text(found)}\n")
        places = [("answers", written)] if written else []
        places += [("report", report)] if report else []
        print(facts(places, indent=0) if places else "nothing was kept; --to FOLDER keeps every answer and the result")
    if failure is not None:
        again = "the answers are kept: the same command with --kept judges them" if written else failure.hint
        raise RunError(f"the judge failed: {failure.what}", where=failure.where, hint=again)


def _judge(endpoint: Any, found: dict[str, Any], rows: list[dict[str, Any]], prices: Any, console: Any) -> Any:
    """Put what the judge says into `found`. Returns the error that ended it, if one did."""
    from ftray.evaluate.judging import verdicts

    said: list[dict[str, Any]] = []
    try:
        for each in verdicts(endpoint, found, rows, prices, console):
            said.append(each)
            found["judged"] = said
    except FtrayError as error:
        return error
    return None


def _kept(folder: str | None, systems: Sequence[System], settings: Evaluation) -> tuple[dict[str, Any], list[Any]]:
    """The result that this command would have, and its answers, as they are kept in `folder`. Raises ConfigError where
    others are."""
    from ftray.evaluate.results import read_result
    from ftray.redact import redact, redact_values

    if folder is None:
        raise ConfigError("where are the answers kept?", where="--kept", hint="name it with --to FOLDER")
    found, rows = read_result(folder)
    asked = [system["where"] for system in found["systems"] if system["kind"] != "base"]
    named = [redact(system.where) for system in systems]
    if asked != named or found["settings"] != redact_values(settings.model_dump(mode="json")):
        raise ConfigError(
            f"the answers that are kept are those of other systems or settings (of {', '.join(asked)})",
            where=folder,
            hint="the command that wrote them, with --kept",
        )
    return found, rows


def matrix_command(
    names: list[str],
    *,
    general: list[str],
    limit: int | None,
    to: str | None,
    registry: str | None,
    workers: int | None,
    as_json: bool,
    verbose: bool,
) -> None:
    from ftray.cli.export import quiet
    from ftray.cli.publish import VARIABLE
    from ftray.evaluate.matrix import columns_of, cross, general_sources, matrix_json
    from ftray.evaluate.results import write_matrix
    from ftray.evaluate.systems import resolved

    if odd := next((name for name in names if _OVERRIDE.match(name)), None):
        raise ConfigError(
            "a matrix asks each task as its own run says", where=odd, hint="leave it out; --limit is heeded"
        )
    with open_console(as_json=as_json) as console, nullcontext() if verbose else quiet():
        with resolved(names, registry or os.environ.get(VARIABLE)) as systems:
            columns = columns_of(systems, general_sources(general), limit)
            with _workers(workers, registry, verbose, console) as computing:
                matrix = cross(systems, columns, console, computing)
        folder = to or next((s.run_folder for s in systems if s.run_folder is not None), None)
        written = write_matrix(folder, matrix) if folder is not None else None
    found, report = matrix_json(matrix), _report(folder, console) if folder is not None else None
    if as_json:
        print(json_text({"kind": "matrix", **found, "written": written, "report": report}, ensure_ascii=False))
        return
    print(f"\n{matrix_text(found)}\n")
    places = [(name, where) for name, where in (("matrix", written), ("report", report)) if where]
    if places:
        print(facts(places, indent=0))


@contextmanager
def _workers(count: int | None, registry: str | None, verbose: bool, console: Any) -> Iterator[Any]:
    """Who computes: this process, or actors of Ray where a number was asked for or a cluster is at hand."""
    from ftray.cli.publish import VARIABLE
    from ftray.session import in_a_job, ray_session

    if count is None and not in_a_job():
        from ftray.evaluate.worker import Worker

        yield Worker
        return
    with ray_session(verbose=verbose):
        from ftray.evaluate.crew import Crew

        yield partial(Crew, count=count, registry=registry or os.environ.get(VARIABLE), on_event=console)


def _prices(text: str | None, judge: str | None) -> tuple[float, float] | None:
    """`0.15,0.60` as numbers. Raises ConfigError."""
    if text is None:
        return None
    if judge is None:
        raise ConfigError("a price without a judge", where="--judge-price", hint="name the judge with --judge")
    try:
        read, written = map(float, text.split(","))
    except ValueError:
        raise ConfigError(f"{text!r} is not two numbers", where="--judge-price", hint="as 0.15,0.60") from None
    return read, written


_WIDE = 8
"""Tasks that a terminal has columns for; of more, sums alone are shown."""


def matrix_text(found: dict[str, Any]) -> str:
    """Losses of every system on every task, with the change since the base; and scores, where tasks have metrics."""
    tasks = [task["name"] for task in found["tasks"]]
    lines = []
    if len(tasks) <= _WIDE:
        rows = [
            [system["name"], *(_change(loss, lost) for loss, lost in zip(losses, changes, strict=True))]
            for system, losses, changes in zip(found["systems"], found["losses"], found["forgetting"], strict=True)
        ]
        lines += [
            "loss, nats a target token (and less the base's)",
            table(["system", *tasks], rows, right=range(1, 99)),
        ]
        if any(task["metric"] for task in found["tasks"]):
            named = [f"{task['name']}: {task['metric']}" if task["metric"] else task["name"] for task in found["tasks"]]
            rows = [
                [system["name"], *("–" if score is None else f"{score:.4f}" for score in scores)]
                for system, scores in zip(found["systems"], found["scores"], strict=True)
            ]
            lines += ["", table(["system", *named], rows, right=range(1, 99))]
    else:
        rows = [_summary(found, i) for i in range(len(found["systems"]))]
        head = ["system", "own loss", "change", "others' loss", "change", "own score", "others' score"]
        lines.append(table(head, rows, right=range(1, 7)))
    lines.append(f"\n{len(found['systems'])} systems × {len(tasks)} tasks in {duration(found['seconds'])}")
    return "\n".join(lines)


def _change(loss: float | None, lost: float | None) -> str:
    return "–" if loss is None or lost is None else f"{loss:.3f} ({lost:+.3f})"


def _summary(found: dict[str, Any], i: int) -> list[str]:
    own = found["systems"][i]["own"]

    def mean(values: list[float | None], of_own: bool) -> str:
        known = [v for j, v in enumerate(values) if v is not None and (j == own) == of_own]
        return f"{sum(known) / len(known):.3f}" if known else "–"

    cells = [found["systems"][i]["name"]]
    for of_own in (True, False):
        cells += [mean(found["losses"][i], of_own), mean(found["forgetting"][i], of_own)]
    return [*cells, mean(found["scores"][i], True), mean(found["scores"][i], False)]


def settings_of(run: Run | None, overrides: list[str]) -> Evaluation | None:
    """The run's `evaluate` with the command line's keys; None where neither says anything. Raises ConfigError."""
    from pydantic import ValidationError

    from ftray.config.reading import override

    if not overrides:
        return run.evaluate if run else None
    raw: dict[str, Any] = run.evaluate.model_dump(mode="json") if run and run.evaluate else {}
    for item in overrides:
        override(raw, item)
    try:
        return Evaluation.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n  ".join(explain(error, Evaluation)), where="evaluate") from None


def _report(folder: str, console: Any) -> str | None:
    """Where the run's page lies, made anew; None where the folder is no run's."""
    from ftray.evaluate.report import write_report
    from ftray.manifest import filesystem, join

    fs, path = filesystem(join(folder, "run.yaml"))
    if not fs.exists(path):
        return None
    try:
        return str(write_report(folder))
    except Exception as error:  # noqa: BLE001 - whatever is wrong with the page, the evaluation is whole
        console({"kind": "warning", "text": f"no report: {type(error).__name__}: {error}"})
        return None


def result_text(found: dict[str, Any]) -> str:
    """The table: each system's loss, scores with the half of their 95 % interval, and what a request costs."""
    names = [metric["name"] for metric in found["metrics"]]
    head = ["system", "loss", "perplexity", *names]
    asked = bool(names)
    if asked:
        head += ["prompt", "answer"]
    rows = [_row(system, found, names, asked) for system in found["systems"]]
    lines = [table(head, rows, right=range(1, len(head))), ""]
    from ftray.evaluate.judging import judged_text
    from ftray.evaluate.results import decoding_text

    about = f"{count(found['questions'])} questions with {count(found['references'])} references"
    lines.append(f"{about}, losses of {count(found['loss_rows'])} rows; {duration(found['seconds'])}")
    if asked:
        lines.append(f"{decoding_text(found['settings']['decoding'])}; prompt and answer: mean tokens of a request")
        lines.append("±: half of a 95 % bootstrap interval; *: differs from the first line, p < 0.05 (paired test)")
    for system in found["systems"]:
        if system["examples"] and system["examples_shown"] < system["examples"] and asked:
            fitted = f"{system['examples_shown']:.1f} of {system['examples']}"
            lines.append(f"{system['name']}: {fitted} examples fitted into the base's positions, on average")
        if system["rows_too_long"]:
            lines.append(f"{system['name']}: {count(system['rows_too_long'])} rows are too long, their loss is not in")
        if system["cut_off"]:
            lines.append(f"{system['name']}: {count(system['cut_off'])} answers cut off at max_tokens")
    lines += [judged_text(judged) for judged in found["judged"]]
    lines += found["overlap"]["lines"]
    lines += [f"{name}: {line}" for name, told in found["diagnosis"].items() for line in told]
    return "\n".join(lines)


def _row(system: dict[str, Any], found: dict[str, Any], names: list[str], asked: bool) -> list[str]:
    marks = {
        name: difference["p"] < 0.05
        for pair in found["differences"]
        if pair["system"] == system["name"] and pair["than"] == found["systems"][0]["name"]
        for name, difference in pair["metrics"].items()
        if difference
    }

    def shown(name: str, score: float | None, low: float | None, high: float | None) -> str:
        if score is None:
            return "–"
        half = f" ±{(high - low) / 2:.3f}" if low is not None and high is not None else ""
        return f"{score:.4f}{half}{'*' if marks.get(name) else ' '}"

    cells = [system["name"], shown("loss", system["loss"], system["loss_low"], system["loss_high"])]
    cells.append(f"{system['perplexity']:,.2f}" if system["perplexity"] is not None else "–")
    for name in names:
        score = system["scores"].get(name)
        cells.append(shown(name, score["score"], score["low"], score["high"]) if score else "–")
    if asked:
        cells += [
            f"{system[key]:,.0f}" if system[key] is not None else "–" for key in ("prompt_tokens", "answer_tokens")
        ]
    return cells
