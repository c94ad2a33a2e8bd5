"""DeepSpeed ZeRO on Ray Train workers: losses and model are those of plain data-parallel training."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ftray.config import Run, load_run
from ftray.data.prepare import prepare
from ftray.data.prepared import PreparedData
from ftray.embedded import base_path
from ftray.model.plan import make_plan
from ftray.model.source import find_shapes
from ftray.train.launch import train
from ftray.train.loop import train_worker
from ftray.train.world import World
from tests.ray.runs import kill_a_worker_at, steps_of, train_in_turn
from tests.toys import Recorder

pytestmark = pytest.mark.timeout(1800)
"""The first test to need them compiles DeepSpeed's native parts."""
STEPS = 30
CHANGED_AT = 11
"""Step at which a run goes on with other workers and another strategy."""
STRATEGIES = {
    "zero1": "{zero: 1}",
    "zero1-cpu": "{zero: 1, offload_optimizer: cpu}",
    "zero2": "{zero: 2}",
    "zero2-cpu": "{zero: 2, offload_optimizer: cpu}",
    "zero3": "{zero: 3}",
    "zero3-cpu": "{zero: 3, offload_optimizer: cpu, offload_parameters: cpu}",
    "zero3-nvme": "{zero: 3, offload_optimizer: nvme, offload_parameters: nvme, nvme_path: FOLDER/nvme}",
}


def has_libaio() -> bool:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return AsyncIOBuilder().is_compatible()


def with_nvme() -> bool:
    return has_libaio() and bool(os.environ.get("FTRAY_LONG"))


def names(*among: str) -> list[Any]:
    # DeepSpeed's access to NVMe takes four minutes of two cores to compile
    marks = {"zero3-nvme": [pytest.mark.long, pytest.mark.skipif(not has_libaio(), reason="no libaio-dev")]}
    return [pytest.param(name, marks=marks.get(name, [])) for name in among]


def recipe(folder: Path, name: str, strategy: str = "null", *overrides: str) -> Run:
    """The shipped recipe of ZeRO 3 on two CPU workers, with another strategy."""
    strategy = strategy.replace("FOLDER", str(folder))
    return load_run(
        "tiny-full-zero3-offload",
        [
            f"name={name}",
            f"output={folder}/{{name}}",
            f"strategy={strategy}",
            f"data.cache={folder}/prepared",
            "data.held_out=[]",
            f"train.steps={STEPS}",
            "train.batch_rows=16",
            "train.micro_batch_rows=4",
            "train.learning_rate=3e-4",
            "train.commit_every=7",
            "workers.gpus=0",
            "workers.cpus=1",
            *overrides,
        ],
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, local_ray) -> Path:
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def data(folder) -> str:
    return prepare(recipe(folder, "plain"), lambda _: None)


@pytest.fixture(scope="module")
def summaries(folder, data) -> dict[str, dict[str, Any]]:
    """Of all these runs, one after the other on the same two workers: starting workers takes longer than a run."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    runs = {"plain": recipe(folder, "plain")}
    runs |= {n: recipe(folder, n, s) for n, s in STRATEGIES.items() if "nvme" not in n or with_nvme()}
    runs["changing"] = recipe(folder, "changing", STRATEGIES["zero3-cpu"])
    for name, method, strategy in (("lora", "lora", "zero3"), ("qlora", "qlora", "zero2")):
        shorter = (f"method={{name: {method}, rank: 4}}", "train.steps=8", "train.learning_rate=2e-3")
        runs[name] = recipe(folder, name, STRATEGIES[strategy], *shorter)
    TorchTrainer(
        train_in_turn,
        train_loop_config={
            "runs": {name: run.dump() for name, run in runs.items()},
            "data": data,
            "summaries": str(folder / "summaries.json"),
            "stop_at": {"changing": CHANGED_AT - 1},
        },
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


def logits(run: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(3, 2000, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(run / "artefact", dtype=torch.float32)(tokens).logits


def state(run: Path) -> dict[str, torch.Tensor]:
    commit = run / f"commits/step-{STEPS:08d}"
    return load_file(commit / "model.safetensors") | load_file(commit / "optimizer.safetensors")


@pytest.mark.parametrize("name", names(*STRATEGIES))
def test_losses_follow_those_without_zero(folder, summaries, name):
    """In bf16, relative; measured: 0.0012."""
    plain = losses(folder / "plain")
    assert plain[-1] < 0.4 * plain[0]
    assert worst(losses(folder / name), plain) < 2e-3


@pytest.mark.parametrize("name", names(*STRATEGIES))
def test_the_exported_model_is_that_without_zero(folder, summaries, name):
    """Logits differ by less than 2 % of the largest: Adam moves weights without much gradient either way."""
    plain, divided = logits(folder / "plain"), logits(folder / name)
    assert (divided - plain).abs().max() < 2e-2 * plain.abs().max()


def test_what_a_worker_holds_is_its_share(summaries):
    plain = summaries["plain"]["state_memory"][0]
    parameters = summaries["plain"]["parameters"]
    assert plain["weights"] == plain["gradients"] == 4 * parameters
    for name, weights, gradients in (("zero1", 4, 4), ("zero2", 4, 2), ("zero3", 2, 2)):
        for held in summaries[name]["state_memory"]:
            shares = {"weights": weights, "masters": 2, "states": 4, "gradients": gradients}
            assert {key: held[key] / parameters for key in shares} == pytest.approx(shares, rel=0.1)


@pytest.mark.parametrize("name", names("plain", *STRATEGIES))
def test_the_plan_is_what_a_worker_holds(folder, summaries, name):
    """Weights, gradients and optimizer, within 15 % of the memory plan; what lies on NVMe with its masters there."""
    run = recipe(folder, name, STRATEGIES.get(name, "null"))
    for held in summaries[name]["state_memory"]:
        assert planned_states(run) == pytest.approx(held_states(held), rel=0.15)


def planned_states(run: Run) -> int:
    passing = "on their way to and from NVMe"
    items = make_plan(run, find_shapes(run.model)[0]).items
    return sum(item.bytes for item in items if item.stays and item.name != passing)


def held_states(held: dict[str, int]) -> int:
    return sum(held[key] for key in ("weights", "masters", "states", "gradients", "nvme"))


def test_memory_of_a_larger_base_falls_with_the_workers(folder, data):
    """108 million random parameters under ZeRO 3 with offload: within 15 % of the plan, and half with two workers."""
    base = folder / "base"
    shutil.copytree(base_path(), base, ignore=shutil.ignore_patterns("*.safetensors"))
    shape = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
    shape |= {"num_key_value_heads": 12, "head_dim": 64, "vocab_size": 15_000, "tie_word_embeddings": False}
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | shape))
    found = {}
    for workers in (1, 2):
        run = recipe(
            folder,
            f"large-{workers}",
            STRATEGIES["zero3-cpu"],
            f"model={{path: {base}, random_weights: true}}",
            "train.steps=1",
            "train.batch_rows=2",
            "train.commit_every=null",
            f"workers.count={workers}",
        )
        if workers == 1:
            summary = train_worker(run, PreparedData.open(data), World(), Recorder())
        else:
            summary = train(run, on_event=lambda _: None, stop=threading.Event())
        assert summary["parameters"] > 100_000_000
        found[workers] = held_states(summary["state_memory"][0])
        assert found[workers] == pytest.approx(planned_states(run), rel=0.15)
        shutil.rmtree(folder / f"large-{workers}")
    assert found[2] == pytest.approx(found[1] / 2, rel=0.05)


@pytest.mark.faults
def test_a_killed_worker_changes_nothing(folder, summaries):
    run = recipe(folder, "killed", STRATEGIES["zero3-cpu"])
    killer = kill_a_worker_at(folder / "killed", 10)
    summary = train(run, on_event=lambda _: None, stop=threading.Event())
    assert not killer.is_alive()
    assert summary["resumed_from"]
    mine, theirs = state(folder / "killed"), state(folder / "zero3-cpu")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert losses(folder / "killed") == losses(folder / "zero3-cpu")


def test_one_worker_goes_on_with_another_stage(folder, data, summaries):
    assert summaries["changing"]["reason"] == "stopped"
    run = recipe(folder, "changing", STRATEGIES["zero2"])
    summary = train_worker(run, PreparedData.open(data), World(), Recorder())
    assert summary["resumed_from"] == CHANGED_AT
    assert summary["reason"] == "finished"
    assert worst(losses(folder / "changing"), losses(folder / "plain")) < 2e-3


@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_peft_loads_the_adapter(folder, summaries, name):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from ftray.data.tokenizer import local_model_folder

    trained = losses(folder / name)
    assert trained[-1] < 0.8 * trained[0]
    base = AutoModelForCausalLM.from_pretrained(local_model_folder(recipe(folder, "plain").model), dtype=torch.float32)
    tokens = torch.arange(3, 60)[None]
    with torch.no_grad():
        before = base(tokens).logits
        adapted = PeftModel.from_pretrained(base, folder / name / "artefact")(tokens).logits
    weights = load_file(folder / name / "artefact/adapter_model.safetensors")
    assert all(tensor.numel() and tensor.abs().sum() > 0 for tensor in weights.values())
    assert (adapted - before).abs().max() > 0.1
