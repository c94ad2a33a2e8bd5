"""Batch generation: a file of prompts, any mix of adapters, one answer a row in the rows' order.

    OUT.parts/part-000007.jsonl     the answers of one part, written whole
    OUT.parts/part-000007.json      its note, written after it: now it counts
    OUT                             all parts in order, once they are all there: JSON lines, or Parquet by its name
    OUT.manifest.json               what was asked of whom, counts, SHA-256 of OUT; written last

Ray Data hands the missing parts to actors that each hold one base. Whatever is killed, the same call does what is
missing and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from ftray import errors
from ftray.errors import ArtefactError, ConfigError, RunError
from ftray.evaluate.generation import Asking, Generation, Part, plan
from ftray.evaluate.generator import Generator, part_names, use_cores
from ftray.evaluate.output import Output
from ftray.evaluate.places import WAIT_SECONDS, OnEvent, places, share
from ftray.manifest import filesystem, join, read_text, write_text
from ftray.storage import make_folder

Workers = Callable[[Generation, Sequence[Part], OnEvent], Iterable[dict[str, Any]]]
"""Does parts, in any order; gives what `Generator.do` returns."""


def generate(asking: Asking, on_event: OnEvent, workers: Workers | None = None) -> dict[str, Any]:
    """Answer every row, or go on with it. Returns the manifest's facts. Needs a Ray session, unless `workers` needs
    none. Raises DataError, ConfigError, ModelError, and RunError for what is no row's own fault."""
    began = time.monotonic()
    on_event({"kind": "status", "text": "looking at the prompts"})
    generation = plan(asking)
    if (facts := _finished(generation)) is not None:
        on_event({"kind": "status", "text": "all rows were answered before"})
        return facts
    _prepare_folder(generation)
    done = {part.number: note for part in generation.parts if (note := _note(generation, part)) is not None}
    missing = [part for part in generation.parts if part.number not in done]
    rows = sum(note["rows"] for note in done.values())
    if done:
        on_event({"kind": "status", "text": f"going on: {rows:,} of {generation.rows:,} rows were answered before"})
    for name, why in sorted(generation.refused.items()):
        on_event({"kind": "warning", "text": f"{generation.rows_by_adapter[name]:,} rows get no answer: {why}"})
    if missing:
        on_event({"kind": "status", "text": _begins(generation)})
    for result in (workers or on_ray)(generation, missing, on_event):
        if "error" in result:
            kind, what, where, hint = result["error"]
            raise getattr(errors, kind)(what, where=where, hint=hint)
        done[result["number"]] = result
        rows += result["rows"]
        on_event({"kind": "progress", "what": "generate", "done": rows, "total": generation.rows, "unit": "rows"})
    return _conclude(generation, done, time.monotonic() - began)


def _begins(generation: Generation) -> str:
    asked = len(generation.adapters)
    base = generation.base
    how = "in NF4" if base.quantized else f"in {base.precision}"
    return f"generating with {base.model.path} {how} and {asked:,} {'adapter' if asked == 1 else 'adapters'}"


# ---------------------------------------------------------------------------------------------------------------- work


def here(generation: Generation, parts: Sequence[Part], on_event: OnEvent) -> Iterator[dict[str, Any]]:
    """Do the parts in this process, without Ray."""
    generator = Generator(generation)
    try:
        for part in parts:
            yield generator.do(part)
    finally:
        generator.close()


def on_ray(generation: Generation, parts: Sequence[Part], on_event: OnEvent) -> Iterator[dict[str, Any]]:
    """Do the parts on Ray Data's actors, one base in each, as many as have a place. An actor that dies is started
    again, and does its part again."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext
    from ray.exceptions import RayError

    if not parts:
        return
    count, resources = share(generation.asking.workers, len(parts))
    count = places(count, resources, on_event)
    each: dict[str, Any] = dict(resources)
    context = DataContext.get_current()
    before = context.enable_progress_bars, context.wait_for_min_actors_s
    context.enable_progress_bars, context.wait_for_min_actors_s = False, int(WAIT_SECONDS)
    try:
        items = [{"part": json.dumps(asdict(part))} for part in parts]
        answers = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            _Actor,
            fn_constructor_args=(generation, resources["num_cpus"]),
            batch_size=1,
            compute=ActorPoolStrategy(size=count),
            **each,
        )
        for row in answers.iter_rows():
            yield json.loads(row["result"])
    except RayError as error:
        raise RunError(
            f"a worker failed: {' '.join(str(error).split())[-300:]}", hint="the same command goes on"
        ) from error
    finally:
        context.enable_progress_bars, context.wait_for_min_actors_s = before


class _Actor:
    def __init__(self, generation: Generation, cpus: int) -> None:
        use_cores(cpus)
        self._generator = Generator(generation)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        parts = [Part(**json.loads(text)) for text in batch["part"]]
        return {"result": [json.dumps(self._generator.do(part)) for part in parts]}


# ------------------------------------------------------------------------------------------------------- what is there


def _finished(generation: Generation) -> dict[str, Any] | None:
    """The facts of a finished generation; None where there is none. Raises ConfigError where OUT is something else's,
    unless it may be overwritten."""
    out, overwrite = generation.asking.out, generation.asking.overwrite
    fs, path = filesystem(out)
    facts = _read(generation.manifest)
    parts, folder = filesystem(generation.folder)
    if not fs.exists(path):
        return None
    if facts is not None and facts.get("digest") == generation.digest and fs.size(path) == facts["size"]:
        if parts.exists(folder):  # it was killed after its last word
            parts.rm(folder, recursive=True)
        return facts
    begun = _read(join(generation.folder, "generation.json"))
    if overwrite or (begun is not None and begun.get("digest") == generation.digest):
        return None
    what = "this file holds answers to other prompts or settings" if facts else "this file is there already"
    raise ConfigError(what, where=out, hint="give another --out, or --overwrite")


def _prepare_folder(generation: Generation) -> None:
    """The folder of the parts, for this generation alone."""
    fs, path = filesystem(generation.folder)
    job = join(generation.folder, "generation.json")
    found = _read(job)
    if found is not None and found.get("digest") != generation.digest:
        if not generation.asking.overwrite:
            raise ConfigError(
                "these parts belong to a generation with other prompts, adapters or settings",
                where=generation.folder,
                hint="repeat that command to finish it, or give another --out, or --overwrite",
            )
        fs.rm(path, recursive=True)
    make_folder(fs, path)
    write_text(job, json.dumps({"digest": generation.digest}) + "\n")


def _note(generation: Generation, part: Part) -> dict[str, Any] | None:
    """What a finished part's note says; None where the part is not all there."""
    rows, note = part_names(generation.folder, part.number)
    found = _read(note)
    fs, path = filesystem(rows)
    if found is None or found.get("rows") != part.rows or not fs.exists(path) or fs.size(path) != found["size"]:
        return None
    return found


def _read(uri: str) -> dict[str, Any] | None:
    try:
        found = json.loads(read_text(uri))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


# ------------------------------------------------------------------------------------------------------------- the end


def _conclude(generation: Generation, notes: dict[int, dict[str, Any]], seconds: float) -> dict[str, Any]:
    sink = Output(generation.asking.out)
    try:
        for part in generation.parts:
            sink.write(_verified(generation, notes[part.number]))
        written = sink.finish()
    except OSError as error:
        raise RunError(f"the answers cannot be written: {error}", where=generation.asking.out) from None
    finally:
        sink.abort()
    facts = _facts(generation, list(notes.values()), seconds) | written
    write_text(generation.manifest, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    fs, path = filesystem(generation.folder)
    fs.rm(path, recursive=True)
    return facts


def _verified(generation: Generation, note: dict[str, Any]) -> bytes:
    rows, name = part_names(generation.folder, note["number"])
    fs, path = filesystem(rows)
    with fs.open(path, "rb") as file:
        content = file.read()
    if hashlib.sha256(content).hexdigest() != note["sha256"]:
        fs.rm(filesystem(name)[1])
        raise ArtefactError(
            "this part has other content than its note says (SHA-256 differs)",
            where=rows,
            hint="the same command does it again",
        )
    return content


def _facts(generation: Generation, notes: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    failed: Counter[str] = Counter()
    for note in notes:
        failed.update(note["failed"])
    base = generation.base
    return {
        "digest": generation.digest,
        "out": generation.asking.out,
        "prompts": generation.asking.source.path,
        "base": {"path": base.model.path, "revision": base.model.revision, "nf4": base.quantized}
        | {"precision": base.precision},
        "decoding": generation.asking.decoding.model_dump(mode="json", exclude={"beams", "length_penalty"}),
        "adapters": {
            name: {"digest": placed.digest, "rows": generation.rows_by_adapter[name]}
            for name, placed in generation.adapters.items()
        },
        "base_rows": generation.rows_by_adapter.get("", 0),
        "rows": generation.rows,
        "failed": sum(failed.values()),
        "failed_by_reason": dict(failed.most_common()),
        **{key: sum(note[key] for note in notes) for key in ("prompt_tokens", "tokens", "cut_off")},
        "seconds": round(seconds, 1),
    }
