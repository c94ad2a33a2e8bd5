"""Optimizers: their formulas, the groups and rates they are given, exact resume; noise and smoothing in training."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ftray.config import Run
from ftray.model.load import evaluating, load_base
from ftray.model.methods import attach
from ftray.model.targets import block_of
from ftray.train.batch import collate
from ftray.train.loop import train_worker
from ftray.train.loss import TargetLoss, noisy_embeddings
from ftray.train.optimizers import build_optimizer, rate_factors, set_rate
from ftray.train.world import World
from tests.toys import MemoryData, Recorder, random_rows, toy_run

ROWS = random_rows(64)
HELD_OUT = random_rows(16, seed=1)


def trained(run: Run, channel: Recorder | None = None, held_out: list | None = None):
    channel = channel or Recorder()
    summary = train_worker(run, MemoryData(ROWS, held_out), World(), channel)  # type: ignore[arg-type]
    return channel, summary


@pytest.mark.parametrize(
    ("optimizer", "rate", "method"),
    [
        ("sgd", 0.1, "{name: full}"),
        ("lion", 1e-3, "{name: lora, rank: 4}"),
        ("adafactor", 5e-3, "{name: lora, rank: 4}"),
        ("adafactor", 1e-3, "{name: full}"),
    ],
)
def test_the_loss_falls(tmp_path, optimizer, rate, method):
    run = toy_run(
        tmp_path,
        "train.steps=40",
        f"train.optimizer={optimizer}",
        f"train.learning_rate={rate}",
        "train.evaluate_every=40",
        "data.held_out_fraction=0.1",
        method=method,
    )
    _, summary = trained(run, held_out=HELD_OUT)
    assert summary["final_loss"] < 0.9 * summary["base_loss"]


LORA = "{name: lora, rank: 64, alpha: 64, dropout: 0.1}"


@pytest.mark.parametrize(
    ("optimizer", "method"), [("sgd", LORA), ("lion", LORA), ("adafactor", LORA), ("adafactor", "{name: full}")]
)
def test_resume_is_exact(tmp_path, optimizer, method):
    overrides = (
        "train.steps=7",
        "train.commit_every=3",
        f"train.optimizer={optimizer}",
        "train.precision=bf16",
        "train.layer_decay=0.9",
        "train.neftune=5",
        "train.label_smoothing=0.1",
        "train.weight_decay=0.01",
    )
    same_after_a_break(tmp_path, overrides, method)


@pytest.mark.parametrize("packing", ["off", "batch"])
def test_resume_with_noise_is_exact(tmp_path, packing):
    overrides = ("train.steps=7", "train.commit_every=3", "train.neftune=10", f"data.packing={packing}")
    same_after_a_break(tmp_path, overrides, "{name: lora, rank: 4}")


def same_after_a_break(tmp_path, overrides, method) -> None:
    whole, _ = trained(toy_run(tmp_path / "whole", *overrides, method=method))
    run = toy_run(tmp_path / "broken", *overrides, method=method)
    with pytest.raises(InterruptedError):
        trained(run, Recorder(fail_at=5))
    _, summary = trained(run)
    assert summary["resumed_from"] == 3
    lines = [json.loads(line) for line in (tmp_path / "broken/metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if line["kind"] == "step"] == whole.losses
    a, b = (load_file(next((tmp_path / n / "artefact").glob("*model.safetensors"))) for n in ("whole", "broken"))
    assert all(torch.equal(a[key], b[key]) for key in a)


# --------------------------------------------------------------------------------------------------------- formulas


def one_matrix(tmp_path, *overrides: str) -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(64, 32)
    return model, build_optimizer(model, toy_run(tmp_path, "train.learning_rate=0.01", *overrides).train)


def three_steps(model: nn.Linear, optimizer: torch.optim.Optimizer):
    """(weight before, gradient) of each step; the weight has moved when the next comes."""
    torch.manual_seed(1)
    for _ in range(3):
        before, gradient = model.weight.detach().clone(), torch.randn(32, 64)
        model.weight.grad, model.bias.grad = gradient.clone(), torch.ones(32)
        set_rate(optimizer, 0.01)
        optimizer.step()
        yield before, gradient


def test_sgd_is_that_of_torch_with_decoupled_decay(tmp_path):
    model, optimizer = one_matrix(tmp_path, "train.optimizer=sgd", "train.momentum=0.8", "train.weight_decay=0.5")
    bias, momentum = model.bias.detach().clone(), torch.zeros(32, 64)
    for before, gradient in three_steps(model, optimizer):
        momentum = 0.8 * momentum + gradient
        torch.testing.assert_close(model.weight.data, before * (1 - 0.01 * 0.5) - 0.01 * momentum)
    torch.testing.assert_close(model.bias.data, bias - 0.01 * (1 + 1.8 + 2.44))  # does not decay


def test_lion_is_that_of_the_paper(tmp_path):
    """Chen et al. 2023, algorithm 2."""
    model, optimizer = one_matrix(tmp_path, "train.optimizer=lion", "train.betas=[0.9, 0.95]", "train.weight_decay=0.5")
    mean = torch.zeros(32, 64)
    for before, gradient in three_steps(model, optimizer):
        step = torch.sign(0.9 * mean + 0.1 * gradient)
        mean = 0.95 * mean + 0.05 * gradient
        torch.testing.assert_close(model.weight.data, before * (1 - 0.01 * 0.5) - 0.01 * step)


def test_adafactor_moves_by_the_rate_and_holds_rows_and_columns(tmp_path):
    model, optimizer = one_matrix(tmp_path, "train.optimizer=adafactor")
    with torch.no_grad():
        model.weight.zero_()  # as LoRA's B is at first
    for before, _ in three_steps(model, optimizer):
        moved = (model.weight.data - before).square().mean().sqrt()
        assert 0.002 < float(moved) <= 0.0101
    sizes = [v.numel() for v in optimizer.state[model.weight].values() if isinstance(v, torch.Tensor)]
    assert max(sizes) <= 64


# -------------------------------------------------------------------------------------------------- groups and rates


def test_blocks_by_path():
    assert block_of("base_model.model.model.layers.11.self_attn.q_proj.lora_A.default.weight") == 11
    assert block_of("transformer.h.3.mlp.c_fc.weight") == 3
    assert block_of("model.embed_tokens.weight") is None
    assert block_of("lm_head.weight") is None


@pytest.mark.parametrize("method", ["{name: full}", "{name: lora, rank: 4}"])
def test_the_rate_falls_with_depth(tmp_path, method):
    run = toy_run(tmp_path, "train.layer_decay=0.5", "train.weight_decay=0.1", method=method)
    model = attach(load_base(run)[0], run)
    factors = {name: rate_factors(model, 0.5)[p] for name, p in model.named_parameters() if p.requires_grad}
    blocks = model.config.num_hidden_layers
    for name, factor in factors.items():
        block = block_of(name)
        if block is not None:
            assert factor == 0.5 ** (blocks - 1 - block)
        elif "embed" in name:
            assert factor == 0.5**blocks
        else:
            assert factor == 1
    assert {0.5**i for i in range(blocks)} <= set(factors.values())
    optimizer = build_optimizer(model, run.train)
    set_rate(optimizer, 1e-3)
    of = {p: group for group in optimizer.param_groups for p in group["params"]}
    assert len(of) == len(factors)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert of[parameter]["lr"] == pytest.approx(1e-3 * factors[name])
            assert of[parameter]["weight_decay"] == (0.1 if parameter.ndim >= 2 else 0)


def test_without_decay_by_depth_there_are_two_groups_at_one_rate(tmp_path):
    run = toy_run(tmp_path, method="{name: full}")
    optimizer = build_optimizer(load_base(run)[0], run.train)
    assert [{p.ndim >= 2 for p in group["params"]} for group in optimizer.param_groups] == [{True}, {False}]
    assert {group["factor"] for group in optimizer.param_groups} == {1.0}


def test_lower_blocks_move_less(tmp_path):
    run = toy_run(tmp_path, "train.steps=2", "train.layer_decay=0.1", "train.schedule=constant", method="{name: full}")
    before = dict(load_base(run)[0].named_parameters())
    trained(run)
    after = load_file(tmp_path / "artefact/model.safetensors")
    moved = {
        block: max(
            float((after[n].float() - p.detach()).abs().max()) for n, p in before.items() if block_of(n) == block
        )
        for block in (0, 3)
    }
    assert moved[0] < 0.05 * moved[3]


# ------------------------------------------------------------------------------------------------- noise and smoothing


@pytest.mark.parametrize("packed", [True, False])
def test_noise_has_the_size_of_each_sequence(tmp_path, packed):
    """NEFTune's bound is alpha / sqrt(L D), L being the length of the row, neither of its packing nor its padding."""
    run = toy_run(tmp_path)
    model = load_base(run)[0].train()
    rows = [random_rows(1, seed=2)[0], random_rows(1, seed=5)[0]]
    lengths = [len(row.tokens) for row in rows]
    assert lengths[0] != lengths[1]
    batch = collate(rows, 0, packed=packed)
    embeddings = model.get_input_embeddings()
    torch.manual_seed(0)
    with noisy_embeddings(model, batch, 5.0):
        noisy = embeddings(batch.tokens)
    noise = (noisy - embeddings(batch.tokens)).detach()
    pieces = noise[0].split(lengths) if packed else [noise[i, :n] for i, n in enumerate(lengths)]
    for piece, length in zip(pieces, lengths, strict=True):
        bound = 5.0 / (length * noise.shape[-1]) ** 0.5
        assert 0.95 * bound < float(piece.abs().max()) <= 1.0001 * bound
        assert abs(float(piece.mean())) < 0.1 * bound


def test_noise_and_smoothing_are_of_training_alone(tmp_path):
    overrides = ("train.steps=2", "train.evaluate_every=2", "data.held_out_fraction=0.1")
    plain, _ = trained(toy_run(tmp_path / "a", *overrides), held_out=HELD_OUT)
    noisy, _ = trained(toy_run(tmp_path / "b", *overrides, "train.neftune=20"), held_out=HELD_OUT)
    smooth, _ = trained(toy_run(tmp_path / "c", *overrides, "train.label_smoothing=0.2"), held_out=HELD_OUT)
    assert len({run.losses[0] for run in (plain, noisy, smooth)}) == 3
    assert len({run.of("evaluation")[0]["loss"] for run in (plain, noisy, smooth)}) == 1
    assert len({run.of("evaluation")[1]["loss"] for run in (plain, noisy, smooth)}) == 3


def test_mezo_smooths_and_adds_no_noise(tmp_path):
    """Its passes are in evaluation mode, but their loss is the training loss."""
    run = toy_run(tmp_path, "train.optimizer=mezo", "train.label_smoothing=0.2")
    model = attach(load_base(run)[0], run).train()
    objective, batch = TargetLoss(model, run.train.label_smoothing, neftune=50.0), collate(ROWS[:4], 0, packed=True)
    plain = TargetLoss(model)
    with evaluating(model):
        first, again, without = (float(loss(batch)) for loss in (objective, objective, plain))
    assert first == again != without
    with evaluating(objective):
        assert float(objective(batch)) == without


def test_evaluation_of_a_trained_head_takes_no_gradient(tmp_path, monkeypatch):
    run = toy_run(tmp_path, method="{name: full}")
    model = load_base(run)[0]
    objective = TargetLoss(model)
    monkeypatch.setattr(torch.autograd, "grad", lambda *_: pytest.fail("a gradient was computed"))
    with evaluating(objective):
        objective(collate(ROWS[:2], 0, packed=True))
