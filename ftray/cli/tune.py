"""`ftray tune`: a search with its display, its best run and what to do next."""

from __future__ import annotations

from typing import Any

from ftray.cli.console import PlainConsole
from ftray.cli.search_console import open_search_console, parameters_text
from ftray.cli.signals import stop_on_signal
from ftray.cli.words import count, duration, facts, some, table
from ftray.config.search import Search
from ftray.errors import EXIT_OK, RunStopped
from ftray.manifest import filesystem, join
from ftray.session import ray_session


def tune_command(spec: Search, *, as_json: bool, verbose: bool) -> int:
    from ftray.tune.space import draw, how_many

    how_many(spec)  # a grid too large, and keys that no run has, are told before anything starts
    spec.run_of(draw(spec, 0), 0)
    with open_search_console(as_json=as_json) as console:
        console({"kind": "status", "text": "starting Ray"})
        from ftray.tune.driver import local_cpus

        with ray_session(verbose=verbose, cpus=local_cpus(spec)):
            found, report = _search(spec, console, verbose=verbose)
        if as_json:
            console({"kind": "outcome", **found, "report": report})
    if not as_json:
        print(f"\n{outcome_text(found, report)}")
    return EXIT_OK


def _search(spec: Search, console: PlainConsole, *, verbose: bool) -> tuple[dict[str, Any], str | None]:
    from ftray.tune.driver import search

    stopping = "stopping: all trials commit and leave; once more leaves at once"

    def say(text: str) -> None:
        console({"kind": "status", "text": text})

    with stop_on_signal(lambda _: say(stopping)) as stop:
        try:
            found = search(spec, on_event=console, stop=stop, verbose=verbose)
        except RunStopped:
            console.close()
            _report(spec, console)
            raise
    console.close()
    return found, _report(spec, console, found["best"])


def _report(spec: Search, console: PlainConsole, best: dict[str, Any] | None = None) -> str | None:
    """Where the search's page is; the best trial gets its own too."""
    from ftray.evaluate.report import write_report
    from ftray.evaluate.search_report import write_search_report

    fs, outcome = filesystem(join(spec.folder, "outcome.json"))
    if not fs.exists(outcome):
        return None
    try:
        if best:
            write_report(best["folder"])
        return write_search_report(spec.folder)
    except Exception as error:  # noqa: BLE001 - whatever is wrong with the page, the search is whole
        console({"kind": "warning", "text": f"no report: {type(error).__name__}: {error}"})
        return None


def outcome_text(found: dict[str, Any], report: str | None) -> str:
    """The table at the end of a search."""
    named = [(found["finished"], "finished"), (found["stopped"], "stopped early"), (found["aside"], "set aside")]
    named.append((found["open"], "unfinished"))
    states = ", ".join(f"{count(n)} {word}" for n, word in named if n)
    spent = f"{count(found['steps'])} steps in {duration(found['seconds'])}"
    pairs = [("trials", f"{count(found['trials'])}: {states}"), ("spent", spent)]
    if found["reason"] == "budget":
        pairs.append(("ended", "the budget is spent; with a larger one the same command goes on"))
    best = found["best"]
    values = ", ".join(f"{name} {value:.4f}" for name, value in best["values"].items() if value is not None)
    pairs.append(("best", f"trial {best['index']:04d}: {values} at step {count(best['step'])}"))
    pairs.append(("with", parameters_text(best["parameters"])))
    pairs += [("run file", found["best_file"])]
    if best["artefact"]:
        at = best.get("artefact_step")
        pairs.append(("artefact", best["artefact"] + ("" if at in (None, best["step"]) else f", of step {count(at)}")))
    if report:
        pairs.append(("report", report))
    text = facts(pairs, indent=0)
    if len(found["front"]) > 1:
        text += f"\n\n{front_text(found)}"
    then = "ftray publish" if best["artefact"] else "ftray train"
    what = f"{best['folder']} --as NAME" if best["artefact"] else found["best_file"]
    return f"{text}\n\nnext: open the report; {then} {what}"


def front_text(found: dict[str, Any]) -> str:
    """Trade-offs: trials that none other beats by every metric."""
    names = found["metric"]
    rows = [
        (f"{t['index']:04d}", *(f"{t['values'][name]:.4f}" for name in names), parameters_text(t["parameters"]))
        for t in found["front"]
    ]
    head = ("trial", *names, "parameters")
    lead = f"{some(len(rows), 'trade-off')}: none is better by one metric and not worse by another"
    return f"{lead}\n{table(head, rows, right=tuple(range(1, len(names) + 1)))}"
