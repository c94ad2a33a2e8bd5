"""`ftray create`: rows to learn from, made by a teacher model."""

from __future__ import annotations

import json
from typing import Any

from ftray.cli.console import open_console
from ftray.cli.signals import stop_on_signal
from ftray.cli.words import count, duration, facts, json_text, percent, some
from ftray.config.creation import Creation, Instructions, load_creation
from ftray.errors import RunError


def create_command(recipe: str, overrides: list[str], *, dry: bool, as_json: bool) -> None:
    creation = load_creation(recipe, overrides)
    if dry:
        print(first_call(creation, as_json))
        return

    from ftray.evaluate.create import create

    wait = "waiting for the calls that are on their way"
    with (
        open_console(as_json=as_json) as console,
        stop_on_signal(lambda text: console({"kind": "status", "text": text}), lambda: wait) as stop,
    ):
        found, why = create(creation, console, stop.is_set)
    if as_json:
        print(json_text({"kind": "creation", **found, "ended": why}, ensure_ascii=False))
    else:
        print(f"\n{summary(found)}\n\n{to_train(creation, found)}")
    if why is not None:
        wanted = "" if creation.rows is None else f" of {creation.rows:,}"
        raise RunError(
            f"{found['rows']:,}{wanted} rows are made: {why}",
            where=found["folder"],
            hint="the rows there are kept; change the key that is named or the prompts, and the same command goes on",
        )


def first_call(creation: Creation, as_json: bool) -> str:
    """What the teacher would be asked first."""
    from ftray.evaluate.calls import body_of, calls_of

    calls = calls_of(creation)
    body = body_of(calls.call(0), creation.teacher, calls)
    if as_json:
        return json.dumps(body, ensure_ascii=False)
    turns = "\n\n".join(f"[{turn['role']}]\n{turn['content']}" for turn in body.pop("messages"))
    if isinstance(creation.ask, Instructions) and creation.rows is not None:
        least = -(-creation.rows // creation.ask.rows_per_call)
        about = f"{some(creation.rows, 'row')}: {some(least, 'call')} if every row is kept"
    else:
        about = some(len(calls), "call")
    settings = [(name, json.dumps(value)) for name, value in body.items()]
    return f"{turns}\n\n{facts([('asks', creation.teacher.url), *settings, ('calls', about)], indent=0)}"


def summary(found: dict[str, Any]) -> str:
    """Counts and cost."""
    calls, tokens = found["calls"], found["tokens"]
    kept = found["rows"] + found["surplus"]
    asked = [some(calls["answered"], "answer")]
    asked += [some(calls["failed"], "call failed", "calls failed")] if calls["failed"] else []
    asked += [some(calls["lost"], "try without an answer", "tries without an answer")] if calls["lost"] else []
    paid = f"{count(tokens['prompt'])} read, {count(tokens['answer'])} written"
    paid += f", at most {count(tokens['lost_at_most'])} lost" if tokens["lost_at_most"] else ""
    of = f" of {count(found['offered'])} offered ({percent(kept / found['offered'])})" if found["offered"] else ""
    pairs = [
        ("rows", f"{count(found['rows'])} kept{of}"),
        *([("", f"{some(found['surplus'], 'good row')} beyond what was wanted")] if found["surplus"] else []),
        ("calls", ", ".join(asked)),
        ("tokens", paid),
        ("time", duration(found["seconds"])),
    ]
    if found["refused"]:
        width = max(len(f"{number:,}") for number in found["refused"].values())
        pairs.append(("refused", "\n".join(f"{n:>{width},}  {reason}" for reason, n in found["refused"].items())))
    return facts([*pairs, ("folder", found["folder"])], indent=0)


def to_train(creation: Creation, found: dict[str, Any]) -> str:
    """The lines of a run file that learn from these rows."""
    if not isinstance(creation.ask, Instructions):
        form = "prompt_completion, chat: true"
    elif creation.ask.columns == ["instruction", "output"]:
        form = "instruction, input: null, chat: true"
    else:
        *asked, answer = creation.ask.columns
        prompt = "\\n".join(f"{{{column}}}" for column in asked)
        form = f'prompt_completion, prompt: "{prompt}", completion: "{{{answer}}}", chat: true'
    return f"data:\n  sources:\n    - {{path: {found['folder']}/rows.jsonl, format: {{name: {form}}}}}"
