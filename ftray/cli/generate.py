"""`ftray generate`: an answer to every row of a file, by whichever adapters the rows name."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from ftray.cli.console import open_console
from ftray.cli.words import count, duration, facts, json_text, some
from ftray.config import Decoding, Source
from ftray.config.explain import explain
from ftray.errors import ConfigError
from ftray.session import ray_session

if TYPE_CHECKING:
    from ftray.evaluate.generation import Generation, Part
    from ftray.evaluate.places import OnEvent


def generate_command(
    prompts: str,
    out: str,
    *,
    prompt: str | None,
    messages: str | None,
    chat: bool,
    decoding: dict[str, Any],
    limit: int | None,
    registry: str | None,
    as_json: bool,
    verbose: bool,
    **asking: Any,
) -> None:
    if messages and (prompt or chat):
        raise ConfigError("--messages COLUMN holds whole conversations: leave out --prompt and --chat")
    format = (
        {"name": "messages", "column": messages}
        if messages
        else {"name": "prompt_completion", "prompt": prompt or "{prompt}", "completion": "", "chat": chat}
    )
    source = _model(Source, {"path": prompts, "format": format, "limit": limit}, "--prompt")
    sampling = _model(Decoding, {key: value for key, value in decoding.items() if value is not None}, "decoding")

    from ftray.cli.export import quiet
    from ftray.cli.publish import VARIABLE
    from ftray.evaluate.generate import generate, on_ray
    from ftray.evaluate.generation import Asking

    def on_own_ray(generation: Generation, parts: Sequence[Part], on_event: OnEvent) -> Iterator[dict[str, Any]]:
        """Ray is started once it is known that there is something to do."""
        if parts:
            with ray_session(verbose=verbose):
                yield from on_ray(generation, parts, on_event)

    if not verbose:  # a line of Ray's core about each actor that may be started again
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    wanted = Asking(source, out, sampling, registry=registry or os.environ.get(VARIABLE), **asking)
    with open_console(as_json=as_json) as console, nullcontext() if verbose else quiet():
        found = generate(wanted, console, on_own_ray)
    if as_json:
        print(json_text({"kind": "generation", **found}, ensure_ascii=False))
    else:
        print(f"\n{summary(found)}")


def _model(kind: Any, values: dict[str, Any], where: str) -> Any:
    from pydantic import ValidationError

    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n  ".join(explain(error, kind)), where=where) from None


def summary(found: dict[str, Any]) -> str:
    """The facts of a finished generation."""
    asked = some(len(found["adapters"]), "adapter")
    base = f", and {some(found['base_rows'], 'row')} of the base" if found["base_rows"] else ""
    pairs = [
        ("answers", found["out"]),
        ("rows", f"{count(found['rows'])} of {asked}{base}"),
        ("tokens", f"{count(found['prompt_tokens'])} read, {count(found['tokens'])} written"),
        ("time", duration(found["seconds"])),
    ]
    if found["cut_off"]:
        pairs.append(("cut off", f"{some(found['cut_off'], 'answer')} at the most tokens"))
    if found["failed"]:
        reasons = [f"{number:,} × {reason}" for reason, number in found["failed_by_reason"].items()]
        pairs.append(("failed", "\n".join([f"{some(found['failed'], 'row')}, each with its error:", *reasons[:8]])))
    return facts(pairs, indent=0)
