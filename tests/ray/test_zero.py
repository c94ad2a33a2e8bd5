"""DeepSpeed ZeRO on Ray Train workers: the losses and the model of plain data-parallel training, whatever is divided."""

from __future__ import annotations

import math
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ftray.config import load_run
from ftray.data.prepare import prepare
from ftray.data.prepared import PreparedData
from ftray.train.launch import train
from ftray.train.loop import train_worker
from ftray.train.world import World
from tests.ray.runs import kill_a_worker_at, steps_of, write_run
from tests.toys import Recorder

STEPS = 30
CHANGED_AT = 11
"""Step at which a run goes on with another strategy."""
PLAIN = {"method": {"name": "full"}, "train__precision": "bf16", "train__learning_rate": 3e-4, "train__steps": STEPS}
LORA = {"name": "lora", "rank": 4, "alpha": 8}
CPU = {"offload_optimizer": "cpu"}
STRATEGIES: dict[str, dict[str, Any]] = {
    "zero1": {"zero": 1},
    "zero1-cpu": {"zero": 1, **CPU},
    "zero2": {"zero": 2},
    "zero2-cpu": {"zero": 2, **CPU},
    "zero3": {"zero": 3},
    "zero3-cpu": {"zero": 3, **CPU, "offload_parameters": "cpu"},
    "zero3-nvme": {"zero": 3, "offload_optimizer": "nvme", "offload_parameters": "nvme"},
}


def has_libaio() -> bool:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return AsyncIOBuilder().is_compatible()


def needs_libaio(name: str):
    return pytest.param(name, marks=pytest.mark.skipif("nvme" in name and not has_libaio(), reason="no libaio-dev"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, local_ray) -> Path:
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def runs(folder) -> dict[str, dict[str, Any]]:
    """The summaries of all these runs, one after the other on the same two workers: starting them takes longest."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    files = {"plain": write_run(folder, "plain", **PLAIN)}
    for name, strategy in STRATEGIES.items():
        if "nvme" in name:
            if not has_libaio():
                continue
            strategy = strategy | {"nvme_path": str(folder / "nvme")}
        files[name] = write_run(folder, name, **PLAIN, strategy=strategy)
    files["changing"] = write_run(folder, "changing", **PLAIN, strategy=STRATEGIES["zero3-cpu"])
    files["zero3-lora"] = write_run(folder, "zero3-lora", **PLAIN | {"method": LORA}, strategy={"zero": 3})
    files["zero2-qlora"] = write_run(
        folder, "zero2-qlora", **PLAIN | {"method": LORA | {"name": "qlora"}}, strategy={"zero": 2}
    )
    data = prepare(load_run(files["plain"]), lambda _: None)
    TorchTrainer(
        train_all,
        train_loop_config={"files": files, "data": data, "folder": folder},
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(storage_path=str(folder / "ray")),
        torch_config=TorchConfig(backend="gloo"),
    ).fit()
    return torch.load(folder / "summaries.pt")


def train_all(config: dict[str, Any]) -> None:
    import ray.train

    context = ray.train.get_context()
    world = World(context.get_world_rank(), context.get_world_size())
    torch.set_num_threads(1)
    summaries = {}
    for name, file in config["files"].items():
        channel = Recorder(stop_at=CHANGED_AT - 1 if name == "changing" else None)
        summaries[name] = train_worker(load_run(file), PreparedData.open(config["data"]), world, channel)
    if world.is_first:
        torch.save(summaries, config["folder"] / "summaries.pt")


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in steps_of(run)]


def worst(mine: list[float], theirs: list[float]) -> float:
    assert len(mine) == len(theirs)
    return max(abs(a - b) / abs(b) for a, b in zip(mine, theirs, strict=True))


def test_measure(folder, runs):
    from transformers import AutoModelForCausalLM
    ref = losses(folder / "plain")
    print(ref)
    ids = torch.arange(3, 200)[None]
    def logits(n):
        with torch.no_grad(): return AutoModelForCausalLM.from_pretrained(folder / n / "artefact", dtype=torch.float32)(ids).logits
    l = logits("plain"); print(l.abs().max(), l.std())
    for name in STRATEGIES:
        x = logits(name)
        print(name, worst(losses(folder / name), ref), max(abs(a-b) for a,b in zip(losses(folder/name), ref)), (x-l).abs().max(), (x-l).abs().mean(), runs[name]["state_memory"], runs[name]["seconds"])
    assert 0
