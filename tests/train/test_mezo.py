"""MeZO: the loss falls, workers stay equal bit for bit, memory is that of inference, resume is exact."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ftray.config import Run
from ftray.data.prepared import Row
from ftray.model.load import evaluating, load_base
from ftray.model.methods import attach, trained_state
from ftray.train import loop
from ftray.train.batch import collate
from ftray.train.loop import train_worker
from ftray.train.loss import TargetLoss
from ftray.train.mezo import MeZO, _rounded_at_random
from ftray.train.world import World
from tests.toys import MemoryData, Recorder, dpo_run, random_pairs, random_rows, toy_run

MEZO = "train.optimizer=mezo"
TWO = (MEZO, "train.steps=50", "train.learning_rate=2e-5")


def trained(run: Run, rows: list[Row], channel: Recorder | None = None, held_out: list[Row] | None = None):
    channel = channel or Recorder()
    summary = train_worker(run, MemoryData(rows, held_out), World(), channel)  # type: ignore[arg-type]
    return channel, summary


def questions(count: int, seed: int) -> list[Row]:
    """Classification: some random words, and one of two answers by the half of the vocabulary they are from."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        side = int(random.integers(2))
        words = random.integers(50 + 200 * side, 250 + 200 * side, int(random.integers(4, 9)))
        tokens = np.array([*words, (460, 470)[side]], np.int32)
        rows.append(Row(tokens, np.arange(len(tokens)) == len(tokens) - 1, np.array([len(tokens)], np.int32)))
    return rows


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        ("{name: full}", ("train.learning_rate=1e-4", "seed=1")),
        ("{name: full}", ("train.learning_rate=1e-4", "train.precision=bf16")),
        ("{name: lora, rank: 8, alpha: 16}", ("train.learning_rate=2e-3", "train.perturbation=1e-2")),
    ],
)
def test_the_loss_falls_on_a_classification(tmp_path, method, overrides):
    run = toy_run(
        tmp_path,
        MEZO,
        "train.steps=100",
        "train.batch_rows=16",
        "train.micro_batch_rows=16",
        "train.evaluate_every=100",
        "data.held_out_fraction=0.1",
        *overrides,
        method=method,
    )
    _, summary = trained(run, questions(256, 0), held_out=questions(64, 1))
    assert summary["final_loss"] < 0.85 * summary["base_loss"]


@pytest.mark.parametrize("method", ["{name: qlora, rank: 4}", "{name: dora, rank: 4}"])
def test_a_quantized_base_and_magnitudes(tmp_path, method):
    """Dequantized weights must stay right through the passes in evaluation mode."""
    overrides = ("train.steps=3", "train.learning_rate=1e-3", "train.evaluate_every=3", "data.held_out_fraction=0.1")
    channel, summary = trained(
        toy_run(tmp_path, MEZO, *overrides, method=method), random_rows(24), held_out=random_rows(8)
    )
    assert summary["skipped_steps"] == 0
    assert all(event["grad_norm"] > 0 for event in channel.of("step"))
    assert channel.of("evaluation")[0]["loss"] == pytest.approx(channel.of("evaluation")[1]["loss"], rel=0.2)


def test_preferences(tmp_path):
    run = dpo_run(tmp_path, MEZO, "train.steps=40", "train.learning_rate=1e-4", method="{name: full}")
    channel, _ = trained(run, random_pairs(64))
    assert np.mean(channel.losses[-5:]) < 0.95 * np.log(2)
    assert channel.of("step")[-1]["margin"] > 0.1


@pytest.mark.parametrize(
    ("method", "precision"), [("{name: lora, rank: 4, alpha: 8}", "fp32"), ("{name: full}", "bf16")]
)
def test_resume_is_exact(tmp_path, method, precision):
    overrides = (MEZO, "train.steps=8", "train.commit_every=3", f"train.precision={precision}")
    whole, _ = trained(toy_run(tmp_path / "whole", *overrides, method=method), random_rows(32))
    run = toy_run(tmp_path / "broken", *overrides, method=method)
    for fail_at in (2, 5):
        with pytest.raises(InterruptedError):
            trained(run, random_rows(32), Recorder(fail_at=fail_at))
    trained(run, random_rows(32))
    lines = [json.loads(line) for line in (tmp_path / "broken/metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if line["kind"] == "step"] == whole.losses
    a, b = (load_file(next((tmp_path / n / "artefact").glob("*model.safetensors"))) for n in ("whole", "broken"))
    assert all(torch.equal(a[key], b[key]) for key in a)


# --------------------------------------------------------------------------------------------------------- the step


def strategy(run: Run) -> MeZO:
    model = attach(load_base(run)[0], run).train()
    return MeZO(run, model, TargetLoss(model), World())


def weights(mezo: MeZO) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in mezo.model.named_parameters() if p.requires_grad}


def test_the_slope_is_the_gradient_along_the_direction(tmp_path):
    mezo = strategy(toy_run(tmp_path, MEZO, method="{name: full}"))
    batch, distance = collate(random_rows(4), 0, packed=True), mezo.train.perturbation
    before = weights(mezo)
    with evaluating(mezo.model):
        mezo._move(to=distance)
    direction = {name: (value - before[name]) / distance for name, value in weights(mezo).items()}
    assert all(abs(float(z.std()) - 1) < 0.1 for z in direction.values() if z.numel() > 1000)
    mezo._move(back=distance)
    mezo.gradients([batch], len(batch.labels), [0])
    mezo.update(1.0, apply=False)
    for parameter in mezo.model.parameters():
        parameter.requires_grad_(True)
    mezo.model.eval()
    (mezo.objective(batch) / len(batch.labels)).backward()
    named = dict(mezo.model.named_parameters())
    slope = sum(float((named[name].grad * z).sum()) for name, z in direction.items())
    assert mezo.slope == pytest.approx(slope, rel=0.05)


def test_a_step_moves_along_the_direction_and_a_skipped_one_nowhere(tmp_path):
    mezo = strategy(toy_run(tmp_path, MEZO, "train.weight_decay=0.1", method="{name: full}"))
    batch, before = collate(random_rows(4), 0, packed=True), weights(mezo)
    mezo.gradients([batch], len(batch.labels), [0])
    mezo.update(1e-3, apply=False)
    for name, value in weights(mezo).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=2e-6)
    mezo._move(to=1.0)
    direction = {name: value - before[name] for name, value in weights(mezo).items()}
    mezo._move(back=1.0)
    mezo.gradients([batch], len(batch.labels), [0])
    mezo.update(1e-3, apply=True)
    for name, value in weights(mezo).items():
        decay = 1e-4 if value.ndim >= 2 else 0.0
        expected = before[name] * (1 - decay) - 1e-3 * mezo.slope * direction[name]
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-5)


def test_bf16_weights_come_back(tmp_path):
    """All but the few that pass a power of two come back bit for bit, and these nearly."""
    mezo = strategy(toy_run(tmp_path, MEZO, "train.precision=bf16", method="{name: full}"))
    before = weights(mezo)
    assert {value.dtype for value in before.values()} == {torch.bfloat16}
    for _ in range(20):
        mezo.gradients([collate(random_rows(1), 0, packed=True)], 10, [0])
        mezo.update(0.0, apply=False)
    after = weights(mezo)
    changed = sum(int((after[name] != before[name]).sum()) for name in before)
    assert changed < 0.5 * sum(value.numel() for value in before.values())
    drift = torch.cat([(after[name].float() - before[name].float()).flatten() for name in before])
    scale = torch.cat([value.float().flatten() for value in before.values()])
    assert drift.std() < 2e-3 * scale.std()


def test_rounding_at_random_is_right_on_average():
    value = torch.full((200_000,), 1.0 + 2**-10)
    rounded = _rounded_at_random(value.clone(), torch.Generator().manual_seed(0))
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert set(rounded.tolist()) == {1.0, 1.0 + 2**-7}
    assert float(rounded.mean()) == pytest.approx(1 + 2**-10, abs=5e-5)
    negative = _rounded_at_random(-value, torch.Generator().manual_seed(0))
    assert float(negative.mean()) == pytest.approx(-1 - 2**-10, abs=5e-5)


# ------------------------------------------------------------------------------------------------------ what it costs

_MEMORY = """
import ctypes
import gc
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: huge pages are resident where a few bytes are used
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from ftray.model import attention
from ftray.model.load import evaluating
from ftray.train.batch import collate
from ftray.train.loss import TargetLoss
from ftray.train.mezo import MeZO
from ftray.train.strategy import DataParallel
from ftray.train.world import World
from tests.toys import random_rows, toy_run

def resident(key):
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

def peak_of(work):
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
    for _ in range(3):
        work()
    return resident("VmHWM") - start

def step(strategy):
    strategy.gradients([batch], len(batch.labels), [0])
    strategy.update(1e-6, apply=True)

def llama(hidden, layers):
    config = LlamaConfig(vocab_size=4096, hidden_size=hidden, intermediate_size=1408, num_hidden_layers=layers,
                         num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True,
                         attn_implementation=attention.IMPLEMENTATION)
    return LlamaForCausalLM(config).to(torch.bfloat16).train()

torch.set_num_threads(1)
attention.register()
settings = ("train.precision=bf16", "train.optimizer=sgd", "train.momentum=0")
sgd = toy_run("unused", *settings, method="{name: full}")
run = toy_run("unused", *settings[:1], "train.optimizer=mezo", method="{name: full}")
batch = collate(random_rows(16), 0, packed=True)
small = llama(64, 1)
start = 0
for strategy in (MeZO(run, small, TargetLoss(small), World()), DataParallel(sgd, small, TargetLoss(small), World())):
    peak_of(lambda: step(strategy))  # what is loaded and compiled at first use
del small, strategy
gc.collect()
start = resident("VmRSS")
model = llama(512, 8)
mezo = MeZO(run, model, TargetLoss(model), World())
with evaluating(model):
    inference = peak_of(lambda: mezo.forward(batch))
tuning = peak_of(lambda: step(mezo))
assert all(p.grad is None for p in model.parameters())
plain = DataParallel(sgd, model, mezo.objective, World())
gradients = peak_of(lambda: step(plain))
print("BYTES", sum(p.numel() * p.element_size() for p in model.parameters()), inference, tuning, gradients)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs /proc to forget a peak")
def test_memory_is_that_of_inference():
    """Peak resident memory beyond what the process had before the model; SGD without momentum is far above it."""
    done = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    model, inference, tuning, gradients = map(int, done.stdout.split("BYTES")[1].split())
    assert 50e6 < model < inference
    assert tuning < 1.1 * inference
    assert gradients > 1.5 * inference


def _one_of_two(rank: int, folder: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    sent: list[int] = []
    real = dist.all_reduce

    def counting(tensor, *arguments, **options):
        sent.append(tensor.numel())
        return real(tensor, *arguments, **options)

    dist.all_reduce = counting
    run = toy_run(f"{folder}/run", *TWO, "workers.count=2", method="{name: full}")
    worker = loop._Worker(run, MemoryData(random_rows(64)), World(rank, 2), Recorder(), loop._alone)  # type: ignore[arg-type]
    worker.resume()
    sent.clear()
    worker.train()
    with worker.equipment.lend() as model:
        save_file({k: v.clone() for k, v in trained_state(model).items()}, f"{folder}/{rank}.safetensors")
    losses = [e["loss"] for e in worker.channel.of("step")]  # type: ignore[attr-defined]
    Path(f"{folder}/{rank}.json").write_text(json.dumps({"sent": max(sent), "losses": losses}))
    dist.destroy_process_group()


def test_two_workers_stay_equal_bit_for_bit_and_exchange_numbers_alone(tmp_path):
    torch.multiprocessing.start_processes(_one_of_two, (str(tmp_path),), nprocs=2, start_method="spawn")
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    told = json.loads((tmp_path / "0.json").read_text())
    assert told["sent"] <= 3, "the loss, and the wishes to stop and to commit"
    alone, _ = trained(toy_run(tmp_path / "alone", *TWO, method="{name: full}"), random_rows(64))
    assert told["losses"] == pytest.approx(alone.losses, rel=1e-3)
