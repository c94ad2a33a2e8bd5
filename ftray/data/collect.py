"""What the fragments' counts add up to: the index, the facts, the rows put aside, and whether they are too many."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from typing import Any

import numpy as np

from ftray import config
from ftray.data.fragments import Fragment
from ftray.data.prepared import INDEX, Rows
from ftray.data.work import HISTOGRAM_BINS, SHOWN_REJECTED, Job
from ftray.errors import DataError
from ftray.manifest import filesystem, is_local, join, seal, write_text
from ftray.storage import make_folder

REJECTED = "rejected.jsonl"
_SAMPLES, _SAMPLE_TOKENS = 3, 512


class Preparation:
    """Results of the fragments of one preparation."""

    def __init__(self, run: config.Run, job: Job, fragments: list[Fragment]) -> None:
        self._run, self._job, self._fragments = run, job, fragments
        self._results: dict[int, dict[str, Any]] = {}

    def add(self, result: dict[str, Any]) -> None:
        self._results[result["number"]] = result

    def better_threshold(self, threshold: int) -> int | None:
        """Another threshold, where this one left a split without any row though there are two different ones."""
        hashes = [r["hashes"] for r in self._results.values() if r["hashes"]]
        if not threshold or not hashes:
            return None
        low, high = min(h[0] for h in hashes), max(h[1] for h in hashes)
        if low == high:
            return None
        if low >= threshold:
            return low + 1
        return high if high < threshold else None

    def conclude(self, digest: str, template_hash: str | None, seconds: float) -> dict[str, Any]:
        """Write the index and seal the folder. Returns the facts. Raises DataError when too many rows were put aside,
        or none is left."""
        assert len(self._results) == len(self._fragments), "a fragment gave no result"
        folder, first_rows = self._job.folder, self._first_rows()
        rejected = self._write_rejected(first_rows)
        copy_rejected(folder, self._run.folder)
        facts = self._facts() | {"digest": digest, "chat_template_hash": template_hash, "seconds": round(seconds, 2)}
        check_rejected(self._run, facts)
        if not facts["rows"]["train"]:
            raise DataError(
                "no row is left to train on", where="data.sources", hint=f"{facts['rows']['read']:,} were read"
            )
        index = self._index(first_rows)
        write_text(join(folder, INDEX), json.dumps(index, indent=1) + "\n")
        facts["samples"] = self._samples(index, facts)
        files = {name: f for r in self._results.values() for name, f in r["files"].items() if name.endswith(".arrow")}
        for name in (INDEX, *([REJECTED] if rejected else [])):
            files[name] = _described(folder, name)
        self._check_written(files)
        self._sweep(set(files))
        seal(folder, facts, files)
        return facts

    def _first_rows(self) -> list[int]:
        """The row number in its file at which each fragment begins, 1-based."""
        next_row: dict[tuple[str, int, str], int] = defaultdict(lambda: 1)
        first = []
        for i, fragment in enumerate(self._fragments):
            key = fragment.split, fragment.source, fragment.uri
            first.append(next_row[key])
            next_row[key] += self._results[i]["counts"].get("lines", 0)
        return first

    def _index(self, first_rows: list[int]) -> dict[str, Any]:
        index: dict[str, Any] = {"shards": {"train": [], "held_out": []}, "sizes": {}}
        sources = {"train": len(self._job.formats["train"])}
        sources["held_out"] = max(len(self._job.formats["held_out"]), sources["train"] if self._job.threshold else 0)
        for split, count in sources.items():
            sizes = [0] * count
            for i, fragment in enumerate(self._fragments):
                shard = self._results[i]["shards"].get(split)
                if shard is None or not shard["rows"]:
                    continue
                sizes[fragment.source] += shard["rows"]
                index["shards"][split].append(
                    {
                        "file": shard["file"],
                        "rows": shard["rows"],
                        "source": fragment.source,
                        "path": fragment.path,
                        "first_row": first_rows[i],
                    }
                )
            index["sizes"][split] = sizes
        return index

    def _facts(self) -> dict[str, Any]:
        results = [self._results[i] for i in range(len(self._fragments))]
        counts: Counter[str] = sum((Counter(r["counts"]) for r in results), Counter())
        reasons: Counter[str] = sum((Counter(r["rejected_by_reason"]) for r in results), Counter())
        summed = {
            what: {
                split: sum(r["shards"].get(split, {}).get(what, 0) for r in results) for split in ("train", "held_out")
            }
            for what in ("rows", "tokens", "target_tokens")
        }
        histogram = np.sum([r["histogram"] for r in results], axis=0).tolist() if results else [0] * HISTOGRAM_BINS
        edges = np.linspace(0, self._job.max_length, HISTOGRAM_BINS + 1).tolist()
        named = ("read", "blank", "truncated", "cut_in_pieces", "sequences")
        return {
            "rows": summed["rows"] | {"rejected": reasons.total()} | {name: counts[name] for name in named},
            "tokens": summed["tokens"],
            "target_tokens": summed["target_tokens"],
            "length_histogram": {"edges": edges, "counts": histogram},
            "rejected_by_reason": dict(reasons.most_common()),
            "rejected_first": self._first_rejected(),
            "sources": self._by_source(),
            "weights": [source.weight for source in self._run.data.sources],
            "max_length": self._job.max_length,
            "packing": self._job.packing,
            "tokenizer_digest": self._job.vocabulary.digest,
        }

    def _by_source(self) -> list[dict[str, Any]]:
        listed = []
        for split, sources in (("train", self._run.data.sources), ("held_out", self._run.data.held_out)):
            for number, source in enumerate(sources):
                mine = [i for i, f in enumerate(self._fragments) if (f.split, f.source) == (split, number)]
                results = [self._results[i] for i in mine]
                listed.append(
                    {
                        "path": source.path,
                        "split": split,
                        "files": len({self._fragments[i].path for i in mine}),
                        "read": sum(r["counts"].get("read", 0) for r in results),
                        "rows": sum(s["rows"] for r in results for s in r["shards"].values()),
                        "rejected": sum(sum(r["rejected_by_reason"].values()) for r in results),
                    }
                )
        return listed

    # ------------------------------------------------------------------------------------------------------ put aside

    def _first_rejected(self) -> list[dict[str, Any]]:
        first_rows, found = self._first_rows(), []
        for i, fragment in enumerate(self._fragments):
            for entry in self._results[i]["rejected_first"]:
                found.append({"file": fragment.path} | entry | {"row": entry["row"] + first_rows[i] - 1})
            if len(found) >= SHOWN_REJECTED:
                break
        return found[:SHOWN_REJECTED]

    def _write_rejected(self, first_rows: list[int]) -> bool:
        """One list of all rows put aside, with their numbers in their files. True if there is any."""
        if not any(r["rejected_by_reason"] for r in self._results.values()):
            return False
        fs, root = filesystem(self._job.folder)
        with fs.open(f"{root}/{REJECTED}", "wb") as out:
            for i, fragment in enumerate(self._fragments):
                if not self._results[i]["rejected_by_reason"]:
                    continue
                with fs.open(f"{root}/rejected-{i:06d}.jsonl", "rb") as part:
                    for line in part:
                        entry = json.loads(line)
                        entry = {"file": fragment.path} | entry | {"row": entry["row"] + first_rows[i] - 1}
                        out.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
        return True

    def _samples(self, index: dict[str, Any], facts: dict[str, Any]) -> list[dict[str, Any]]:
        """The first rows, for the report: tokens, targets, provenance."""
        folder = self._job.folder
        if not is_local(folder):
            return []
        rows = Rows(folder, index["shards"]["train"][:1], [], [])
        found = []
        for i in range(min(_SAMPLES, len(rows))):
            row = rows[i]
            found.append(
                {
                    "tokens": row.tokens[:_SAMPLE_TOKENS].tolist(),
                    "targets": row.targets[:_SAMPLE_TOKENS].astype(int).tolist(),
                    "provenance": rows.provenance(i),
                }
            )
        return found

    def _check_written(self, files: dict[str, dict[str, Any]]) -> None:
        fs, root = filesystem(self._job.folder)
        for name, facts in files.items():
            if not fs.exists(f"{root}/{name}") or fs.size(f"{root}/{name}") != facts["size"]:
                raise DataError(
                    f"a worker wrote {name}, and it is not here",
                    where=self._job.folder,
                    hint="set data.cache or output to storage that all machines of the cluster share",
                )

    def _sweep(self, kept: set[str]) -> None:
        """Remove what only the way there needed."""
        fs, root = filesystem(self._job.folder)
        for path in fs.find(root):
            name = path[len(root) :].lstrip("/")
            if name not in kept:
                fs.rm_file(path)
        if is_local(self._job.folder):
            fs.rmdir(f"{root}/work")


def _described(folder: str, name: str) -> dict[str, Any]:
    fs, root = filesystem(folder)
    digest = hashlib.sha256()
    with fs.open(f"{root}/{name}", "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"size": fs.size(f"{root}/{name}"), "sha256": digest.hexdigest()}


def copy_rejected(folder: str, run_folder: str) -> None:
    """The list of rows put aside, beside the run; none if there is none."""
    fs, root = filesystem(folder)
    to_fs, to_root = filesystem(run_folder)
    source, target = f"{root}/{REJECTED}", f"{to_root}/{REJECTED}"
    if not fs.exists(source):
        if to_fs.exists(target):
            to_fs.rm_file(target)
        return
    make_folder(to_fs, to_root)
    with fs.open(source, "rb") as read, to_fs.open(target, "wb") as write:
        while block := read.read(1 << 20):
            write.write(block)


def check_rejected(run: config.Run, facts: dict[str, Any]) -> None:
    """Raises DataError when more rows were put aside than `data.max_rejected` allows."""
    rejected, total, most = facts["rows"]["rejected"], facts["rows"]["read"], run.data.max_rejected
    allowed = most if isinstance(most, int) else most * total
    if not total:
        raise DataError("the sources hold no row", where="data.sources")
    if rejected <= allowed:
        return
    limit = f"{most:,}" if isinstance(most, int) else f"{most:g} × {total:,} = {allowed:,.0f}"
    reasons = ", ".join(f"{reason}: {n:,}" for reason, n in facts["rejected_by_reason"].items())
    shown = "".join(
        f"\n  {e['file']}:{e['row']}: {e['reason']}{' (' + e['detail'] + ')' if e['detail'] else ''}: {e['sample']}"
        for e in facts["rejected_first"]
    )
    raise DataError(
        f"{rejected:,} of {total:,} rows were put aside ({rejected / total:.1%}), and data.max_rejected allows {limit}"
        f"\n  {reasons}{shown}",
        where="data",
        hint=f"mend them (all are in {join(run.folder, REJECTED)}), {_remedy(facts)}or raise data.max_rejected",
    )


def _remedy(facts: dict[str, Any]) -> str:
    commonest = next(iter(facts["rejected_by_reason"]))
    if commonest == "too long":
        return f"raise data.max_length (now {facts['max_length']:,}), set data.too_long: truncate, "
    if commonest.startswith("missing column"):
        return "name the columns that the rows have in the source's `format`, "
    return ""
