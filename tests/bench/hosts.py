"""Two workers on two hosts against one: tokens a second, bytes over the network, and what keeps the ratio below 2.

    python tests/bench/hosts.py [--steps 40] [--rows 32] [--rank 16] [--rounds 1] [--base 28m]

Needs root: `cluster/local/hosts.py` makes two hosts with one CPU each. All runs are QLoRA with one thread a worker on
E2E rows (FTRAY_DATA), the same rows in the same order:

    one     one worker
    two     one worker on each host: half of each step's rows, then the sum of the gradients over the network
    apart   `one` twice at the same time, one on each host, nothing shared: what this machine gives two processes at
            most, since they share its memory, its caches and its clock

`two / (2 × one)` is what is claimed. `apart / (2 × one)` is its bound on this machine; what is left between the two is
the network's and the waiting's for the slower of both. Bytes are those of the hosts' interfaces while steps were made,
less what Ray sends anyway, against the adapter in fp32: with two workers each sends every gradient once.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench.lanes import DATA, the_28m

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "cluster" / "local" / "hosts.py"
MARK = 0.8
WARM = 5
"""First steps, which are not counted."""
IDLE_SECONDS = 15.0


class Bench:
    def __init__(self, cluster: str, folder: Path, base: str, steps: int, rows: int, rank: int) -> None:
        self.cluster, self.folder, self.base = cluster, folder, base
        self.steps, self.rows, self.rank = steps, rows, rank

    def script(self, *arguments: str) -> list[str]:
        return [sys.executable, str(SCRIPT), "--name", self.cluster, *arguments]

    def start(self, name: str, workers: int) -> subprocess.Popen[bytes]:
        """A started run; its folder is FOLDER/NAME."""
        run: dict[str, Any] = {
            "name": name,
            "model": {"path": self.base},
            "method": {"name": "qlora", "rank": self.rank, "alpha": 2 * self.rank},
            "data": {
                "sources": [
                    {
                        "path": str(DATA / "trainset.csv"),
                        "format": {"name": "prompt_completion", "prompt": "{mr}\n", "completion": "{ref}"},
                        "limit": 2000,
                    }
                ],
                "max_length": 192,
                "cache": str(self.folder / "prepared"),
            },
            "train": {
                "steps": self.steps,
                "batch_rows": self.rows,
                "micro_batch_rows": self.rows // 2,
                "learning_rate": 1e-3,
                "precision": "bf16" if self.base != "embedded" else "fp32",
                "commit_every": 10**6,
            },
            "workers": {"count": workers, "cpus": 1, "gpus": 0},
            "logging": {"tensorboard": False},
            "output": str(self.folder / name),
        }
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(run))
        with open(self.folder / f"{name}.log", "w") as log:
            return subprocess.Popen(
                self.script("exec", "head", "--", sys.executable, "-m", "ftray.cli.main", "train", str(file), "--json"),
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            )

    def finish(self, process: subprocess.Popen[bytes], name: str) -> None:
        if process.wait():
            raise SystemExit((self.folder / f"{name}.log").read_text()[-3000:])

    def seen(self, name: str) -> list[dict[str, Any]]:
        """The steps that a run has made so far."""
        path = self.folder / name / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [e for e in (json.loads(line) for line in lines if line.endswith("\n")) if e["kind"] == "step"]

    def sent(self, host: str) -> int:
        """Bytes that a host's interface has sent."""
        told = subprocess.run(
            ["ip", "-n", f"{self.cluster}-{host}", "-s", "-json", "link", "show", "eth0"],
            capture_output=True,
            check=True,
        )
        return json.loads(told.stdout)[0]["stats64"]["tx"]["bytes"]


def speed(steps: list[dict[str, Any]]) -> float:
    """Tokens a second, from the end of the last warm-up step to that of the last."""
    seconds = steps[-1]["time"] - steps[WARM - 1]["time"]
    return sum(step["tokens"] for step in steps[WARM:]) / seconds


def watched(bench: Bench, name: str, process: subprocess.Popen[bytes]) -> tuple[int, int, float]:
    """(bytes that the second host sent, steps, seconds) between two looks at a run with two workers."""
    first: tuple[int, int, float] | None = None
    last = (0, 0, 0.0)
    while process.poll() is None:
        done = len(bench.seen(name))
        if WARM <= done < bench.steps - 1:  # the end has traffic of its own
            last = (bench.sent("worker1"), done, time.monotonic())
            first = first or last
        time.sleep(0.5)
    if first is None or last[1] == first[1]:
        raise SystemExit("the run ended before its traffic could be counted: more --steps")
    return last[0] - first[0], last[1] - first[1], last[2] - first[2]


def idle(bench: Bench) -> float:
    """Bytes a second that the second host sends while nothing runs."""
    before = bench.sent("worker1")
    time.sleep(IDLE_SECONDS)
    return (bench.sent("worker1") - before) / IDLE_SECONDS


def a_round(bench: Bench, number: int) -> dict[str, float]:
    one, two = f"one-{number}", f"two-{number}"
    bench.finish(bench.start(one, 1), one)
    rest = idle(bench)
    process = bench.start(two, 2)
    sent, steps, seconds = watched(bench, two, process)
    bench.finish(process, two)
    pair = [f"apart-{number}-{i}" for i in range(2)]
    started = {name: bench.start(name, 1) for name in pair}
    for name, process in started.items():
        bench.finish(process, name)
    both = [bench.seen(name) for name in pair]
    overlap = min(s[-1]["time"] for s in both) - max(s[WARM - 1]["time"] for s in both)
    summary = json.loads((bench.folder / two / "summary.json").read_text())
    return {
        "one": speed(bench.seen(one)),
        "two": speed(bench.seen(two)),
        "apart": sum(speed(s) for s in both),
        "overlap": overlap / max(s[-1]["time"] - s[WARM - 1]["time"] for s in both),
        "bytes": max(0.0, sent - rest * seconds) / steps,
        "adapter": 4.0 * summary["trainable_parameters"],
        "step_seconds": seconds / steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=32, help="rows a step, of both workers together")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--base", default="28m", choices=["28m", "embedded"])
    given = parser.parse_args()
    cluster = f"b{os.getpid() % 10**7}"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = str(the_28m(folder / "base")) if given.base == "28m" else "embedded"
        bench = Bench(cluster, folder, base, given.steps, given.rows, given.rank)
        subprocess.run(
            bench.script("up", "--hosts", "2", "--cpus", "1", "--wait", "900"),
            check=True,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        try:
            rounds = [a_round(bench, number) for number in range(given.rounds)]
        finally:
            subprocess.run(bench.script("down"), check=True)
    report(given, rounds)


def report(given: argparse.Namespace, rounds: list[dict[str, float]]) -> None:
    found = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
    ratios = {key: statistics.median(r[key] / (2 * r["one"]) for r in rounds) for key in ("two", "apart")}
    machine, network = 1 - ratios["apart"], ratios["apart"] - ratios["two"]
    mib = {key: found[key] / 2**20 for key in ("adapter", "bytes")}
    print(
        f"QLoRA on {given.base}, rank {given.rank}, {given.rows} rows a step, one thread a worker\n\n"
        "| what | tokens/s | of 2 × one |\n"
        "|---|---:|---:|\n"
        f"| one worker | {found['one']:,.0f} | 0.50 |\n"
        f"| two workers on two hosts | {found['two']:,.0f} | {ratios['two']:.2f} (mark {MARK}) |\n"
        f"| two runs apart, one a host | {found['apart']:,.0f} | {ratios['apart']:.2f} |\n\n"
        f"adapter in fp32: {mib['adapter']:.2f} MiB; sent by a host in a step of {found['step_seconds']:.2f} s:"
        f" {mib['bytes']:.2f} MiB, {mib['bytes'] / mib['adapter']:.2f} of it\n"
        f"of what is missing to 2 × one, {machine:.2f} is the machine's, which two processes share (the runs apart"
        f" overlapped for {found['overlap']:.0%} of their steps), {network:.2f} the network's and the waiting's"
    )


if __name__ == "__main__":
    main()
