"""`ftray quickstart`: two tenants on the embedded base, what they gained, and their answers from one endpoint."""

from __future__ import annotations

import json
import os
import socket
import textwrap
import time
import urllib.request
from contextlib import closing
from pathlib import Path
from typing import Any

from ftray.cli.console import open_console
from ftray.cli.train import train_run
from ftray.cli.words import duration, facts, table
from ftray.config import load_run
from ftray.errors import EXIT_OK
from ftray.manifest import filesystem, is_local, join, write_text
from ftray.session import ray_session

QUESTIONS = {
    "cheese": "Do I serve cheese straight from the icebox?",
    "restaurant": "name[Ember and Oat], kind[bistro], mood[candlelit], near[the chapel ruins], dogs[yes]",
}
"""The tenants, and what each is asked in the end: one of its held-out rows."""
_PORT = 8000
_LONGEST = 60
"""Tokens of an answer."""


def quickstart_command(output: str, *, as_json: bool, verbose: bool) -> int:
    started = time.perf_counter()
    runs = {t: load_run(f"quickstart-{t}", [f"output={json.dumps(join(output, '{name}'))}"]) for t in QUESTIONS}
    results: dict[str, dict[str, Any]] = {}
    with open_console(as_json=as_json) as opening:
        from ftray.train.launch import local_cpus

        opening({"kind": "status", "text": "starting a local Ray with two workers"})
        with ray_session(verbose=verbose, cpus=max(local_cpus(run) for run in runs.values())):
            for tenant, run in runs.items():
                with open_console(run.logging.every, title=tenant, as_json=as_json) as console:
                    summary, report = train_run(run, console, verbose=verbose)
                results[tenant] = {**summary, "report": report}
        opening({"kind": "status", "text": "publishing both adapters and serving them from one base"})
        file = publish_both(output, {tenant: results[tenant]["artefact"] for tenant in QUESTIONS})
        answers = ask_both(file, verbose=verbose)
    seconds = time.perf_counter() - started
    if as_json:
        opening({"kind": "quickstart", "tenants": results, "answers": answers, "serve": file, "seconds": seconds})
    else:
        print(f"\n{quickstart_text(results)}\n\n{answers_text(answers)}\n\n{next_text(results, file)}")
        print(f"all of it took {duration(seconds)}")
    return EXIT_OK


def publish_both(output: str, artefacts: dict[str, str]) -> str:
    """The adapters into a registry beside the runs. Returns the path of a SERVE.yaml that serves it."""
    import yaml

    from ftray.registry.publish import publish
    from ftray.registry.ref import DEFAULT_TENANT

    registry = join(filesystem(output)[1] if is_local(output) else output, "registry")
    for name, artefact in artefacts.items():
        publish(artefact, registry, DEFAULT_TENANT, name)
    args = {"model": {"path": "embedded"}, "registry": registry, "engine": {"slots": 8, "context": 512}}
    content = {
        "http_options": {"host": "127.0.0.1", "port": _PORT},
        "applications": [{"name": "ftray", "import_path": "serve.app:build", "args": args}],
    }
    path = join(output if is_local(output) else os.getcwd(), "serve.yaml")
    write_text(path, "# The quickstart's endpoint.\n" + yaml.safe_dump(content, sort_keys=False))
    return path


def ask_both(file: str, *, verbose: bool) -> dict[str, dict[str, str]]:
    """What the base and each tenant's adapter answer to the tenant's question, from one endpoint over HTTP."""
    from serve.config import load_serve
    from serve.local import running, session

    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    loaded = load_serve(file, [f"http_options.port={port}"])
    with session(loaded, verbose=verbose, cpus=2), running(loaded, verbose=verbose) as address:
        return {
            tenant: {"question": question} | {model: _answer(address, model, question) for model in ("base", tenant)}
            for tenant, question in QUESTIONS.items()
        }


def _answer(address: str, model: str, question: str) -> str:
    from serve.local import direct

    messages = [{"role": "user", "content": question}]
    body = {"model": model, "messages": messages, "max_tokens": _LONGEST, "temperature": 0}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with direct.open(request, timeout=120) as reply:
        return json.load(reply)["choices"][0]["message"]["content"].strip()


def quickstart_text(results: dict[str, dict[str, Any]]) -> str:
    """One line a tenant: held-out loss (nats a target token) of base and tuned model, time, and where it lies."""
    rows = []
    for tenant, s in results.items():
        base, tuned = s["base_loss"], s["artefact_loss"]
        figures = (f"{base:.4f}", f"{tuned:.4f}", f"{tuned / base:.2f}", f"{s['seconds']:.0f}")
        rows.append((tenant, *figures, s["artefact"]))
    head = ("tenant", "base loss", "tuned loss", "ratio", "seconds", "artefact")
    return f"{table(head, rows, right=(1, 2, 3, 4))}\nloss: nats a target token, on held-out rows"


def answers_text(answers: dict[str, dict[str, str]]) -> str:
    """Question and answers of each tenant."""
    parts = []
    for tenant, found in answers.items():
        lines = {"asked": found["question"], "base": found["base"], tenant: found[tenant]}
        parts.append(facts([(name, textwrap.fill(text, 90)) for name, text in lines.items()], indent=0))
    return "\n\n".join(parts)


def next_text(results: dict[str, dict[str, Any]], file: str) -> str:
    """Where to go from here."""
    reports = [(f"report of {tenant}", s["report"]) for tenant, s in results.items() if s.get("report")]
    shown = os.path.relpath(file) if Path(file).is_relative_to(Path.cwd()) else file
    return facts(
        [
            *reports,
            ("ask them yourself", f"ftray serve {shown}   then open http://127.0.0.1:{_PORT}/"),
            ("rows of your own", "ftray recipes, ftray check RECIPE"),
        ],
        indent=0,
    )
