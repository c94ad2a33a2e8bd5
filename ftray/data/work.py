"""The work on one fragment: read, render, tokenize, split, pack, write. Runs in a Ray task; knows no Ray.

What it writes depends on the fragment and the job alone, under names made of the fragment's number, so that a fragment
done twice is done once. Tokens never leave the task but to the disk; what it returns is counts.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from ftray import config
from ftray.data.encode import Encoder, Vocabulary
from ftray.data.formats import Rendered, renderers
from ftray.data.fragments import Fragment
from ftray.data.pack import pack
from ftray.data.readers import read
from ftray.data.rows import BadRow, shortened
from ftray.data.shards import Packed, ShardWriter, Sink
from ftray.errors import FtrayError, RunError
from ftray.manifest import digest_of, filesystem, join, read_text, write_text
from ftray.storage import explained

HISTOGRAM_BINS = 32
SHOWN_REJECTED = 5
_BATCH_ROWS, _BATCH_CHARACTERS = 1024, 1 << 20
_WINDOW_ROWS, _WINDOW_TOKENS = 16_384, 4_000_000

_Texts = tuple[int, list[Rendered], Any]
"""A row's number, the texts of its sequences, and the row as it was read."""
_Sequence = tuple[np.ndarray, np.ndarray]
"""Tokens and targets."""


@dataclass(frozen=True)
class Job:
    """What every fragment of a preparation has in common."""

    folder: str
    vocabulary: Vocabulary
    formats: dict[str, list[config.Format]]
    """By split and source."""
    max_length: int
    too_long: str
    packing: str
    seed: int
    threshold: int
    """A row whose content hashes below this is held out; of 2**64."""


def run_fragment(number: int, fragment: Fragment, job: Job) -> dict[str, Any]:
    """Do a fragment, unless it has been done by a run before. Returns its counts, or {"number", "error"}."""
    key = digest_of([fragment.as_dict(), job.threshold])
    note = join(job.folder, "work", f"{number:06d}.json")
    work = None
    try:
        done = _done(note, key, job.folder)
        if done is not None:
            return done
        work = _Work(number, fragment, job)
        result = work.run() | {"key": key}
        write_text(note, json.dumps(result))
        return result
    except FtrayError as error:
        return {"number": number, "error": error}
    except OSError as error:  # reading has errors of its own
        told = explained(error, job.folder) or RunError(str(error), where=job.folder)
        what = f"prepared data cannot be written: {told.what}"
        return {"number": number, "error": RunError(what, where=told.where, hint=told.hint)}
    finally:
        if work is not None:
            work.close()


def _done(note: str, key: str, folder: str) -> dict[str, Any] | None:
    try:
        result = json.loads(read_text(note))
    except (FileNotFoundError, ValueError):
        return None
    if result.get("key") != key:
        return None
    fs, root = filesystem(folder)
    for name, facts in result["files"].items():
        path = f"{root}/{name}"
        if not fs.exists(path) or fs.size(path) != facts["size"]:
            return None
    return result


class _Work:
    def __init__(self, number: int, fragment: Fragment, job: Job) -> None:
        self.number, self.fragment, self.job = number, fragment, job
        format = job.formats[fragment.split][fragment.source]
        self._renders = renderers(format, job.vocabulary.chat)
        self._encoder = Encoder(job.vocabulary)
        self._pieces_wanted = job.packing == "corpus" and isinstance(format, config.TextFormat)
        splits = ["held_out"] if fragment.split == "held_out" else ["train", "held_out"]
        self._outputs = {split: _Output(f"{split}-{number:06d}.arrow", job) for split in splits}
        self._rejected = _Rejected(f"rejected-{number:06d}.jsonl", job)
        self._counts: Counter[str] = Counter()
        self._bins = np.zeros(HISTOGRAM_BINS, np.int64)
        self._hashes: tuple[int, int] | None = None

    def run(self) -> dict[str, Any]:
        for batch in _batches(self._rendered()):
            encoded = iter(self._encoder.encode([text for _, texts, _ in batch for text in texts]))
            for number, texts, value in batch:
                self._place(number, [next(encoded) for _ in texts], value)
        shards = {split: output.finish() for split, output in self._outputs.items()}
        rejected = self._rejected.finish()
        files = [*shards.values(), rejected]
        return {
            "number": self.number,
            "counts": dict(self._counts),
            "histogram": self._bins.tolist(),
            "hashes": self._hashes,
            "shards": shards,
            "rejected_by_reason": dict(self._rejected.reasons),
            "rejected_first": self._rejected.first,
            "files": {f["file"]: {"size": f["size"], "sha256": f["sha256"]} for f in files if f["size"]},
        }

    def close(self) -> None:
        """Leave no part behind, whatever happened."""
        for output in self._outputs.values():
            output.abort()
        self._rejected.abort()

    def _rendered(self) -> Iterator[_Texts]:
        counts = self._counts
        for raw in read(self.fragment):
            counts["lines"] = max(counts["lines"], raw.number + raw.lines - 1)
            if raw.is_blank:
                counts["blank"] += raw.sample is None  # a header is neither a row nor blank
                continue
            counts["read"] += 1
            if raw.problem is not None:
                self._rejected.add(raw.number, raw.problem, raw.sample)
                continue
            try:
                rendered = [render(raw.value) for render in self._renders]
            except BadRow as problem:
                self._rejected.add(raw.number, problem, raw.value)
                continue
            yield raw.number, rendered, raw.value

    def _place(self, number: int, sequences: list[_Sequence], value: Any) -> None:
        """Into its split, or aside: a row with all its sequences."""
        limit = self.job.max_length
        if not all(targets.any() for _, targets in sequences):
            self._rejected.add(number, BadRow("no target token"), value)
            return
        split = self._split(np.concatenate([tokens for tokens, _ in sequences]))
        if self._pieces_wanted and len(sequences[0][0]) > limit:
            self._place_pieces(split, number, *sequences[0])
            return
        longest = max(len(tokens) for tokens, _ in sequences)
        if longest > limit:
            if self.job.too_long == "refuse":
                detail = f"{longest:,} tokens, data.max_length is {limit:,}"
                self._rejected.add(number, BadRow("too long", detail), value)
                return
            sequences = [(tokens[:limit], targets[:limit]) for tokens, targets in sequences]
            if not all(targets.any() for _, targets in sequences):
                self._rejected.add(number, BadRow("every target is beyond max_length", f"{longest:,} tokens"), value)
                return
            self._counts["truncated"] += 1
        self._add(split, number, sequences)

    def _place_pieces(self, split: str, number: int, tokens: np.ndarray, targets: np.ndarray) -> None:
        """A long text, cut in rows of `max_length`."""
        limit = self.job.max_length
        self._counts["cut_in_pieces"] += 1
        for start in range(0, len(tokens), limit):
            piece = targets[start : start + limit].copy()
            piece[0] = False
            if piece.any():
                self._add(split, number, [(tokens[start : start + limit], piece)])

    def _add(self, split: str, number: int, sequences: list[_Sequence]) -> None:
        lengths = [len(tokens) for tokens, _ in sequences]
        for n in lengths:
            self._bins[min(HISTOGRAM_BINS - 1, (n - 1) * HISTOGRAM_BINS // self.job.max_length)] += 1
        self._counts["sequences"] += len(lengths)
        tokens, targets = (np.concatenate(part) for part in zip(*sequences, strict=True))
        self._outputs[split].add(Packed(tokens, targets, lengths, (number,)))

    def _split(self, tokens: np.ndarray) -> str:
        """Held out or not, by the row's whole content: equal rows fall on one side."""
        if self.fragment.split == "held_out" or not self.job.threshold:
            return self.fragment.split
        value = content_hash(tokens, self.job.seed)
        low, high = self._hashes or (value, value)
        self._hashes = min(low, value), max(high, value)
        return "held_out" if value < self.job.threshold else "train"


def content_hash(tokens: np.ndarray, seed: int) -> int:
    """Of 2**64: what decides on which side of `held_out_fraction` a row falls."""
    salt = seed.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=8, key=salt).digest(), "little")


def _batches(rows: Iterable[_Texts]) -> Iterator[list[_Texts]]:
    batch: list[_Texts] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += sum(len(rendered.text) for rendered in row[1])
        if len(batch) >= _BATCH_ROWS or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Output:
    """Rows of one split on their way to a shard, packed in windows if asked."""

    def __init__(self, name: str, job: Job) -> None:
        self._name, self._job = name, job
        self._writer = ShardWriter(join(job.folder, name))
        self._window: list[Packed] = []
        self._window_tokens = 0

    def add(self, row: Packed) -> None:
        if self._job.packing != "corpus":
            self._writer.add(row)
            return
        self._window.append(row)
        self._window_tokens += len(row.tokens)
        if len(self._window) >= _WINDOW_ROWS or self._window_tokens >= _WINDOW_TOKENS:
            self._pack()

    def finish(self) -> dict[str, Any]:
        self._pack()
        return self._writer.close() | {"file": self._name}

    def abort(self) -> None:
        self._writer.abort()

    def _pack(self) -> None:
        for row in pack(self._window, self._job.max_length, self._job.vocabulary.pad_id):
            self._writer.add(row)
        self._window, self._window_tokens = [], 0


class _Rejected:
    """Rows put aside, with numbers counted from the fragment's start; the whole preparation adds what came before."""

    def __init__(self, name: str, job: Job) -> None:
        self._name, self._uri = name, join(job.folder, name)
        self._sink: Sink | None = None
        self.reasons: Counter[str] = Counter()
        self.first: list[dict[str, Any]] = []

    def add(self, number: int, problem: BadRow, sample: Any) -> None:
        entry = {"row": number, "reason": problem.reason, "detail": problem.detail, "sample": shortened(sample)}
        if self._sink is None:
            self._sink = Sink(self._uri)
        self._sink.write(orjson.dumps(entry) + b"\n")
        self.reasons[problem.reason] += 1
        if len(self.first) < SHOWN_REJECTED:
            self.first.append(entry)

    def finish(self) -> dict[str, Any]:
        facts = self._sink.finish() if self._sink else {"size": 0, "sha256": ""}
        return facts | {"file": self._name}

    def abort(self) -> None:
        if self._sink is not None:
            self._sink.abort()
