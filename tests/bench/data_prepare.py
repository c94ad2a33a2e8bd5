"""Preparing rows: ftray on Ray Data against `datasets.map(batched=True, num_proc=2)`, same rows and tokenizer.

    python tests/bench/data_prepare.py [--rows 1000000] [--format prompt_completion]

Both start at a JSONL file and end with tokens and target masks on disk. Printed: seconds, rows/s, the ratio, and the
largest resident size of any single process of each side. Ray's own start is printed apart (a run needs it anyway); the
process pool's start is within the time of `datasets`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import psutil

from ftray.config import parse_run
from ftray.data.prepare import prepare
from ftray.data.prepared import PreparedData
from ftray.data.tokenizer import load_tokenizer
from ftray.session import ray_session

CPUS = 2


class PeakMemory(threading.Thread):
    """Largest resident size in GiB of any process of this one's family, sampled."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_gib, self.name_of_peak, self._stop_now = 0.0, "", threading.Event()

    def run(self) -> None:
        me = psutil.Process()
        while not self._stop_now.wait(0.25):
            for process in [me, *me.children(recursive=True)]:
                try:
                    memory, name = process.memory_info(), process.name()
                except psutil.Error:
                    continue
                if name in ("raylet", "gcs_server"):
                    continue
                gib = memory.rss / 2**30
                if gib > self.peak_gib:
                    self.peak_gib, self.name_of_peak = gib, name

    def __enter__(self) -> PeakMemory:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_now.set()
        self.join()


def write_rows(path: Path, count: int) -> None:
    rng = random.Random(0)
    words = [w for w in Path(__file__).read_text().replace('"', " ").split() if w.isalpha()] + [
        "the",
        "a",
        "of",
        "and",
        "to",
        "in",
    ]
    with open(path, "w") as file:
        for i in range(count):
            prompt = " ".join(rng.choices(words, k=rng.randint(5, 25)))
            completion = " ".join(rng.choices(words, k=rng.randint(5, 35)))
            file.write(json.dumps({"prompt": f"{i}: {prompt}", "completion": f" {completion}"}) + "\n")


def with_ftray(path: Path, folder: Path, model: str, format: str) -> dict:
    run = parse_run(
        f"""
        name: bench
        output: {folder}
        model: {{path: {model}}}
        method: lora
        train: {{steps: 1}}
        data: {{max_length: 1024, sources: [{{path: {path}, format: {format}}}]}}
        """.replace("method: lora", "method: {name: lora}"),
        "bench",
    )
    started = time.perf_counter()
    with PeakMemory() as memory, ray_session(cpus=CPUS):
        ready = time.perf_counter()
        where = prepare(run, lambda event: None)
        seconds = time.perf_counter() - ready
    data = PreparedData.open(where)
    return {
        "seconds": seconds,
        "start": ready - started,
        "rows": len(data.train),
        "tokens": data.facts["tokens"]["train"],
        "targets": data.facts["target_tokens"]["train"],
        "peak_gib": memory.peak_gib,
        "process": memory.name_of_peak,
    }


def with_datasets(path: Path, folder: Path, model: str, format: str) -> dict:
    import datasets

    datasets.disable_progress_bars()
    run = parse_run(
        f"{{name: b, model: {{path: {model}}}, method: {{name: lora}}, train: {{steps: 1}},"
        f" data: {{sources: [{{path: {path}, format: text}}]}}}}",
        "bench",
    )
    tokenizer = load_tokenizer(run.model)
    eos = tokenizer.eos_token_id

    def pairs(batch: dict) -> dict:
        """The usual way: the whole text and its prompt are tokenized, and the prompt's length is masked."""
        whole = tokenizer([p + c for p, c in zip(batch["prompt"], batch["completion"], strict=True)])["input_ids"]
        prompts = tokenizer(batch["prompt"])["input_ids"]
        labels = [[False] * len(p) + [True] * (len(w) + 1 - len(p)) for p, w in zip(prompts, whole, strict=True)]
        return {"input_ids": [[*ids, eos] for ids in whole], "targets": labels}

    def texts(batch: dict) -> dict:
        whole = tokenizer(batch["completion"])["input_ids"]
        return {"input_ids": [[*ids, eos] for ids in whole], "targets": [[True] * (len(w) + 1) for w in whole]}

    def one_tokenization(batch: dict) -> dict:
        """The least that can be done: one tokenization, no mask at all."""
        whole = tokenizer([p + c for p, c in zip(batch["prompt"], batch["completion"], strict=True)])["input_ids"]
        return {"input_ids": whole}

    work = {"prompt_completion": pairs, "text": texts, "least": one_tokenization}[format]
    started = time.perf_counter()
    with PeakMemory() as memory:
        rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder))
        loaded = time.perf_counter()
        rows = rows.map(work, batched=True, num_proc=CPUS, remove_columns=rows.column_names)
        seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "start": loaded - started,
        "rows": len(rows),
        "peak_gib": memory.peak_gib,
        "process": memory.name_of_peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--model", default="embedded", help="whose tokenizer")
    parser.add_argument("--format", default="prompt_completion", choices=["prompt_completion", "text"])
    parser.add_argument("--least", action="store_true", help="let datasets tokenize once and make no target mask")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ftray-bench-"))
    try:
        path = folder / "rows.jsonl"
        write_rows(path, arguments.rows)
        print(
            f"{arguments.rows:,} rows, {path.stat().st_size / 2**20:.0f} MiB, {arguments.format}, {CPUS} CPUs",
            flush=True,
        )
        format = arguments.format if arguments.format != "text" else "{name: text, column: completion}"
        ours = with_ftray(path, folder / "ours", arguments.model, format)
        show("ftray", ours, "Ray's start apart")
        other = "least" if arguments.least else arguments.format
        theirs = with_datasets(path, folder / "theirs", arguments.model, other)
        show("datasets", theirs, "reading, of these")
        assert ours["rows"] == theirs["rows"] == arguments.rows, "rows were lost"
        print(f"speed ratio {theirs['seconds'] / ours['seconds']:.2f} (seconds of datasets / seconds of ftray)")
    finally:
        shutil.rmtree(folder)


def show(name: str, result: dict, start: str) -> None:
    print(
        f"{name:9} {result['seconds']:7.1f} s  {result['rows'] / result['seconds']:9,.0f} rows/s"
        f"  peak {result['peak_gib']:.2f} GiB ({result['process']})  {start}: {result['start']:.1f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
