"""The loop without Ray: the same numbers as transformers' Trainer, whatever the layout, and exact resume."""

from __future__ import annotations

import errno
import json
import math
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ftray.config import Run
from ftray.data.order import Order
from ftray.data.prepared import Row
from ftray.errors import ConfigError, RunError
from ftray.model.adapters import lora_config
from ftray.registry.facts import strict_json
from ftray.train import commits, loop
from ftray.train.commits import Progress
from ftray.train.doctor import examine
from ftray.train.loop import train_worker
from ftray.train.world import World
from ftray.train.writer import Writer
from tests.toys import MemoryData, Recorder, random_rows, toy_run

ROWS = random_rows(64)
HELD_OUT = random_rows(16, seed=1)


def trained(run: Run, channel: Recorder | None = None, rows: list[Row] = ROWS, held_out: list[Row] | None = None):
    channel = channel or Recorder()
    summary = train_worker(run, MemoryData(rows, held_out), World(), channel)  # type: ignore[arg-type]
    return channel, summary


def worst(mine: list[float], theirs: list[float]) -> float:
    assert len(mine) == len(theirs)
    return max(abs(a - b) / abs(b) for a, b in zip(mine, theirs, strict=True))


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "artefact" / "adapter_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_first_50_losses_equal_those_of_trainer_and_peft(tmp_path):
    run = toy_run(tmp_path / "ours", "train.steps=50", "data.packing=off")
    ours, _ = trained(run)
    assert worst(ours.losses, trainer_losses(run, tmp_path / "theirs")) < 1e-4


def trainer_losses(run: Run, folder: Path) -> list[float]:
    """The same run by transformers' Trainer and PEFT."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from ftray.data.tokenizer import local_model_folder

    order = Order(run.seed, [len(ROWS)], [1.0])
    steps, batch = run.train.steps or 0, run.train.batch_rows
    ids = order.rows(0, steps * batch)
    data = [{"input_ids": ROWS[i].tokens, "labels": np.where(ROWS[i].targets, ROWS[i].tokens, -100)} for i in ids]

    def pad(examples, key, value):
        longest = max(len(e["input_ids"]) for e in examples)
        return torch.tensor([[*e[key].tolist(), *[value] * (longest - len(e[key]))] for e in examples])

    def collate(examples):
        real = [{**e, "attention_mask": np.ones(len(e["input_ids"]), int)} for e in examples]
        keys = {"input_ids": 0, "labels": -100, "attention_mask": 0}
        return {key: pad(real, key, value) for key, value in keys.items()}

    class InOrder(Trainer):
        def _get_train_sampler(self, *_args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    base = AutoModelForCausalLM.from_pretrained(local_model_folder(run.model), dtype=torch.float32)
    config = lora_config(run, base)
    torch.manual_seed(run.seed)
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=batch,
        max_steps=steps,
        learning_rate=run.train.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=2,
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = InOrder(get_peft_model(base, config), arguments, data_collator=collate, train_dataset=data)
    trainer.train()
    return [float(line["loss"]) for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize(
    "override",
    ["data.packing=batch", "train.micro_batch_rows=3", "train.gradient_checkpointing=true"],
)
def test_layout_changes_no_loss(tmp_path, override):
    padded, _ = trained(toy_run(tmp_path / "a", "train.steps=10", "data.packing=off"))
    other, _ = trained(toy_run(tmp_path / "b", "train.steps=10", override))
    assert worst(other.losses, padded.losses) < 1e-4


def test_rows_packed_once_give_the_losses_of_their_single_rows(tmp_path):
    """corpus packing: four rows laid into one are a quarter of the batch."""
    order = Order(0, [len(ROWS)], [1.0]).rows(0, len(ROWS))
    single, _ = trained(toy_run(tmp_path / "a", "train.steps=8", "data.packing=off"))
    of_order = [ROWS[i] for i in order]
    joined = [
        Row(
            *(
                np.concatenate(part)
                for part in zip(*((r.tokens, r.targets, r.sequence_lengths) for r in four), strict=True)
            )
        )
        for four in (of_order[i : i + 4] for i in range(0, len(of_order), 4))
    ]
    back = np.argsort(Order(0, [len(joined)], [1.0]).rows(0, len(joined)))
    packed, _ = trained(
        toy_run(tmp_path / "b", "train.steps=8", "train.batch_rows=2", "data.packing=corpus"),
        rows=[joined[i] for i in back],
    )
    assert worst(packed.losses, single.losses) < 1e-3


def test_loss_falls_and_the_artefact_is_complete(tmp_path):
    channel, summary = trained(
        toy_run(tmp_path, "train.steps=40", "train.evaluate_every=20", "data.held_out_fraction=0.1"), held_out=HELD_OUT
    )
    assert summary["final_loss"] < 0.9 * summary["base_loss"]
    assert [e["step"] for e in channel.of("evaluation")] == [0, 20, 40]
    assert {p.name for p in (tmp_path / "artefact").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "ftray.json",
        "README.md",
    }
    facts = json.loads((tmp_path / "artefact/ftray.json").read_text())
    assert facts["files"]["adapter_model.safetensors"]["size"] > 0
    assert facts["base"]["sha256"]


def test_an_artefact_is_written_beside_the_one_it_replaces(tmp_path, monkeypatch):
    """Not in the system's temporary folder, which may be small; what could not be written leaves the old one alone."""
    from ftray.train import artefact

    run = toy_run(tmp_path, "train.steps=2")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    trained(run)
    before = (tmp_path / "artefact/ftray.json").read_bytes()
    staged = []

    def full(_run, summary, _facts):
        staged.extend(tmp_path.glob(".artefact.*.part"))
        raise OSError(errno.ENOSPC, "No space left on device", str(staged[0] / "README.md"))

    monkeypatch.setattr(artefact, "model_card", full)
    with pytest.raises(RunError, match="no space is left"):
        trained(run)
    assert len(staged) == 1
    assert (tmp_path / "artefact/ftray.json").read_bytes() == before
    assert not list(tmp_path.glob(".*"))
    (tmp_path / ".artefact.0123abcd.part").mkdir()
    (tmp_path / ".artefact.0123abcd.old.part").mkdir()
    assert len(examine(str(tmp_path)).findings) == 3  # and run.yaml, which a launch writes


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [
        ("lora", "adamw"),
        ("lora", "adamw_8bit"),
        ("dora", "paged_adamw_32bit"),
        ("qlora", "paged_adamw_8bit"),
        ("qdora", "adamw"),
    ],
)
def test_resume_is_exact(tmp_path, method, optimizer):
    knobs = f"{{name: {method}, rank: 64, alpha: 64, dropout: 0.1}}"
    overrides = ("train.steps=9", "train.commit_every=3", f"train.optimizer={optimizer}", "train.precision=bf16")
    whole, _ = trained(toy_run(tmp_path / "whole", *overrides, method=knobs))
    run = toy_run(tmp_path / "broken", *overrides, method=knobs)
    for fail_at in (2, 5, 8):
        with pytest.raises(InterruptedError):
            trained(run, Recorder(fail_at=fail_at))
    _, summary = trained(run)
    assert summary["resumed_from"] == 6
    assert same(adapter(tmp_path / "whole"), adapter(tmp_path / "broken"))
    lines = [json.loads(line) for line in (tmp_path / "broken/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["loss"] for line in steps] == whole.losses
    assert [line["cursor"] for line in steps] == [[8 * i, 8 * i + 8] for i in range(8)] + [[64, 72]]


def test_dropout_drops_in_training_alone(tmp_path):
    overrides = ("train.steps=3", "train.evaluate_every=3", "data.held_out_fraction=0.1")
    runs = [
        trained(
            toy_run(tmp_path / f"p{p}", *overrides, method=f"{{name: lora, rank: 4, dropout: {p}}}"), held_out=HELD_OUT
        )
        for p in (0.0, 0.9)
    ]
    (plain, _), (dropped, _) = runs
    assert plain.losses[0] == dropped.losses[0]  # B is zero at first
    assert plain.losses[2] != dropped.losses[2]
    assert plain.of("evaluation")[0]["loss"] == dropped.of("evaluation")[0]["loss"]


@pytest.mark.parametrize("method", ["qlora", "qdora"])
def test_nf4_weights_are_never_repacked_under_training(tmp_path, method):
    """bitsandbytes' repacking for evaluation would silently spoil dequantized weights; see `evaluating`."""
    run = toy_run(tmp_path, "train.steps=2", "data.held_out_fraction=0.1", method=f"{{name: {method}, rank: 4}}")
    data = MemoryData(ROWS, HELD_OUT)
    worker = loop._Worker(run, data, World(), Recorder(), loop._alone)  # type: ignore[arg-type]
    worker.resume()
    worker.train()
    with worker.equipment.lend() as model:
        quantized = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
    assert quantized
    assert not any(getattr(m.weight.quant_state, "packing_format_for_cpu", False) for m in quantized)


def test_a_step_is_as_long_as_its_rows_are_waited_for(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    steps = loop.Feed.steps

    def slow(feed, cursor, count):
        for rows in steps(feed, cursor, count):
            clock.now += 5.0
            yield rows

    monkeypatch.setattr(loop.Feed, "steps", slow)
    fake = SimpleNamespace(perf_counter=lambda: clock.now, monotonic=time.monotonic, time=time.time)
    monkeypatch.setattr(loop, "time", fake)
    channel, summary = trained(toy_run(tmp_path, "train.steps=3"))
    assert [event["seconds"] for event in channel.of("step")] == [5.0, 5.0, 5.0]
    assert summary["seconds"] == 15.0
    assert summary["target_tokens_per_second"] == summary["target_tokens"] / 15.0


def test_peak_memory_is_that_of_the_worker_which_has_most(tmp_path, monkeypatch):
    class Larger(World):
        """Beside a worker that always has one more."""

        def gather(self, value):
            return [value, value + 1.0] if value == 2.0 else [value]

    monkeypatch.setattr(loop, "peak_memory_gib", lambda _device: 2.0)
    summary = train_worker(toy_run(tmp_path, "train.steps=1"), MemoryData(ROWS), Larger(), Recorder())  # type: ignore[arg-type]
    assert summary["peak_memory_gib"] == 3.0


@pytest.mark.parametrize(
    ("override", "written_by", "steps"),
    [("", 0, [7, 15, 20]), ("", 12, [7, 19, 20]), ("train.commit_every=6", 0, [6, 12, 18, 20])],
)
def test_ten_minutes_without_a_commit_are_enough(tmp_path, monkeypatch, override, written_by, steps):
    """Each step takes 100 s; the first commit is on its way until step `written_by`, and none is begun meanwhile."""
    clock, taken = SimpleNamespace(now=0.0), threading.Event()
    complete, done = commits.complete, Writer.done

    class Slow(Recorder):
        def emit(self, event):
            super().emit(event)
            if event["kind"] == "step":
                clock.now += 100.0
                if event["step"] >= written_by:
                    taken.set()

    monkeypatch.setattr(commits, "complete", lambda staged: (taken.wait(), complete(staged))[1])
    monkeypatch.setattr(Writer, "done", lambda writer, wait=False: done(writer, wait=wait or taken.is_set()))
    fake = SimpleNamespace(monotonic=lambda: clock.now, perf_counter=time.perf_counter, time=time.time)
    monkeypatch.setattr(loop, "time", fake)
    channel, _ = trained(toy_run(tmp_path, "train.keep_last=9", *filter(None, [override])), Slow())
    assert [event["step"] for event in channel.of("commit")] == steps
    assert commits.steps_of(str(tmp_path)) == steps


def test_stop_commits_and_the_same_run_goes_on(tmp_path):
    trained(toy_run(tmp_path / "whole"))
    run = toy_run(tmp_path / "stopped")
    _, summary = trained(run, Recorder(stop_at=7))
    assert summary["reason"] == "stopped"
    assert summary["artefact"] is None
    channel, summary = trained(run)
    assert channel.of("resume")[0]["step"] == 8  # the wish is heard in the step after it
    assert summary["reason"] == "finished"
    assert same(adapter(tmp_path / "whole"), adapter(tmp_path / "stopped"))


def test_a_finished_run_is_not_trained_again(tmp_path):
    run = toy_run(tmp_path, "train.steps=3")
    trained(run)
    channel, summary = trained(run)
    assert not channel.of("step")
    assert summary["steps"] == 3


@pytest.mark.faults
@pytest.mark.parametrize("damage", ["truncate", "flip", "missing", "no manifest"])
def test_a_damaged_commit_is_passed_over(tmp_path, damage):
    run = toy_run(tmp_path / "a", "train.commit_every=3", "train.steps=9")
    with pytest.raises(InterruptedError):
        trained(run, Recorder(fail_at=7))
    newest = tmp_path / "a/commits/step-00000006"
    weights = newest / "model.safetensors"
    data = weights.read_bytes()
    if damage == "truncate":
        weights.write_bytes(data[:-100])
    elif damage == "flip":
        weights.write_bytes(data[:-100] + bytes([data[-100] ^ 1]) + data[-99:])
    elif damage == "missing":
        weights.unlink()
    else:
        (newest / "manifest.json").unlink()
    channel, summary = trained(run)
    assert summary["resumed_from"] == 3
    assert len(channel.of("warning")) == (0 if damage == "no manifest" else 1)
    logged = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    assert [event for event in logged if event["kind"] == "warning"] == channel.of("warning"), "the report reads these"
    trained(toy_run(tmp_path / "b", "train.commit_every=3", "train.steps=9"))
    assert same(adapter(tmp_path / "a"), adapter(tmp_path / "b"))


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    trained(toy_run(tmp_path, "train.steps=3"))
    with pytest.raises(ConfigError, match=r"train.learning_rate: committed with 0.002, now 0.001"):
        trained(toy_run(tmp_path, "train.steps=3", "train.learning_rate=0.001"))


def test_free_settings_may_change(tmp_path):
    trained(toy_run(tmp_path), Recorder(stop_at=4))
    _, summary = trained(toy_run(tmp_path, "train.micro_batch_rows=4", "train.commit_every=5"))
    assert summary["resumed_from"] == 5


class Poison:
    """A row whose embedding is not a number: training on it gives NaN."""

    def __init__(self, monkeypatch, bad_rows: set[int], rows: list[Row]) -> None:
        from ftray.train import loop

        bad = {rows[i].tokens.tobytes() for i in bad_rows}
        original = loop.TargetLoss.forward

        def forward(module, batch):
            loss = original(module, batch)
            tokens = batch.tokens[0].to(torch.int32).numpy().tobytes()
            return loss * float("nan") if any(b in tokens for b in bad) else loss

        monkeypatch.setattr(loop.TargetLoss, "forward", forward)


@pytest.mark.faults
def test_a_nan_step_changes_nothing_and_is_counted(tmp_path, monkeypatch):
    Poison(monkeypatch, {int(Order(0, [64], [1.0]).rows(0, 64)[17])}, ROWS)
    channel, summary = trained(toy_run(tmp_path, "train.steps=8"))
    assert summary["skipped_steps"] == 1
    (skip,) = channel.of("skip")
    assert skip["step"] == 3
    assert f"memory:{int(Order(0, [64], [1.0]).rows(0, 64)[17]) + 1}" in skip["rows"]
    assert all(tensor.isfinite().all() for tensor in adapter(tmp_path).values())


class OneByOne:
    """A world whose workers come one after the other: each gets what those before it gave, and its own."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    def gather(self, value: Any) -> list[Any]:
        self.given.append(value)
        return self.given


@pytest.mark.parametrize(
    ("losses", "named"),
    [
        ([[1.0, 1.0], [1.0, math.nan]], ["memory:7", "memory:8"]),
        ([[1.0, math.inf], [math.nan, 1.0]], ["memory:3", "memory:4", "memory:5", "memory:6"]),
        ([[1.0, 1.0], [1.0, 1.0]], [f"memory:{i}" for i in range(1, 9)]),
    ],
)
def test_a_skipped_step_names_the_rows_of_bad_micro_batches_alone(tmp_path, losses, named):
    """Of all workers; all rows where no loss is to blame."""
    world, told = OneByOne(), []
    for rank, mine in enumerate(losses):
        worker = SimpleNamespace(world=world, progress=Progress(step=1), data=MemoryData(ROWS), run=toy_run(tmp_path))
        worker.emit = lambda **event: told.append(event)
        ids = [np.arange(4 * rank, 4 * rank + 2), np.arange(4 * rank + 2, 4 * rank + 4)]
        loop._Worker._skip(worker, SimpleNamespace(row_ids=ids), mine, math.nan, 1.0)  # type: ignore[arg-type]
    assert told[-1]["rows"] == named


@pytest.mark.faults
def test_too_many_nan_steps_in_a_row_stop_the_run_and_name_the_rows(tmp_path, monkeypatch):
    Poison(monkeypatch, set(range(64)), ROWS)
    with pytest.raises(RunError, match=r"3 steps in a row .* memory:\d+"):
        trained(toy_run(tmp_path, "train.max_skipped=2"))
    assert not (tmp_path / "artefact").exists()


def test_early_stopping_ends_and_keeps_the_best(tmp_path):
    rows = random_rows(8)
    run = toy_run(
        tmp_path,
        "train.steps=200",
        "train.learning_rate=0.02",
        "train.evaluate_every=5",
        "train.early_stopping={patience: 2}",
        "data.held_out_fraction=0.1",
    )
    _, summary = trained(run, rows=rows, held_out=HELD_OUT)
    assert summary["reason"] == "early stopping"
    assert summary["steps"] < 200
    assert summary["artefact_step"] == (summary["best_step"] or summary["steps"])


def measure(monkeypatch, losses: list[float]) -> None:
    """Have every second step's held-out loss be one of these, the base's first."""
    monkeypatch.setattr(loop._Worker, "_held_out_loss", lambda worker, _: (losses[worker.progress.step // 2], 1, {}))


EVALUATED = ("train.evaluate_every=2", "train.steps=8", "data.held_out_fraction=0.1")


@pytest.mark.parametrize(
    ("losses", "keep_best", "step", "loss"),
    [
        ([1.0, 3.0, 2.0, 2.5, 2.7], True, 4, 2.0),
        ([1.0, 3.0, 2.0, 2.5, 2.7], False, 8, 2.7),
        ([3.0, 1.0, 0.5, 2.0, 0.7], True, 4, 0.5),
        ([3.0, 1.0, 0.5, 2.0, 0.7], False, 8, 0.7),
        ([1.0, *[math.nan] * 4], True, 8, None),
    ],
)
def test_what_is_said_of_the_artefact_is_its_own(tmp_path, monkeypatch, losses, keep_best, step, loss):
    measure(monkeypatch, losses)
    channel, summary = trained(toy_run(tmp_path, *EVALUATED, f"train.keep_best={keep_best}"), held_out=HELD_OUT)
    assert (summary["artefact_step"], summary["artefact_loss"]) == (step, loss)
    facts = strict_json((tmp_path / "artefact/ftray.json").read_bytes(), "ftray.json")
    assert (facts["step"], facts["metrics"]["artefact_loss"]) == (step, loss)
    card = (tmp_path / "artefact/README.md").read_text()
    assert (f"| {losses[0]:.4f} | {loss:.4f} |" in card) if loss else ("## Results" not in card)
    warned = [event["text"] for event in channel.of("warning")]
    assert bool(warned) == (losses[0] == 1.0)
    assert all("no evaluation was better than the base's" in text and f"step {step}" in text for text in warned)


def test_the_lowest_loss_is_kept_whatever_early_stopping_counts_as_better(tmp_path, monkeypatch):
    measure(monkeypatch, [1.0, 0.9, 0.95, 0.97, 0.5])
    stopping = "train.early_stopping={patience: 3, min_improvement: 0.2}"
    _, summary = trained(toy_run(tmp_path, *EVALUATED, stopping), held_out=HELD_OUT)
    assert (summary["reason"], summary["steps"]) == ("early stopping", 6)
    assert (summary["best_step"], summary["artefact_step"], summary["artefact_loss"]) == (2, 2, 0.9)


@pytest.mark.parametrize("then", ["{patience: 3}", "null"])
def test_a_run_that_ended_early_goes_on_with_more_patience(tmp_path, monkeypatch, then):
    measure(monkeypatch, [3.0, 1.0, 1.5, 2.0, 0.5])
    first = toy_run(tmp_path / "a", *EVALUATED, "train.early_stopping={patience: 2}")
    _, summary = trained(first, held_out=HELD_OUT)
    assert (summary["reason"], summary["steps"], summary["artefact_step"]) == ("early stopping", 6, 2)
    channel, summary = trained(first, held_out=HELD_OUT)
    assert (summary["reason"], summary["steps"], channel.of("step")) == ("early stopping", 6, [])
    more = toy_run(tmp_path / "a", *EVALUATED, f"train.early_stopping={then}")
    _, summary = trained(more, held_out=HELD_OUT)
    assert (summary["reason"], summary["steps"], summary["resumed_from"]) == ("finished", 8, 6)
    assert (summary["artefact_step"], summary["artefact_loss"]) == (8, 0.5)
    trained(toy_run(tmp_path / "b", *EVALUATED, f"train.early_stopping={then}"), held_out=HELD_OUT)
    assert same(adapter(tmp_path / "a"), adapter(tmp_path / "b"))


def lose(commit: Path, how: str) -> None:
    if how == "gone":
        shutil.rmtree(commit)
    else:
        weights = commit / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])


@pytest.mark.faults
@pytest.mark.parametrize(("how", "step", "loss"), [("gone", 6, 1.5), ("damaged", 8, 2.2)])
def test_a_run_ends_without_its_best_commit(tmp_path, monkeypatch, how, step, loss):
    """What is gone is known when the run goes on, so another is kept in time; what is damaged, at the end alone."""
    measure(monkeypatch, [3.0, 1.0, 2.0, 1.5, 2.2])
    run = toy_run(tmp_path, *EVALUATED, "train.keep_last=1")
    trained(run, Recorder(stop_at=4), held_out=HELD_OUT)
    lose(tmp_path / "commits/step-00000002", how)
    channel, summary = trained(run, held_out=HELD_OUT)
    assert ["the commit of the best step, 2" in event["text"] for event in channel.of("warning")] == [True]
    assert (summary["artefact_step"], summary["artefact_loss"]) == (step, loss)
    assert not [found for found in examine(str(tmp_path)).findings if found.where.endswith("/artefact")]


@pytest.mark.faults
@pytest.mark.parametrize("how", ["gone", "damaged"])
def test_an_artefact_outlives_the_commit_it_was_made_of(tmp_path, monkeypatch, how):
    measure(monkeypatch, [3.0, 1.0, 2.0, 1.5, 2.2])
    run = toy_run(tmp_path, *EVALUATED)
    trained(run, held_out=HELD_OUT)
    before = adapter(tmp_path)
    lose(tmp_path / "commits/step-00000002", how)
    channel, summary = trained(run, held_out=HELD_OUT)
    assert "stays" in channel.of("warning")[0]["text"]
    assert (summary["artefact_step"], summary["artefact_loss"]) == (2, 1.0)
    assert same(before, adapter(tmp_path))
    shutil.rmtree(tmp_path / "artefact")
    _, summary = trained(run, held_out=HELD_OUT)
    assert (summary["artefact_step"], summary["artefact_loss"]) == (8, 2.2)


def test_full_tuning_saves_a_model_that_transformers_loads(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    channel, summary = trained(toy_run(tmp_path, "train.steps=5", method="{name: full}"))
    assert summary["trainable_parameters"] == summary["parameters"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "artefact")
    assert AutoTokenizer.from_pretrained(tmp_path / "artefact").chat_template
    assert model.num_parameters() == summary["parameters"]
    assert channel.losses[-1] < channel.losses[0]
