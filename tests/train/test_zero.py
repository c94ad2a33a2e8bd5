"""ZeRO in one process, without Ray: exact resume, another strategy that goes on, steps that are left out."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ftray.data.tokenizer import local_model_folder
from ftray.errors import ModelError
from ftray.train import loop
from ftray.train.loop import train_worker
from ftray.train.world import World
from tests.toys import MemoryData, Recorder, random_rows, toy_run

ROWS = random_rows(64)
CPU = "offload_optimizer: cpu"
DIVIDED = f"zero: 3, {CPU}, offload_parameters: cpu"
FULL = ("train.steps=6", "train.learning_rate=3e-4", "train.batch_rows=6", "train.micro_batch_rows=2")


def trained(folder: Path, strategy: str | None, *overrides: str, channel: Recorder | None = None, method: str = "full"):
    channel = channel or Recorder()
    chosen = (f"strategy={{{strategy}}}",) if strategy else ()
    run = toy_run(folder, *FULL, *overrides, *chosen, method=f"{{name: {method}}}")
    summary = train_worker(run, MemoryData(ROWS, ROWS[:5]), World(), channel)  # type: ignore[arg-type]
    return channel, summary


def state(folder: Path, step: int = 6) -> dict[str, torch.Tensor]:
    commit = folder / f"commits/step-{step:08d}"
    return load_file(commit / "model.safetensors") | load_file(commit / "optimizer.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def worst(mine: list[float], theirs: list[float]) -> float:
    assert len(mine) == len(theirs)
    return max(abs(a - b) / abs(b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("strategy", ["zero: 1", f"zero: 2, {CPU}", "zero: 3", f"zero: 3, {CPU}"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_is_exact(tmp_path, strategy, precision):
    overrides = ("train.commit_every=2", f"train.precision={precision}")
    trained(tmp_path / "whole", strategy, *overrides)
    with pytest.raises(InterruptedError):
        trained(tmp_path / "broken", strategy, *overrides, channel=Recorder(fail_at=5))
    _, summary = trained(tmp_path / "broken", strategy, *overrides)
    assert summary["resumed_from"] == 4
    assert same(state(tmp_path / "whole"), state(tmp_path / "broken"))
    artefacts = [load_file(tmp_path / name / "artefact/model.safetensors") for name in ("whole", "broken")]
    assert same(*artefacts)


@pytest.mark.parametrize("strategy", ["zero: 1", f"zero: 1, {CPU}", "zero: 2", f"zero: 2, {CPU}", DIVIDED])
def test_in_fp32_every_stage_gives_the_losses_without_it(tmp_path, strategy):
    plain, _ = trained(tmp_path / "plain", None)
    other, _ = trained(tmp_path / "zero", strategy)
    assert worst(other.losses, plain.losses) < 1e-4
    norms = [[event["grad_norm"] for event in channel.of("step")] for channel in (plain, other)]
    assert worst(*norms) < 1e-3


def test_another_strategy_goes_on(tmp_path):
    """Commits are by parameter name, so nothing of a strategy is in them."""
    plain, _ = trained(tmp_path / "plain", None, "train.steps=12")
    ways = [(f"zero: 3, {CPU}", 3), (None, 6), ("zero: 2", 9), ("zero: 1", 100)]
    for strategy, until in ways:
        channel, _ = trained(tmp_path / "other", strategy, "train.steps=12", channel=Recorder(stop_at=until - 1))
    assert channel.of("resume")[0]["step"] == 9
    assert worst([*channel.losses], plain.losses[9:]) < 1e-4
    a, b = state(tmp_path / "plain", 12), state(tmp_path / "other", 12)
    assert a.keys() == b.keys()
    assert max(float((a[k].float() - b[k].float()).abs().max()) for k in a) < 1e-4


@pytest.mark.parametrize("strategy", ["zero: 1", f"zero: 2, {CPU}", "zero: 3"])
def test_a_step_without_a_finite_loss_changes_nothing(tmp_path, monkeypatch, strategy):
    original = loop.TargetLoss.forward
    calls = []

    def forward(module, batch):
        calls.append(len(batch.labels))
        loss = original(module, batch)
        return loss + float("inf") if len(calls) == 8 else loss  # a constant: gradients stay finite

    monkeypatch.setattr(loop.TargetLoss, "forward", forward)
    overrides = ("train.commit_every=1", "train.keep_last=9", "train.keep_best=false")
    _, summary = trained(tmp_path, strategy, *overrides)
    assert summary["skipped_steps"] == 1
    states = [state(tmp_path, step) for step in range(1, 7)]
    assert [same(a, b) for a, b in itertools.pairwise(states)].count(True) == 1


def test_a_folder_without_all_weights_is_refused_when_created_divided(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(local_model_folder(toy_run(tmp_path).model), base)
    weights = load_file(base / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, base / "model.safetensors")
    with pytest.raises(ModelError, match=r"1 weights are missing, first \['model.norm.weight'\]"):
        trained(tmp_path / "run", "zero: 3", f"model.path={base}")


def test_fresh_weights_are_drawn_as_without_zero(tmp_path):
    """Not the same numbers, but the same spread in every parameter."""
    overrides = ("model.random_weights=true", "train.steps=1", "train.schedule.warmup=0", "train.learning_rate=1e-9")
    for name, strategy in (("plain", None), ("zero", "zero: 3")):
        trained(tmp_path / name, strategy, *overrides)
    plain, divided = (load_file(tmp_path / name / "artefact/model.safetensors") for name in ("plain", "zero"))
    assert plain.keys() == divided.keys()
    for key in plain:
        assert float(divided[key].std()) == pytest.approx(float(plain[key].std()), rel=0.05, abs=1e-6)
        assert float(divided[key].mean()) == pytest.approx(float(plain[key].mean()), abs=1e-3)


@pytest.mark.parametrize(
    ("method", "precision", "close"), [("lora", "fp32", 1e-4), ("lora", "bf16", 2e-3), ("dora", "fp32", 1e-4)]
)
def test_adapters_on_a_divided_base_give_the_losses_without_zero(tmp_path, method, precision, close):
    overrides = ("train.learning_rate=2e-3", "train.gradient_checkpointing=true", f"train.precision={precision}")
    plain, _ = trained(tmp_path / "plain", None, *overrides, method=method)
    divided, _ = trained(tmp_path / "zero", "zero: 3", *overrides, method=method)
    assert worst(divided.losses, plain.losses) < close
    a, b = (load_file(tmp_path / name / "artefact/adapter_model.safetensors") for name in ("plain", "zero"))
    assert a.keys() == b.keys()
    assert all(tensor.dtype == torch.float32 and tensor.abs().sum() > 0 for tensor in b.values())
