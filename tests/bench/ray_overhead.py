"""What Ray Train costs: the same run under Ray Train with one worker, and its loop called directly, in one run.

    FTRAY_DATA=… python tests/bench/ray_overhead.py [--rounds 4] [--steps 24]

Base and rows are those of `train_speed.py`. Whole runs alternate between the two. The speed of a run is taken from the
times of its own step events, after the first steps, so that neither start nor end of a run counts. Both sides have the
allocator settings of ftray's workers. Printed: target tokens/s of either, and the ratio of each pair.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from train_speed import SHAPE, make_run
from transformers.utils.logging import disable_progress_bar

from ftray.config import Run, Workers
from ftray.data.prepare import prepare
from ftray.data.prepared import PreparedData
from ftray.manifest import digest_of
from ftray.session import ALLOCATOR, THREADS, ray_session
from ftray.train.launch import train
from ftray.train.loop import train_worker
from ftray.train.world import World

WARM_UP = 4
"""Steps that do not count."""


class Events:
    """Collects step events; also the channel of a loop without Ray."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def emit(self, event: dict[str, Any]) -> None:
        if event["kind"] == "step":
            self.steps.append(event)

    def stop_requested(self) -> bool:
        return False

    def speed(self) -> float:
        """Target tokens a second, from the end of the last step of warm-up to the end of the last step."""
        counted = self.steps[WARM_UP:]
        return sum(e["target_tokens"] for e in counted) / (counted[-1]["time"] - self.steps[WARM_UP - 1]["time"])


def directly(run: Run) -> float:
    events = Events()
    with ray_session(cpus=2):
        data_uri = prepare(run, lambda event: None)
    train_worker(run, PreparedData.open(data_uri), World(), events)
    return events.speed()


def under_ray(run: Run) -> float:
    events = Events()
    train(run, on_event=events.emit, stop=threading.Event())
    return events.speed()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4, help="pairs of runs")
    parser.add_argument("--steps", type=int, default=60, help="steps of a run, with those that do not count")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch, on both sides")
    arguments = parser.parse_args()
    settings = ALLOCATOR | THREADS
    if not settings.keys() <= os.environ.keys():  # as ftray's workers have it
        os.execve(sys.executable, [sys.executable, *sys.argv], settings | os.environ)
    disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    data = Path(os.environ["FTRAY_DATA"]).resolve()
    data = data / "data" if (data / "data").is_dir() else data
    scratch = Path(tempfile.gettempdir()) / f"ftray-train-speed-{digest_of(SHAPE)[:8]}"

    def speed(kind: Callable[[Run], float]) -> float:
        run = make_run("e2e", data, scratch, arguments.steps)
        return kind(run.model_copy(update={"workers": Workers(count=1, gpus=0, cpus=arguments.threads)}))

    pairs = []
    for number in range(arguments.rounds):
        first, second = (under_ray, directly) if number % 2 else (directly, under_ray)
        found = {first: speed(first), second: speed(second)}
        pairs.append((found[under_ray], found[directly]))
        print(f"  pair {number + 1}: {pairs[-1][0]:,.0f} under Ray, {pairs[-1][1]:,.0f} directly", flush=True)
    ratios = [a / b for a, b in pairs]
    under, direct = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"\ntarget tokens/s, {torch.get_num_threads()} threads: {under:,.0f} under Ray Train, {direct:,.0f} directly")
    print(f"ratio: median {statistics.median(ratios):.3f} [{min(ratios):.3f}–{max(ratios):.3f}]")


if __name__ == "__main__":
    main()
