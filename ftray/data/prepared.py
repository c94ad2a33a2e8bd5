"""Prepared data, opened for training: rows of tokens and targets by number. numpy and Arrow; no torch, no Ray."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ftray.data.remote import local_copy
from ftray.errors import DataError
from ftray.manifest import read_manifest

INDEX = "index.json"
"""Sizes of the sources by split, and the shards in the order of row ids: file, rows, source, path, first_row."""


@dataclass(frozen=True)
class Row:
    tokens: np.ndarray
    """int32[T], token ids."""
    targets: np.ndarray
    """bool[T]; True: the token is a label, predicted from the one before. Never the first token of a sequence."""
    sequence_lengths: np.ndarray
    """int32[k]; positions restart at each sequence; sum = T."""


class Rows:
    """One split, memory-mapped: rows by id. Cheap to open and to pickle (it opens again from its folder)."""

    def __init__(self, folder: str, shards: list[dict[str, Any]], sizes: list[int], weights: list[float]) -> None:
        self._arguments = (folder, shards, sizes, weights)
        self._shards = shards
        self.sizes: tuple[int, ...] = tuple(sizes)
        """Rows of each source; a source's ids are contiguous, sources in the order of the run file."""
        self.weights: tuple[float, ...] = tuple(weights)
        self._batches = [batch for number, shard in enumerate(shards) for batch in _open(folder, shard, number)]
        self._first = np.concatenate([[0], np.cumsum([len(b) for b in self._batches])]).astype(np.int64)
        lengths = [b.lengths() for b in self._batches]
        self.lengths: np.ndarray = np.concatenate([*lengths, np.empty(0, np.int32)])
        """int32[n], tokens of each row."""
        counts = [b.target_counts() for b in self._batches]
        self.target_counts: np.ndarray = np.concatenate([*counts, np.empty(0, np.int32)])
        """int32[n], target tokens of each row."""

    def __reduce__(self):
        return Rows, self._arguments

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, i: int) -> Row:
        batch, k = self._locate(i)
        return batch.row(k)

    def provenance(self, i: int) -> str:
        """Where a row came from: `file.jsonl:123`, 1-based; of a packed row the first few, joined by commas."""
        batch, k = self._locate(i)
        shard = self._shards[batch.shard]
        numbers = batch.origins(k) + (shard["first_row"] - 1)
        shown = ", ".join(f"{shard['path']}:{n}" for n in numbers[:3])
        return f"{shown}, … ({len(numbers)} rows)" if len(numbers) > 3 else shown

    def _locate(self, i: int) -> tuple[_Batch, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        b = int(np.searchsorted(self._first, i, side="right")) - 1
        return self._batches[b], int(i - self._first[b])


class _Batch:
    """Views into one record batch of a memory-mapped shard."""

    def __init__(self, batch: pa.RecordBatch, shard: int) -> None:
        self.shard = shard
        self._tokens, self._offsets = _views(batch.column("tokens"))
        targets, _ = _views(batch.column("targets"))
        self._targets = targets.view(np.bool_)
        self._sequences, self._sequence_offsets = _views(batch.column("sequence_lengths"))
        self._origins, self._origin_offsets = _views(batch.column("origins"))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def lengths(self) -> np.ndarray:
        return np.diff(self._offsets).astype(np.int32)

    def target_counts(self) -> np.ndarray:
        return (
            np.add.reduceat(self._targets, self._offsets[:-1], dtype=np.int32) if len(self) else np.empty(0, np.int32)
        )

    def row(self, k: int) -> Row:
        a, b = self._offsets[k], self._offsets[k + 1]
        c, d = self._sequence_offsets[k], self._sequence_offsets[k + 1]
        return Row(self._tokens[a:b], self._targets[a:b], self._sequences[c:d])

    def origins(self, k: int) -> np.ndarray:
        return self._origins[self._origin_offsets[k] : self._origin_offsets[k + 1]]


def _views(column: pa.LargeListArray) -> tuple[np.ndarray, np.ndarray]:
    return column.values.to_numpy(zero_copy_only=True), column.offsets.to_numpy(zero_copy_only=True)


def _open(folder: str, shard: dict[str, Any], number: int) -> list[_Batch]:
    path = os.path.join(folder, shard["file"])
    try:
        reader = pa.ipc.open_file(pa.memory_map(path))
        batches = [_Batch(reader.get_batch(i), number) for i in range(reader.num_record_batches)]
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"a shard of the prepared data is damaged: {error}", where=path, hint=f"delete {folder}"
        ) from None
    if sum(len(b) for b in batches) != shard["rows"]:
        raise DataError("a shard of the prepared data has lost rows", where=path, hint=f"delete {folder}")
    return batches


class PreparedData:
    """A folder of prepared data. `train` and `held_out` are `Rows`; `facts` is what was counted while preparing."""

    def __init__(self, folder: str, train: Rows, held_out: Rows | None, facts: dict[str, Any]) -> None:
        self.folder, self.train, self.held_out, self.facts = folder, train, held_out, facts

    @property
    def digest(self) -> str:
        return self.facts["digest"]

    @classmethod
    def open(cls, uri: str) -> PreparedData:
        """Open a folder that `prepare` returned; a remote one is copied to the local cache first.

        Raises DataError when it is unfinished or its files are not as long as its manifest says.
        """
        try:
            folder = local_copy(uri)
        except FileNotFoundError:
            raise DataError(
                "no such prepared data", where=uri, hint="run `ftray data` or `ftray train` again"
            ) from None
        manifest = read_manifest(folder)
        if manifest is None:
            raise DataError("this prepared data was never finished", where=uri, hint="run the same command again")
        for name, expected in manifest["files"].items():
            path = os.path.join(folder, name)
            size = os.path.getsize(path) if os.path.exists(path) else None
            if size != expected["size"]:
                found = "is missing" if size is None else f"has {size:,} bytes"
                raise DataError(
                    f"{name} {found}, its manifest says {expected['size']:,} bytes",
                    where=uri,
                    hint="delete this folder",
                )
        with open(os.path.join(folder, INDEX), encoding="utf-8") as file:
            index = json.load(file)
        facts = manifest["facts"]
        train = _rows(folder, index, "train", facts["weights"])
        held_out = _rows(folder, index, "held_out", [1.0] * len(index["sizes"]["held_out"]))
        return cls(folder, train, held_out if len(held_out) else None, facts)


def _rows(folder: str, index: dict[str, Any], split: str, weights: list[float]) -> Rows:
    return Rows(folder, index["shards"][split], index["sizes"][split], weights)
