"""`ftray train`: a run with its display, its summary and what to do next."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from ftray.cli.console import PlainConsole, open_console, open_consoles
from ftray.cli.signals import stop_on_signal
from ftray.cli.words import count, duration, facts, percent, size, some
from ftray.config import Run
from ftray.errors import EXIT_OK, FtrayError, RunStopped
from ftray.manifest import filesystem, join
from ftray.session import ray_session


def train_command(run: Run, *, as_json: bool, verbose: bool) -> int:
    with open_console(run.logging.every, as_json=as_json) as console:
        from ftray.train.launch import local_cpus, preflight

        preflight(run)
        console({"kind": "status", "text": "starting Ray"})
        with ray_session(verbose=verbose, cpus=local_cpus(run)):
            summary, report = train_run(run, console, verbose=verbose)
    if as_json:
        console({"kind": "summary", **summary, "report": report})
    else:
        print(f"\n{summary_text(summary, report)}")
    return EXIT_OK


class _Begun:
    """Whether training has begun, from the events that pass."""

    def __init__(self) -> None:
        self._begun = False

    def __call__(self, event: dict[str, Any]) -> dict[str, Any]:
        self._begun |= event["kind"] == "start"
        return event

    def stopping(self) -> str:
        """What a wish to stop comes to."""
        return "stopping after this step, with a commit" if self._begun else "stopping; training has not begun yet"


def train_many(runs: list[Run], *, as_json: bool, verbose: bool) -> int:
    """Several runs on one base. The exit code is that of the first one that did not finish."""
    from ftray.tune.together import check_together

    check_together(runs)
    with contextlib.ExitStack() as opened:
        consoles = {
            run.name: opened.enter_context(console)
            for run, console in zip(
                runs, open_consoles([run.name for run in runs], runs[0].logging.every, as_json), strict=True
            )
        }
        first = consoles[runs[0].name]
        from ftray.tune.together import train_together

        first({"kind": "status", "text": "starting Ray"})
        seen = _Begun()

        def say(text: str) -> None:
            first({"kind": "status", "text": text})

        with ray_session(verbose=verbose), stop_on_signal(say, seen.stopping) as stop:
            outcomes = train_together(runs, on_event=lambda name, event: consoles[name](seen(event)), stop=stop)
        reports = {run.name: _report(run, consoles[run.name]) for run in runs if _has_metrics(run)}
    errors: list[FtrayError] = []
    for run in runs:
        outcome = outcomes[run.name]
        if isinstance(outcome, FtrayError):
            errors.append(outcome)
            print(f"\n[{run.name}] {outcome}", file=sys.stderr)
        elif as_json:
            consoles[run.name]({"kind": "summary", **outcome, "report": reports.get(run.name)})
        else:
            print(f"\n[{run.name}]\n{summary_text(outcome, reports.get(run.name))}")
        if not isinstance(outcome, FtrayError) and outcome["reason"] == "stopped":
            errors.append(RunStopped(f"stopped at step {outcome['steps']:,}", where=run.folder))
    return errors[0].exit_code if errors else EXIT_OK


def _has_metrics(run: Run) -> bool:
    fs, metrics = filesystem(join(run.folder, "metrics.jsonl"))
    return fs.exists(metrics)


def train_run(run: Run, console: PlainConsole, *, verbose: bool) -> tuple[dict[str, Any], str | None]:
    """(summary, where the report lies) of a run, inside a session with Ray. A report that cannot be made is a warning:
    the run is whole without it."""
    from ftray.train.launch import train

    def say(text: str) -> None:
        console({"kind": "status", "text": text})

    seen = _Begun()
    with stop_on_signal(say, seen.stopping) as stop:
        try:
            summary = train(run, on_event=lambda event: console(seen(event)), stop=stop, verbose=verbose)
        except RunStopped:
            if _has_metrics(run):
                _report(run, console)
            raise
    console.close()
    return summary, _report(run, console)


def _report(run: Run, console: PlainConsole) -> str | None:
    from ftray.evaluate.report import write_report

    try:
        return str(write_report(run.folder))
    except Exception as error:  # noqa: BLE001 - whatever is wrong with the page, the run is whole
        console({"kind": "warning", "text": f"no report: {type(error).__name__}: {error}"})
        return None


def summary_text(summary: dict[str, Any], report: str | None) -> str:
    """The table at the end of a run."""
    s = summary
    pairs = [("steps", f"{count(s['steps'])} in {duration(s['seconds'])} ({s['reason']})")]
    if s.get("resumed_from"):
        pairs.append(("resumed", f"after step {count(s['resumed_from'])}"))
    if s.get("base_loss") is not None:
        pairs.append(("held-out loss", held_out_text(s)))
    trained, whole = s["trainable_parameters"], s["parameters"]
    share = percent(trained / whole)
    pairs.append(("trained", f"{count(trained)} of {count(whole)} parameters, {share} ({s['method']})"))
    speed = count(s["target_tokens_per_second"])
    pairs.append(("speed", f"{speed} target tokens/s on {some(s['workers'], 'worker')}"))
    if s.get("skipped_steps"):
        pairs.append(("skipped", f"{count(s['skipped_steps'])} steps whose loss or gradient was not finite"))
    if s.get("peak_memory_gib"):
        text = f"{s['peak_memory_gib']:.2f} GiB at most in a worker"
        if held := max((sum(worker.values()) for worker in s.get("state_memory", [])), default=0):
            text += f"; {size(held)} of weights, gradients and optimizer"
        pairs.append(("memory", text))
    pairs += [("artefact", s["artefact"]), *([("report", report)] if report else [])]
    loader = {"full": "transformers", "freeze": "transformers", "bottleneck": "ftray.model.bottleneck"}
    with_ = loader.get(s["method"], "PEFT")
    nexts = f"next: open the report; load the artefact with {with_}; `ftray check {s['folder']}` shows the run again"
    return f"{facts(pairs, indent=0)}\n\n{nexts}"


def held_out_text(s: dict[str, Any]) -> str:
    """`4.4012 → 0.9500, 21.6 % of the base's, at step 250`: what the artefact has."""
    base, tuned = s["base_loss"], s.get("artefact_loss")
    if tuned is None or not base:
        return f"{base:.4f} at the start"
    return f"{base:.4f} → {tuned:.4f}, {percent(tuned / base)} of the base's, at step {count(s['artefact_step'])}"
