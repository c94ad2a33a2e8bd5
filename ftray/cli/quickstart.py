"""`ftray quickstart`: two tenants on the embedded base, and what they gained."""

from __future__ import annotations

import json
import time
from typing import Any

from ftray.cli.console import open_console
from ftray.cli.train import train_run
from ftray.cli.words import duration, table
from ftray.config import load_run
from ftray.errors import EXIT_OK
from ftray.manifest import join
from ftray.session import ray_session

TENANTS = ("cheese", "restaurant")


def quickstart_command(output: str, *, as_json: bool, verbose: bool) -> int:
    started = time.perf_counter()
    runs = {t: load_run(f"quickstart-{t}", [f"output={json.dumps(join(output, '{name}'))}"]) for t in TENANTS}
    results: dict[str, dict[str, Any]] = {}
    with open_console(as_json=as_json) as opening:
        from ftray.train.launch import local_cpus

        opening({"kind": "status", "text": "starting a local Ray with two workers"})
        with ray_session(verbose=verbose, cpus=max(local_cpus(run) for run in runs.values())):
            for tenant, run in runs.items():
                with open_console(run.logging.every, title=tenant, as_json=as_json) as console:
                    summary, report = train_run(run, console, verbose=verbose)
                results[tenant] = {**summary, "report": report}
    if as_json:
        opening({"kind": "quickstart", "tenants": results, "seconds": time.perf_counter() - started})
    else:
        print(f"\n{quickstart_text(results)}\nall of it took {duration(time.perf_counter() - started)}")
    return EXIT_OK


def quickstart_text(results: dict[str, dict[str, Any]]) -> str:
    """One line a tenant: held-out loss (nats a target token) of base and tuned model, time, and where it lies."""
    rows = []
    for tenant, s in results.items():
        base, tuned = s["base_loss"], _tuned(s)
        figures = (f"{base:.4f}", f"{tuned:.4f}", f"{tuned / base:.2f}", f"{s['seconds']:.0f}")
        rows.append((tenant, *figures, s["artefact"]))
    head = ("tenant", "base loss", "tuned loss", "ratio", "seconds", "artefact")
    reports = [f"report of {tenant}: {s['report']}" for tenant, s in results.items() if s.get("report")]
    note = "loss: nats a target token, on held-out rows"
    nexts = "next: open a report; then `ftray recipes` and `ftray check RECIPE` for rows and a base of your own"
    return "\n".join([table(head, rows, right=(1, 2, 3, 4)), note, "", *reports, nexts])


def _tuned(summary: dict[str, Any]) -> float:
    best = summary.get("best_loss")
    return best if best is not None else summary["final_loss"]
