"""Trials as lanes of one base, against the same trials one after another: time, steps alone, memory.

    python tests/bench/lanes.py [--trials 8] [--steps 100] [--rounds 1] [--bases embedded,28m] [--batches 2,8,32]

Each trial is a LoRA run on short E2E rows (FTRAY_DATA; two of them are some 130 tokens) with a rank, rate and seed of
its own. `wall`: `ftray train A … H` in one process against eight of `ftray train A`, start-up and the base's loading
included, one pair after the other in each round. `steps`: seconds between the first and the last step alone, of both.
`memory`: weights, gradients and optimizer of all lanes with their base, over that of one trial with its base. Then the
steps alone for larger batches, which show where lanes no longer pay. Printed are ratios: these machines are shared.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[2]))

DATA = Path(os.environ.get("FTRAY_DATA", "../shared")).resolve() / "data" / "e2e"
MARKS = {"embedded": 0.25, "28m": 0.4}
STEPS_MARK, MEMORY_MARK = 0.5, 1.5


def the_28m(folder: Path) -> Path:
    """A Llama of 28M parameters in NF4 shapes (hidden 512, 8 layers, vocabulary 2,048), random weights, the embedded
    base's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ftray.config import Model
    from ftray.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(Model(path="embedded"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=1024,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


SHORT = 76
"""Tokens of a row, at most. The quarter of E2E's rows that these are has 65 on average."""


def short_rows(folder: Path) -> Path:
    """The first 2,000 such rows, as CSV."""
    from ftray.config import Model
    from ftray.data.tokenizer import load_tokenizer

    path = folder / "short.csv"
    if not path.exists():
        tokenizer = load_tokenizer(Model(path="embedded"))
        with (DATA / "trainset.csv").open(newline="", encoding="utf-8") as file:
            rows = (
                row
                for row in csv.DictReader(file)
                if len(tokenizer(f"{row['mr']}\n{row['ref']}")["input_ids"]) <= SHORT
            )
            chosen = list(itertools.islice(rows, 2000))
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["mr", "ref"])
            writer.writeheader()
            writer.writerows(chosen)
    return path


def run_file(folder: Path, name: str, base: str, number: int, rows: int, steps: int) -> Path:
    """One trial: rank 1, 2 or 4 on queries and values (Hu et al. 2021, section 7.2), a rate and seed of its own."""
    run: dict[str, Any] = {
        "name": name,
        "model": {"path": base},
        "method": {
            "name": "qlora",
            "rank": (1, 2, 4)[number % 3],
            "alpha": 8,
            "targets": ["q_proj", "v_proj"],
        },
        "data": {
            "sources": [
                {
                    "path": str(short_rows(folder)),
                    "format": {"name": "prompt_completion", "prompt": "{mr}\n", "completion": "{ref}"},
                }
            ],
            "max_length": 192,
            "cache": str(folder / "prepared"),
        },
        "train": {
            "steps": steps,
            "batch_rows": rows,
            "micro_batch_rows": min(rows, 16),
            "learning_rate": 1e-3 * (1 + number),
            "precision": "fp32" if base == "embedded" else "bf16",
        },
        "workers": {"count": 1},
        "logging": {"tensorboard": False},
        "seed": number,
        "output": str(folder / name),
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(run))
    return file


def command(*files: Path) -> float:
    """Seconds that `ftray train` takes."""
    started = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    program = [sys.executable, "-c", "from ftray.cli.main import main; main()", "train", *map(str, files)]
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    return time.perf_counter() - started


def wall(base: str, trials: int, steps: int, rows: int) -> tuple[float, float]:
    """(seconds as lanes, seconds one after another), whole commands."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        together = [run_file(folder, f"lane-{i}", base, i, rows, steps) for i in range(trials)]
        single = [run_file(folder, f"single-{i}", base, i, rows, steps) for i in range(trials)]
        lanes = command(*together)
        return lanes, sum(command(file) for file in single)


def in_process(base: str, trials: int, steps: int, rows: int, lanes: bool) -> dict[str, float]:
    """Steps alone, in this process and without Ray: {"seconds": of all trials' steps, "bytes": of weights, gradients
    and optimizer, one trial's or all lanes', with the base}."""
    import torch

    from ftray.config import load_run
    from ftray.data.prepare import prepare
    from ftray.data.prepared import PreparedData
    from ftray.session import ray_session
    from ftray.train.lanes import Base
    from ftray.train.loop import train_worker
    from ftray.train.world import World

    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as scratch:
        runs = [load_run(run_file(Path(scratch), f"r{i}", base, i, rows, steps)) for i in range(trials)]
        with ray_session():
            data = PreparedData.open(prepare(runs[0], lambda _: None))
        clocks = [Clock() for _ in runs]
        if not lanes:
            summaries = [
                train_worker(run, data, World(), clock)  # type: ignore[arg-type]
                for run, clock in zip(runs, clocks, strict=True)
            ]
            seconds = sum(clock.last - clock.first for clock in clocks)
            held = summaries[0]["state_memory"][0]
            return {"seconds": seconds, "bytes": sum(held.values())}
        shared = Base(runs[0], World())
        frozen = sum(p.nbytes for p in shared.model.parameters())
        found: dict[str, Any] = {}
        gate = threading.Barrier(trials)

        def work(i: int) -> None:
            clocks[i].gate = gate
            found[str(i)] = shared.train(str(i), runs[i], data, clocks[i])  # type: ignore[arg-type]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(trials)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        shared.close()
        seconds = max(clock.last for clock in clocks) - min(clock.first for clock in clocks)
        return {"seconds": seconds, "bytes": frozen + sum(sum(s["state_memory"][0].values()) for s in found.values())}


class Clock:
    """A channel that keeps when the first and the last step ended."""

    def __init__(self) -> None:
        self.first = self.last = 0.0
        self.gate: threading.Barrier | None = None

    def emit(self, event: dict[str, Any]) -> None:
        if event["kind"] == "step":
            if event["step"] == 1 and self.gate is not None:
                self.gate.wait()
            self.last = time.perf_counter()
            self.first = self.first or self.last

    def stop_requested(self) -> bool:
        return False


def separately(base: str, trials: int, steps: int, rows: int, lanes: bool) -> dict[str, float]:
    """`in_process`, in a process of its own."""
    arguments = ["--part", json.dumps([base, trials, steps, rows, lanes])]
    from ftray.session import ALLOCATOR, THREADS  # what workers have

    done = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, env=os.environ | ALLOCATOR | THREADS
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--bases", default="embedded,28m")
    parser.add_argument("--batches", default="2,8,32", help="rows a step; the first is that of `wall`")
    parser.add_argument("--no-wall", action="store_true")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        print(json.dumps(in_process(*json.loads(given.part))))
        return
    batches = [int(n) for n in given.batches.split(",")]
    scratch = tempfile.TemporaryDirectory()
    places = {"embedded": lambda: "embedded", "28m": lambda: str(the_28m(Path(scratch.name)))}
    print("| base | rows a step | what | lanes | one after another | ratio | mark |")
    print("|---|---:|---|---:|---:|---:|---:|")
    for name in given.bases.split(","):
        base = places[name]()
        if not given.no_wall:
            pairs = [wall(base, given.trials, given.steps, batches[0]) for _ in range(given.rounds)]
            show(name, batches[0], "wall, s", pairs, MARKS[name])
        for i, rows in enumerate(batches):
            steps = given.steps if i == 0 else max(10, given.steps // 5)
            both = [
                [separately(base, given.trials, steps, rows, lanes) for lanes in (True, False)]
                for _ in range(given.rounds)
            ]
            seconds = [(a["seconds"], b["seconds"]) for a, b in both]
            show(name, rows, "steps alone, s", seconds, None if i else STEPS_MARK)
            if i == 0:
                mib = [(a["bytes"] / 2**20, b["bytes"] / 2**20) for a, b in both]
                show(name, rows, "memory of all lanes / of one trial, MiB", mib, MEMORY_MARK)


def show(base: str, rows: int, what: str, pairs: list[tuple[float, float]], mark: float | None) -> None:
    ratios = [a / b for a, b in pairs]
    spread = f" [{min(ratios):.2f}–{max(ratios):.2f}]" if len(ratios) > 1 else ""
    a, b = (statistics.median(values) for values in zip(*pairs, strict=True))
    ratio = f"{statistics.median(ratios):.2f}{spread}"
    print(f"| {base} | {rows} | {what} | {a:.1f} | {b:.1f} | {ratio} | {mark or ''} |", flush=True)


if __name__ == "__main__":
    main()
