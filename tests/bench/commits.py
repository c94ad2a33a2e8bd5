"""What commits cost the loop: a full run of 100 million parameters, written beside the loop and within it, to a local
disk and to a slow store. A markdown table.

    python tests/bench/commits.py [--between 30] [--rate 100] [--layers 14]

Random weights in the shape of a Llama of hidden 768; AdamW; a commit has 12 bytes a parameter. One process, without
Ray. Lost is what the loop stands still for a commit, and what the steps under way meanwhile take longer than the median
of the others; its share is that of a commit every 60 s. On a machine that other work keeps busy these say little, and
the processor's seconds of the loop's thread (OMP_NUM_THREADS=1) for a commit, waiting for disks left out, say more.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from ftray.config import Run, parse_run
from ftray.data.tokenizer import local_model_folder
from ftray.train import loop, writer
from ftray.train.world import World
from tests.toys import MemoryData, random_rows


class SlowStore(LocalFileSystem):
    """A disk that takes `rate` bytes a second, and looks like an object store."""

    protocol = ("slow",)
    rate = 0.0

    def put_file(self, lpath: Any, rpath: Any, **_: Any) -> None:
        self.makedirs(self._parent(rpath), exist_ok=True)
        with open(lpath, "rb") as source, open(self._strip_protocol(rpath), "wb") as target:
            while block := source.read(1 << 20):
                target.write(block)
                time.sleep(len(block) / self.rate)


class Timed:
    """A channel that notes when each event came."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def emit(self, event: dict[str, Any]) -> None:
        times = {"at": time.perf_counter(), "loop_cpu": time.thread_time(), "cpu": time.process_time()}
        self.events.append(event | times)

    def stop_requested(self) -> bool:
        return False


def make_base(folder: Path, layers: int) -> Path:
    """The shape of the base, with the embedded base's tokenizer; no weights."""
    embedded = Path(local_model_folder(parse_run(_text("embedded", 1, 1, folder), "a").model))
    folder.mkdir(parents=True)
    for path in embedded.glob("token*"):
        shutil.copy(path, folder)
    config = json.loads((embedded / "config.json").read_text())
    config |= {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": layers, "head_dim": 64}
    config |= {"num_attention_heads": 12, "num_key_value_heads": 12}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _text(path: str, steps: int, every: int, output: Any) -> str:
    return f"""
    name: commits
    model: {{path: "{path}", random_weights: {"false" if path == "embedded" else "true"}}}
    method: {{name: full}}
    data: {{sources: [{{path: unused.jsonl, format: text}}], max_length: 128}}
    train: {{steps: {steps}, commit_every: {every}, batch_rows: 4, micro_batch_rows: 4, learning_rate: 1e-4}}
    logging: {{tensorboard: false}}
    output: "{output}"
    """


def run_of(base: Path, steps: int, every: int, output: str) -> Run:
    return parse_run(_text(str(base), steps, every, output), "bench")


def train(run: Run, *, beside: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Events with their times. Not `beside`: each commit is written within the loop, as it was before."""
    channel, in_memory = Timed(), writer.in_memory

    def equip(run: Run, world: World, steps: int) -> loop.Equipment:
        equipment = loop._alone(run, world, steps)
        equipment.aside = None if beside else contextlib.nullcontext
        return equipment

    writer.in_memory = in_memory if beside else lambda _: None  # type: ignore[assignment]
    try:
        worker = loop._Worker(run, MemoryData(random_rows(256)), World(), channel, equip)  # type: ignore[arg-type]
        worker.resume()
        worker.train()
    finally:
        writer.in_memory = in_memory
    return channel.events, {"parameters": worker.equipment.parameters}


def lost(events: list[dict[str, Any]], every: int) -> dict[str, float]:
    """Seconds of a commit, mean: standing still, and slower steps while it is under way; the last is left out."""
    steps = {event["step"]: event for event in events if event["kind"] == "step"}
    counted = {event["step"]: event["at"] for event in events if event["kind"] == "commit"}
    last = max(steps)
    begun = list(range(every, last, every))
    under_way = {s for b in begun for s in steps if s > b and steps[s]["at"] - steps[s]["seconds"] < counted[b]}
    undisturbed = [steps[s]["seconds"] for s in steps if s not in under_way and s > 2]
    usual = statistics.median(undisturbed)
    still = [steps[b + 1]["at"] - steps[b]["at"] - steps[b + 1]["seconds"] for b in begun]
    slower = sum(steps[s]["seconds"] - usual for s in under_way) / len(begun)
    took = [counted[b] - steps[b]["at"] for b in begun]
    loop_cpu = {s: steps[s]["loop_cpu"] - steps[s - 1]["loop_cpu"] for s in steps if s > 1}
    usual_cpu = statistics.median(loop_cpu[s] for s in loop_cpu if s - 1 not in begun and s > 2)
    return {
        "step": usual,
        "still": statistics.mean(still),
        "slower": slower,
        "took": statistics.mean(took),
        "cpu": statistics.mean(loop_cpu[b + 1] - usual_cpu for b in begun),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--between", type=float, default=30.0, help="seconds between two commits")
    parser.add_argument("--commits", type=int, default=2, help="commits measured")
    parser.add_argument("--rate", type=float, default=100.0, help="MB/s that the slow store takes")
    parser.add_argument("--layers", type=int, default=14)
    arguments = parser.parse_args()
    SlowStore.rate = arguments.rate * 1e6
    fsspec.register_implementation("slow", SlowStore, clobber=True)
    with tempfile.TemporaryDirectory(prefix="ftray-bench-") as scratch:
        base = make_base(Path(scratch) / "base", arguments.layers)
        events, facts = train(run_of(base, 5, 100, f"{scratch}/warm"), beside=True)
        step = statistics.median(e["seconds"] for e in events if e["kind"] == "step" and e["step"] > 1)
        every = max(3, round(arguments.between / step))
        shutil.rmtree(f"{scratch}/warm")
        print(f"{facts['parameters']:,} parameters, {step:.2f} s a step, a commit every {every} steps\n", flush=True)
        titles = ["written", "to", "s a commit takes", "s the loop stands still", "s steps are slower", "share of 60 s"]
        print(" | ".join(["", *titles, "CPU s of the loop", "share of 60 s", ""]).strip())
        print("|---|---|---:|---:|---:|---:|---:|---:|", flush=True)
        for scheme, to in (("", "disk"), ("slow://", f"store, {arguments.rate:g} MB/s")):
            for beside in (True, False):
                output = f"{scheme}{scratch}/run"
                events, _ = train(run_of(base, every * (arguments.commits + 1), every, output), beside=beside)
                shutil.rmtree(f"{scratch}/run")
                found = lost(events, every)
                share = (found["still"] + found["slower"]) / 60
                print(
                    f"| {'beside the loop' if beside else 'within it'} | {to} | {found['took']:.1f} |"
                    f" {found['still']:.2f} | {found['slower']:.2f} | {share:.1%} |"
                    f" {found['cpu']:.2f} | {found['cpu'] / 60:.1%} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
