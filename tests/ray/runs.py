"""Small runs that the tests of this folder train on Ray, and the processes that belong to them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import yaml
from safetensors.torch import load_file

if TYPE_CHECKING:
    from ftray.config import Run
    from ftray.data.prepared import PreparedData
    from tests.toys import Recorder

WORDS = ["river", "stone", "lantern", "copper", "window", "garden", "winter", "story", "basket", "silver", "meadow"]


def write_rows(path: Path, count: int, seed: int = 0) -> Path:
    """JSONL rows with a rule to learn: say the words again, backwards."""
    random = np.random.default_rng(seed)
    with path.open("w") as file:
        for _ in range(count):
            words = [str(w) for w in random.choice(WORDS, int(random.integers(3, 8)))]
            row = {"prompt": "Backwards: " + " ".join(words) + "\n", "completion": " ".join(reversed(words))}
            file.write(json.dumps(row) + "\n")
    return path


def write_run(folder: Path, name: str, **changes: Any) -> Path:
    """A run file in `folder` for rows there; dotted keys, with `__` for the dot, change it."""
    for split, count in (("train", 120), ("held_out", 24)):
        if not (folder / f"{split}.jsonl").exists():
            write_rows(folder / f"{split}.jsonl", count, seed=len(split))
    run: dict[str, Any] = {
        "name": name,
        "model": {"path": "embedded"},
        "method": {"name": "lora", "rank": 4, "alpha": 8},
        "data": {
            "sources": [{"path": str(folder / "train.jsonl"), "format": "prompt_completion"}],
            "held_out": [{"path": str(folder / "held_out.jsonl"), "format": "prompt_completion"}],
            "max_length": 128,
            "cache": str(folder / "prepared"),
        },
        "train": {
            "steps": 40,
            "batch_rows": 8,
            "micro_batch_rows": 4,
            "learning_rate": 2e-3,
            "precision": "fp32",
            "commit_every": 7,
            "keep_last": 2,
        },
        "workers": {"count": 2, "gpus": 0, "cpus": 1},
        "output": str(folder / name),
    }
    for key, value in changes.items():
        at, (*path, last) = run, key.split("__")
        for part in path:
            at = at[part]
        at[last] = value
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(run))
    return file


def train_alone(run: Run) -> tuple[PreparedData, Recorder, dict[str, Any]]:
    """(its rows, what was told, the summary) of a run that one worker trains in this process, without Ray Train."""
    from ftray.data.prepare import prepare
    from ftray.data.prepared import PreparedData
    from ftray.train.loop import train_worker
    from ftray.train.world import World
    from tests.toys import Recorder

    data, channel = PreparedData.open(prepare(run, lambda _: None)), Recorder()
    return data, channel, train_worker(run, data, World(), channel)


def train_in_turn(config: dict[str, Any]) -> None:
    """On each Ray Train worker: the dumped config["runs"], one after the other; summaries go to a file."""
    import ray.train
    import torch

    from ftray.config import Run
    from ftray.data.prepared import PreparedData
    from ftray.train.loop import train_worker
    from ftray.train.world import World
    from tests.toys import Recorder

    context = ray.train.get_context()
    world = World(context.get_world_rank(), context.get_world_size())
    torch.set_num_threads(1)
    summaries = {}
    for name, run in config["runs"].items():
        channel = Recorder(stop_at=config["stop_at"].get(name))
        summaries[name] = train_worker(Run.model_validate(run), PreparedData.open(config["data"]), world, channel)
    if world.is_first:
        Path(config["summaries"]).write_text(json.dumps(summaries))


def events_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of this kind in a run's metrics, as far as they are written."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    events = [json.loads(line) for line in lines if line.endswith("\n")]
    return [event for event in events if event["kind"] == kind]


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return events_of(folder, "step")


def tensors(folder: Path) -> dict[str, Any]:
    return load_file(folder / "artefact" / "adapter_model.safetensors")


def processes(*titles: str, below: int | None = None) -> list[psutil.Process]:
    """Processes below `below`, or this one, whose command line, or Ray's title for them, holds one of these words."""
    found = []
    for process in psutil.Process(below).children(recursive=True):
        with suppress(psutil.Error):  # it has ended by now
            line = " ".join(process.cmdline())
            if any(title in line for title in titles):
                found.append(process)
    return found


def workers(below: int | None = None) -> list[psutil.Process]:
    """The Ray Train workers among the descendants of a driver."""
    return processes("ray::RayTrainWo", below=below)


@contextmanager
def standing_still() -> Iterator[list[psutil.Process]]:
    """The workers below this process, stopped until the block ends: however fast its steps are, a run stays where it
    is. For less than the `SILENT_SECONDS` of `ftray.train.pulse`."""
    stopped = workers()
    for process in stopped:
        process.suspend()
    try:
        yield stopped
    finally:
        for process in stopped:
            with suppress(psutil.NoSuchProcess):
                process.resume()


def wait_for(condition: Callable[[], Any], seconds: float = 180.0, every: float = 0.02) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(every)
    raise TimeoutError(f"nothing in {seconds:g} s")


def kill_a_worker_at(folder: Path, step: int, *, pid: int | None = None) -> threading.Thread:
    """A started thread that SIGKILLs the run's last worker once metrics.jsonl shows `step`."""

    def watch() -> None:
        wait_for(lambda: any(event["step"] >= step for event in steps_of(folder)))
        workers(pid)[-1].kill()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread
