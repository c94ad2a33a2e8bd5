"""Prepare a run's data with Ray Data: fragments in parallel, each read, tokenized and written by one task."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ftray import config
from ftray.data.collect import Preparation, check_rejected, copy_rejected
from ftray.data.encode import Vocabulary
from ftray.data.fragments import Fragment
from ftray.data.sources import File, describe_sources, files_of, fragments_of
from ftray.data.tokenizer import chat_template_hash, load_tokenizer
from ftray.data.work import Job, run_fragment
from ftray.errors import FtrayError
from ftray.manifest import digest_of, filesystem, is_local, join, read_manifest, write_text
from ftray.storage import make_folder, reached

FORMAT = 1
"""Version of what a prepared folder holds; part of its digest."""

OnEvent = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Plan:
    """What is to be prepared, and where it will be."""

    run: config.Run
    vocabulary: Vocabulary
    files: dict[str, list[list[File]]]
    """By split and source."""
    template_hash: str | None
    digest: str
    folder: str


def prepare(run: config.Run, on_event: OnEvent) -> str:
    """Prepare the run's data, or find it prepared. Returns the folder or URI, also noted in the run's `data.json`.

    Needs a Ray session. Rows put aside are listed in the run's `rejected.jsonl`. Interrupted, it leaves a folder
    without a manifest, which the next call completes. Raises DataError and ModelError.
    """
    on_event({"kind": "status", "text": "looking at the data"})
    plan = make_plan(run)
    manifest = read_manifest(plan.folder)
    if manifest is None:
        facts = _prepare(plan, on_event)
    else:
        facts = manifest["facts"]
        on_event({"kind": "status", "text": f"data prepared before, {facts['rows']['train']:,} rows: {plan.folder}"})
        copy_rejected(plan.folder, run.folder)
        check_rejected(run, facts)
    write_text(join(run.folder, "data.json"), json.dumps({"uri": plan.folder, "digest": plan.digest}) + "\n")
    return plan.folder


def make_plan(run: config.Run) -> Plan:
    """Look at tokenizer and files. Raises DataError and ModelError."""
    tokenizer = load_tokenizer(run.model, run.data.chat_template)
    vocabulary = Vocabulary.of(tokenizer)
    data = run.data
    files = {"train": [files_of(s) for s in data.sources], "held_out": [files_of(s) for s in data.held_out]}
    template_hash = chat_template_hash(tokenizer)
    digest = digest_of(
        {
            "format": FORMAT,
            "train": describe_sources(data.sources, files["train"]),
            "held_out": describe_sources(data.held_out, files["held_out"]),
            "tokenizer": vocabulary.digest,
            "template": template_hash,
            "max_length": data.max_length,
            "too_long": data.too_long,
            "packed": data.packing == "corpus",
            "held_out_fraction": [data.held_out_fraction, run.seed] if data.held_out_fraction else None,
        }
    )
    base = data.cache or join(run.folder, "data")
    if is_local(base):
        base = filesystem(base)[1]
    return Plan(run, vocabulary, files, template_hash, digest, join(base, digest[:12]))


def _prepare(plan: Plan, on_event: OnEvent) -> dict[str, Any]:
    run, started = plan.run, time.monotonic()
    splits = {"train": run.data.sources, "held_out": run.data.held_out}
    fragments = [
        fragment
        for split, sources in splits.items()
        for number, source in enumerate(sources)
        for fragment in fragments_of(source, plan.files[split][number], number, split)
    ]
    count = sum(len(found) for sources in plan.files.values() for found in sources)
    on_event({"kind": "status", "text": f"preparing {count:,} {'file' if count == 1 else 'files'}"})
    job = Job(
        folder=plan.folder,
        vocabulary=plan.vocabulary,
        formats={split: [source.format for source in sources] for split, sources in splits.items()},
        max_length=run.data.max_length,
        too_long=run.data.too_long,
        packing=run.data.packing,
        seed=run.seed,
        threshold=round(run.data.held_out_fraction * 2**64),
    )
    fs, root = filesystem(plan.folder)
    with reached(plan.folder):
        make_folder(fs, f"{root}/work")
    preparation = _run(fragments, job, plan, on_event)
    if (threshold := preparation.better_threshold(job.threshold)) is not None:
        preparation = _run(fragments, replace(job, threshold=threshold), plan, on_event)
    return preparation.conclude(plan.digest, plan.template_hash, time.monotonic() - started)


def _run(fragments: list[Fragment], job: Job, plan: Plan, on_event: OnEvent) -> Preparation:
    preparation = Preparation(plan.run, job, fragments)
    total_bytes = sum(f.bytes for f in fragments)
    rows = done_bytes = 0
    for result in _results(fragments, job):
        if "error" in result:
            raise result["error"]
        preparation.add(result)
        rows += result["counts"].get("read", 0)
        done_bytes += fragments[result["number"]].bytes
        total = round(rows * total_bytes / done_bytes) if done_bytes else None
        on_event({"kind": "progress", "what": "prepare", "done": rows, "total": total, "unit": "rows"})
    return preparation


def _results(fragments: list[Fragment], job: Job) -> Iterator[dict[str, Any]]:
    """Results as they come, in any order. Ray Data runs one task a fragment, as many at once as there are CPUs."""
    import ray
    from ray.data import DataContext

    shared = ray.put(job)

    def work(row: dict[str, Any]) -> dict[str, Any]:
        fragment = Fragment(**json.loads(row["fragment"]))
        result = run_fragment(row["number"], fragment, ray.get(shared))
        error = result.get("error")
        if isinstance(error, FtrayError):
            fields = [type(error).__name__, error.what, error.where, error.hint]
            return {"result": json.dumps({"number": row["number"], "error": fields})}
        return {"result": json.dumps(result)}

    context = DataContext.get_current()
    bars, context.enable_progress_bars = context.enable_progress_bars, False
    try:
        items = [{"number": i, "fragment": json.dumps(f.as_dict())} for i, f in enumerate(fragments)]
        for row in ray.data.from_items(items, override_num_blocks=len(items)).map(work).iter_rows():
            result = json.loads(row["result"])
            if "error" in result:
                result["error"] = _error(*result["error"])
            yield result
    finally:
        context.enable_progress_bars = bars


def _error(kind: str, what: str, where: str | None, hint: str | None) -> FtrayError:
    from ftray import errors

    return getattr(errors, kind)(what, where=where, hint=hint)
