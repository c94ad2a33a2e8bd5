"""DeepSpeed ZeRO on Ray Train workers: the losses and the model of plain data-parallel training, whatever is divided."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ftray.config import load_run
from ftray.data.prepare import prepare
from ftray.train.launch import train
from tests.ray.runs import kill_a_worker_at, steps_of, train_in_turn, write_run

STEPS = 30
CHANGED_AT = 11
"""Step at which a run goes on with another strategy."""
PLAIN = {"method": {"name": "full"}, "train__precision": "bf16", "train__learning_rate": 1e-4, "train__steps": STEPS}
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
        train_in_turn,
        train_loop_config={"files": files, "data": data, "folder": folder, "stop_at": {"changing": CHANGED_AT - 1}},
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(storage_path=str(folder / "ray")),
        torch_config=TorchConfig(backend="gloo"),
    ).fit()
    return json.loads((folder / "summaries.json").read_text())


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
        p, q = losses(folder/name), ref
        print([f"{abs(a-b)/b:.1e}" for a,b in zip(p,q)])
        print(name, worst(losses(folder / name), ref), max(abs(a-b) for a,b in zip(losses(folder/name), ref)), (x-l).abs().max(), (x-l).abs().mean(), runs[name]["state_memory"], runs[name]["seconds"])
    assert 0
