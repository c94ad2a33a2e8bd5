"""Preferences: the losses of trl's trainer, margins that rise, references that stay, exact resume."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from ftray.config import Run
from ftray.data.order import Order
from ftray.data.prepared import Row
from ftray.model.adapters import lora_config
from ftray.model.load import evaluating, load_base
from ftray.model.methods import attach
from ftray.train import dpo
from ftray.train.batch import collate
from ftray.train.dpo import PreferenceLoss, completion_log_probabilities, frozen_copy, log_probabilities
from ftray.train.loop import train_worker
from ftray.train.loss import Head
from ftray.train.world import World
from tests.toys import CountingLinear, MemoryData, Recorder, dpo_run, random_pairs

PAIRS = random_pairs(64)
HELD_OUT = random_pairs(16, seed=1)


def trained(run: Run, channel: Recorder | None = None, held_out: list[Row] | None = None):
    channel = channel or Recorder()
    summary = train_worker(run, MemoryData(PAIRS, held_out), World(), channel)  # type: ignore[arg-type]
    return channel, summary


def test_first_20_losses_equal_those_of_trl(tmp_path):
    run = dpo_run(tmp_path / "ours")
    ours, _ = trained(run)
    theirs = trl_lines(run, tmp_path / "theirs")
    assert len(theirs) == 20
    for mine, line in zip(ours.of("step"), theirs, strict=True):
        assert mine["loss"] == pytest.approx(float(line["loss"]), rel=1e-3)
        assert mine["margin"] == pytest.approx(float(line["rewards/margins"]), rel=1e-3, abs=1e-4)
        ties = 0.5 if mine["margin"] == 0 else 0.0  # before the first update; trl counts none of them
        assert mine["accuracy"] == pytest.approx(float(line["rewards/accuracies"]) + ties)
        assert mine["chosen_reward"] == pytest.approx(float(line["rewards/chosen"]), rel=1e-3, abs=1e-4)
    assert ours.losses[-1] < 0.8 * ours.losses[0]
    assert ours.of("step")[0]["accuracy"] == 0.5, "the adapter changes nothing yet: all pairs are ties"


def trl_lines(run: Run, folder: Path) -> list[dict[str, float]]:
    """The same run by trl's DPOTrainer and PEFT: what it logged at each step."""
    import trl
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ftray.data.tokenizer import local_model_folder

    class InOrder(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *_args, **_kwargs):
            return dataset  # tokens already

        def _get_train_sampler(self, *_args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    steps, batch = run.train.steps or 0, run.train.batch_rows
    ids = Order(run.seed, [len(PAIRS)], [1.0]).rows(0, steps * batch)
    model_folder = local_model_folder(run.model)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    config = lora_config(run, base)
    torch.manual_seed(run.seed)
    arguments = trl.DPOConfig(
        str(folder),
        per_device_train_batch_size=batch,
        max_steps=steps,
        learning_rate=run.train.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=2,
        weight_decay=0.0,
        max_grad_norm=1.0,
        beta=run.objective.beta,  # type: ignore[union-attr]
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = InOrder(
        get_peft_model(base, config),
        args=arguments,
        train_dataset=Dataset.from_list([three_parts(PAIRS[i]) for i in ids]),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
    )
    trainer.train()
    return [line for line in trainer.state.log_history if "rewards/margins" in line]


def three_parts(row: Row) -> dict[str, list[int]]:
    """A pair as trl's collator takes it."""
    border = int(row.sequence_lengths[0])
    start = int(np.flatnonzero(row.targets)[0])
    tokens = row.tokens.tolist()
    return {
        "prompt_ids": tokens[:start],
        "chosen_ids": tokens[start:border],
        "rejected_ids": tokens[border + start :],
    }


@pytest.mark.parametrize(
    "method", ["{name: lora, rank: 4}", "{name: qlora, rank: 4}", "{name: dora, rank: 4}", "{name: full}"]
)
def test_the_margin_rises(tmp_path, method):
    run = dpo_run(tmp_path, "train.steps=30", "train.evaluate_every=15", "data.held_out_fraction=0.1", method=method)
    channel, summary = trained(run, held_out=HELD_OUT)
    at_start, half, end = channel.of("evaluation")
    assert at_start["loss"] == pytest.approx(np.log(2), abs=1e-4)  # model and reference are one
    assert at_start["margin"] == pytest.approx(0, abs=1e-3)
    assert 0.3 < half["margin"] < end["margin"]
    assert end["accuracy"] > 0.8
    assert end["margin"] == pytest.approx(end["chosen_reward"] - end["rejected_reward"], abs=1e-4)
    assert "perplexity" not in end
    assert summary["final_loss"] == end["loss"] < 0.6
    assert "DPO" in (tmp_path / "artefact/README.md").read_text()


@pytest.mark.parametrize("overrides", [("train.micro_batch_rows=3",), ("train.gradient_checkpointing=true",)])
def test_layout_changes_no_loss(tmp_path, overrides):
    whole, _ = trained(dpo_run(tmp_path / "a", "train.steps=6"))
    other, _ = trained(dpo_run(tmp_path / "b", "train.steps=6", *overrides))
    assert other.losses == pytest.approx(whole.losses, rel=1e-3)


@pytest.mark.parametrize("method", ["{name: lora, rank: 4, dropout: 0.1}", "{name: full}"])
def test_resume_is_exact(tmp_path, method):
    overrides = ("train.steps=8", "train.commit_every=3", "train.precision=bf16", "train.neftune=5")
    whole, _ = trained(dpo_run(tmp_path / "whole", *overrides, method=method))
    run = dpo_run(tmp_path / "broken", *overrides, method=method)
    with pytest.raises(InterruptedError):
        trained(run, Recorder(fail_at=5))
    trained(run)
    lines = [json.loads(line) for line in (tmp_path / "broken/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["loss"] for line in steps] == whole.losses
    assert [line["margin"] for line in steps] == [event["margin"] for event in whole.of("step")]
    (a, b) = (load_file(next((tmp_path / n / "artefact").glob("*model.safetensors"))) for n in ("whole", "broken"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_reference_free_and_smoothed_losses_equal_the_formula(tmp_path):
    run = dpo_run(tmp_path, "objective.reference_free=true", "objective.label_smoothing=0.2", "objective.beta=0.3")
    model = attach(load_base(run)[0], run)
    objective = PreferenceLoss(run, model)
    with evaluating(objective):
        loss = float(objective(collate(PAIRS[:5], 0, packed=True)))
        expected = 0.0
        for row in PAIRS[:5]:
            border = int(row.sequence_lengths[0])
            sums = []
            for piece in (slice(border), slice(border, None)):
                tokens = torch.from_numpy(row.tokens[piece].astype(np.int64))[None]
                logs = F.log_softmax(model(tokens).logits[0].float(), -1)
                at = torch.from_numpy(np.flatnonzero(row.targets[piece]))
                sums.append(logs[at - 1, tokens[0, at]].sum())
            margin = 0.3 * (sums[0] - sums[1])
            expected -= float(0.8 * F.logsigmoid(margin) + 0.2 * F.logsigmoid(-margin))
    assert loss == pytest.approx(expected, rel=1e-4)
    (pairs, *_) = objective.take()
    assert pairs == 5
    assert objective.take()[0] == 0


def test_the_reference_is_the_base_and_does_not_move(tmp_path):
    batch = collate(PAIRS[:4], 0, packed=True)
    for method in ("{name: lora, rank: 4}", "{name: full}"):
        run = dpo_run(tmp_path, method=method)
        model = attach(load_base(run)[0], run).train()
        objective = PreferenceLoss(run, model)
        with evaluating(model):
            base = completion_log_probabilities(model, batch)
        trained_before = [name for name, p in model.named_parameters() if p.requires_grad]
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05)
        torch.testing.assert_close(objective._reference(batch), base)
        assert [name for name, p in model.named_parameters() if p.requires_grad] == trained_before
        assert model.training
        with evaluating(model):
            assert not torch.allclose(completion_log_probabilities(model, batch), base)


def test_the_frozen_copy_shares_what_is_not_trained(tmp_path):
    model = load_base(dpo_run(tmp_path))[0]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.3." in name)
    twin = frozen_copy(model, torch.bfloat16)
    for (name, own), copied in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert not copied.requires_grad
        assert (own is copied) != ("layers.3." in name)
        assert copied.dtype == (torch.bfloat16 if "layers.3." in name else torch.float32)


def _one_of_two(rank: int, folder: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name, method in METHODS.items():
        channel = Recorder()
        run = dpo_run(f"{folder}/{name}", *TWO, "workers.count=2", method=method)
        train_worker(run, MemoryData(PAIRS, HELD_OUT[:3]), World(rank, 2), channel)  # type: ignore[arg-type]
        if rank == 0:
            Path(f"{folder}/{name}.json").write_text(json.dumps(channel.of("step") + channel.of("evaluation")))
    dist.destroy_process_group()


METHODS = {"lora": "{name: lora, rank: 4}", "full": "{name: full}"}
TWO = (
    "train.steps=6",
    "train.batch_rows=5",
    "train.micro_batch_rows=2",  # three micro-batches here, two there
    "train.evaluate_every=6",
    "data.held_out_fraction=0.1",
)


def test_two_workers_make_the_steps_of_one(tmp_path):
    torch.multiprocessing.start_processes(_one_of_two, (str(tmp_path),), nprocs=2, start_method="spawn")
    for name, method in METHODS.items():
        told = json.loads((tmp_path / f"{name}.json").read_text())
        alone, _ = trained(dpo_run(tmp_path / f"{name}-alone", *TWO, method=method), held_out=HELD_OUT[:3])
        for mine, one in zip(told, alone.of("step") + alone.of("evaluation"), strict=True):
            for key in ("loss", "margin", "accuracy", "chosen_reward", "rejected_reward"):
                assert mine[key] == pytest.approx(one[key], rel=1e-2, abs=1e-3)


def test_a_worker_without_rows_takes_part(tmp_path):
    run = dpo_run(tmp_path)
    model = attach(load_base(run)[0], run).train()
    objective = PreferenceLoss(run, model)
    loss = objective(collate([], 0, packed=True))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)
    assert objective.take() == [0.0] * 5


@pytest.mark.parametrize("count", [0, 3, 64])
def test_log_probabilities_equal_log_softmax_and_hold_one_chunk(monkeypatch, count):
    monkeypatch.setattr(dpo, "LOSS_CHUNK_TOKENS", 8)
    torch.manual_seed(0)
    linear, saved = CountingLinear(16, 1000), []
    head = Head(linear, type("Config", (), {}))
    hidden, labels = torch.randn(count, 16, requires_grad=True), torch.randint(1000, (count,))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        mine = log_probabilities(head, hidden, labels)
    assert max(linear.calls) <= 8
    assert max(saved) < max(8 * 1000, 1 + 16 * 1000)
    theirs = F.log_softmax(F.linear(hidden, linear.weight, linear.bias), -1).gather(-1, labels[:, None])[:, 0]
    torch.testing.assert_close(mine, theirs)
    weight = torch.randn(count)
    inputs = [hidden, *linear.parameters()]
    for a, b in zip(
        torch.autograd.grad((mine * weight).sum(), inputs),
        torch.autograd.grad((theirs * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
