"""A worker of a batch generation: one base, one engine, one part of the rows after the other. Knows no Ray."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch

from ftray.data.encode import Vocabulary
from ftray.data.formats import columns_of as format_columns
from ftray.data.readers import read
from ftray.data.rows import BadRow, Raw, shortened
from ftray.data.shards import Sink
from ftray.data.tokenizer import load_tokenizer
from ftray.engine.engine import Engine
from ftray.engine.request import Request, Sampling
from ftray.errors import ArtefactError, FtrayError, RunError
from ftray.evaluate.answers import answered, bulk_options
from ftray.evaluate.generation import Generation, Part, adapter_of
from ftray.evaluate.questions import Prompter, ask_only
from ftray.evaluate.systems import resolved
from ftray.manifest import join, write_text
from ftray.model.served import Adapter
from ftray.registry.ref import Ref
from ftray.session import usable_cpus


def part_names(folder: str, number: int) -> tuple[str, str]:
    """(a part's rows, the note without which it does not count)."""
    return join(folder, f"part-{number:06d}.jsonl"), join(folder, f"part-{number:06d}.json")


class Generator:
    """Does parts of a generation. The base is loaded at the first of them."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._places = {placed.digest: placed.where for placed in generation.adapters.values()}
        format = generation.asking.source.format
        self._ask = ask_only(format)
        self._columns = format_columns(format)
        self._engine: Engine | None = None
        self._prompters: dict[str | None, Prompter] = {}
        self._rows: tuple[int, list[Raw]] = (-1, [])

    def do(self, part: Part) -> dict[str, Any]:
        """Write a part. Returns its counts; an FtrayError that is not a row's own is under "error"."""
        try:
            return self._do(part)
        except torch.OutOfMemoryError as error:
            hint = "fewer --slots or a shorter --context; the parts that are done are kept"
            return {"number": part.number, "error": ["RunError", f"a worker's GPU is full: {error}", None, hint]}
        except FtrayError as error:
            return {"number": part.number, "error": [type(error).__name__, error.what, error.where, error.hint]}

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()

    def _do(self, part: Part) -> dict[str, Any]:
        engine = self._engine = self._engine or self._make_engine()
        records: dict[str, dict[str, Any]] = {}
        failed: Counter[str] = Counter()
        requests = self._requests(part, records, failed)
        for end, text in answered(engine, requests):
            record = records[end.id]
            record["answer"], record["finish_reason"], record["tokens"] = (
                text,
                end.reason,
                end.usage.completion_tokens,
            )
            if end.error is not None:
                record["answer"], record["error"] = None, told(end.error)
                failed[_reason(end.error)] += 1
        return self._write(part, list(records.values()), failed)

    def _requests(self, part: Part, records: dict[str, dict[str, Any]], failed: Counter[str]) -> Iterator[Request]:
        for number, raw in enumerate(self._raw(part), part.first):
            record = records[str(number)] = _blank(number)
            try:
                if raw.problem is not None:
                    record["input"] = raw.sample if isinstance(raw.sample, str) else shortened(raw.sample)
                    raise raw.problem
                yield self._request(number, raw.value, record)
            except BadRow as problem:
                _fail(record, f"{problem.reason}: {problem.detail}" if problem.detail else problem.reason)
                failed[problem.reason] += 1
            except FtrayError as error:
                _fail(record, told(error))
                failed[_reason(error)] += 1

    def _request(self, number: int, row: Any, record: dict[str, Any]) -> Request:
        asking = self._generation.asking
        if not isinstance(row, dict):
            raise BadRow("not a mapping of columns")
        name = record["adapter"] = adapter_of(row, asking)
        record["input"] = {column: row[column] for column in self._columns if column in row}
        asked = self._ask(row)
        if name in self._generation.refused:
            raise BadRow(self._generation.refused[name])
        placed = self._generation.adapters[name] if name else None
        prompter = self._prompter(placed.chat_template if placed else asking.chat_template)
        tokens = prompter.tokens(asked)
        record["prompt_tokens"] = len(tokens)
        decoding = asking.decoding
        sampling = Sampling(
            max_tokens=decoding.max_tokens,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            top_k=decoding.top_k,
            seed=self._generation.seed_of(number),
            stop=tuple(decoding.stop),
        )
        ref = Ref("generate", "generate", placed.digest) if placed else None
        return Request(str(number), tokens, sampling, ref, "generate")

    def _prompter(self, template: str | None) -> Prompter:
        if template not in self._prompters:
            tokenizer = load_tokenizer(self._generation.base.model, template)
            self._prompters[template] = Prompter(Vocabulary.of(tokenizer))
        return self._prompters[template]

    def _raw(self, part: Part) -> list[Raw]:
        """The part's rows. A fragment's rows are kept: its parts follow each other."""
        if self._rows[0] != part.fragment:
            fragment = self._generation.fragments[part.fragment]
            self._rows = part.fragment, [raw for raw in read(fragment) if not raw.is_blank]
        rows = list(islice(self._rows[1], part.skip, part.skip + part.rows))
        if len(rows) != part.rows:
            where = self._generation.asking.source.path
            raise RunError("the prompts have changed while they were answered", where=where)
        return rows

    # ---------------------------------------------------------------------------------------------------------- engine

    def _make_engine(self) -> Engine:
        asking, key = self._generation.asking, self._generation.base
        device = "cuda" if torch.cuda.is_available() else "cpu"
        base = key.loaded(device)
        longest = min(4096, getattr(base.config, "max_position_embeddings", None) or 4096)
        options = bulk_options(base, asking.context or longest, slots=asking.slots)
        return Engine(base, self._load, options.model_copy(update={"context": asking.context}))

    def _load(self, ref: Ref) -> Adapter:
        """For the engine's threads. Raises FtrayError, which is then that of the rows."""
        where = self._places[ref.digest]
        with resolved([where], self._generation.asking.registry) as [system]:
            if system.key != ref.digest or system.folder is None:
                raise ArtefactError("this adapter has changed since the generation began", where=where)
            try:
                assert self._engine is not None
                return self._engine.base.read(system.folder)
            except (KeyError, ValueError, RuntimeError, OSError) as error:
                raise ArtefactError(f"this adapter cannot be read: {error!r}", where=where) from error

    # --------------------------------------------------------------------------------------------------------- writing

    def _write(self, part: Part, records: list[dict[str, Any]], failed: Counter[str]) -> dict[str, Any]:
        rows, note = part_names(self._generation.folder, part.number)
        sink = Sink(rows)
        try:
            for record in records:
                sink.write(as_line(record))
            facts = sink.finish()
        except OSError as error:
            raise RunError(f"answers cannot be written: {error}", where=rows) from None
        finally:
            sink.abort()
        counts = {
            "number": part.number,
            "rows": len(records),
            "failed": dict(failed),
            "prompt_tokens": sum(record["prompt_tokens"] for record in records),
            "tokens": sum(record["tokens"] for record in records),
            "cut_off": sum(record["finish_reason"] == "length" for record in records),
            **facts,
        }
        write_text(note, json.dumps(counts))
        return counts


def use_cores(count: int | None = None) -> None:
    """Torch's threads in this process; None: as many as it may use."""
    torch.set_num_threads(count or usable_cpus())


def told(error: FtrayError) -> str:
    """In one line."""
    return " ".join(str(error).split())


def as_line(record: dict[str, Any]) -> bytes:
    """A record as a line of JSON, UTF-8; escaped throughout where a text holds a lone surrogate."""
    try:
        return (json.dumps(record, ensure_ascii=False, default=str) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(record, default=str) + "\n").encode()


def _blank(number: int) -> dict[str, Any]:
    return {
        "row": number,
        "input": None,
        "adapter": None,
        "answer": None,
        "finish_reason": None,
        "prompt_tokens": 0,
        "tokens": 0,
        "error": None,
    }


def _fail(record: dict[str, Any], why: str) -> None:
    record["finish_reason"], record["error"] = "error", why


def _reason(error: FtrayError) -> str:
    """By which rows are counted: without the numbers, which are a row's own."""
    what = re.sub(r"\d[\d,]*", "…", error.what)
    return f"{error.where}: {what}" if error.where else what
