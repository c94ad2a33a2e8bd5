"""Lanes: many runs on one base in one batch, each as if it were alone."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ftray.config import Run
from ftray.errors import RunError
from ftray.train.lane import LaneEnded, Losses
from ftray.train.lanes import Base
from ftray.train.loop import train_worker
from ftray.train.sharing import difference, refusal
from ftray.train.world import World
from tests.toys import MemoryData, Recorder, random_rows, toy_run, wait_until

ROWS, HELD_OUT = random_rows(64, longest=24), random_rows(8, seed=1, longest=24)
FP32 = "train.precision=fp32"
EIGHT = [
    ["method.rank=2", "train.learning_rate=5e-3", "train.batch_rows=2", "method.targets=[q_proj,v_proj]"],
    ["method.rank=4", "train.learning_rate=1e-3", "train.batch_rows=4", "train.schedule=linear"],
    ["method.rank=8", "train.learning_rate=3e-3", "train.batch_rows=6", "method.dropout=0.1"],
    ["method.rank=16", "train.learning_rate=1e-3", "train.batch_rows=4", "train.micro_batch_rows=1"],
    ["method={name: dora, rank: 4, alpha: 8}", "train.learning_rate=2e-3", "train.batch_rows=3"],
    ["method={name: dora, rank: 3, rslora: true}", "train.batch_rows=2", "train.weight_decay=0.1"],
    ["method.rank=4", "method.rank_pattern={k_proj: 1}", "train.betas=[0.8,0.95]", "train.batch_rows=2"],
    ["method.rank=1", "train.label_smoothing=0.1", "train.clip_norm=null", "train.batch_rows=5"],
]


def run_of(folder: Path, number: int, *overrides: str) -> Run:
    return toy_run(folder / f"{number}", f"seed={number}", FP32, *overrides)


def alone(run: Run) -> Recorder:
    channel = Recorder()
    train_worker(run, MemoryData(ROWS, HELD_OUT), World(), channel)  # type: ignore[arg-type]
    return channel


class Together:
    """Lanes on threads of their own, as a host has them."""

    def __init__(self, first: Run, pass_tokens: int | None = None) -> None:
        self.base = Base(first, World(), pass_tokens)
        self.errors: dict[str, BaseException] = {}
        self.summaries: dict[str, dict[str, Any]] = {}
        self.threads: list[threading.Thread] = []

    def start(self, name: str, run: Run, channel: Recorder, rows=ROWS) -> None:
        def work() -> None:
            try:
                self.summaries[name] = self.base.train(name, run, MemoryData(rows, HELD_OUT), channel)  # type: ignore[arg-type]
            except BaseException as error:  # noqa: BLE001 - looked at by the test
                self.errors[name] = error

        thread = threading.Thread(target=work, daemon=True)
        self.threads.append(thread)
        thread.start()

    def end(self) -> None:
        for thread in self.threads:
            thread.join(120)
            assert not thread.is_alive()
        self.base.close()


def together(runs: list[Run], pass_tokens: int | None = None) -> list[Recorder]:
    lanes, channels = Together(runs[0], pass_tokens), [Recorder() for _ in runs]
    for i, (run, channel) in enumerate(zip(runs, channels, strict=True)):
        lanes.start(str(i), run, channel)
    lanes.end()
    assert not lanes.errors, lanes.errors
    return channels


def close(mine: list[float], theirs: list[float], most: float = 1e-3) -> None:
    assert len(mine) == len(theirs)
    assert max(abs(a - b) / abs(b) for a, b in zip(mine, theirs, strict=True)) < most


def same_artefact(mine: Path, theirs: Path, most: float = 1e-3) -> None:
    """The same files by name, the same settings, tensors within `most` of their size."""
    a, b = mine / "artefact", theirs / "artefact"
    assert {p.name for p in a.iterdir()} == {p.name for p in b.iterdir()}
    assert json.loads((a / "adapter_config.json").read_text()) == json.loads((b / "adapter_config.json").read_text())
    ours, other = load_file(a / "adapter_model.safetensors"), load_file(b / "adapter_model.safetensors")
    assert ours.keys() == other.keys()
    for name, tensor in ours.items():
        assert float((tensor - other[name]).norm()) <= most * float(other[name].norm()), name


def test_eight_unlike_lanes_follow_the_same_runs_alone(tmp_path):
    """Rank, dropout, targets, rate, schedule, decay, betas, batch, accumulation, order and seed of their own."""
    runs = [run_of(tmp_path / "lanes", i, "train.steps=100", *keys) for i, keys in enumerate(EIGHT)]
    lanes = together(runs)
    for i, (lane, keys) in enumerate(zip(lanes, EIGHT, strict=True)):
        single = alone(run_of(tmp_path / "alone", i, "train.steps=100", *keys))
        close(lane.losses, single.losses)
        close([e["loss"] for e in lane.of("evaluation")], [e["loss"] for e in single.of("evaluation")])
        close([e["grad_norm"] for e in lane.of("step")], [e["grad_norm"] for e in single.of("step")], 1e-2)
        assert [e["cursor"] for e in lane.of("step")] == [e["cursor"] for e in single.of("step")]
        same_artefact(tmp_path / "lanes" / str(i), tmp_path / "alone" / str(i))


@pytest.mark.parametrize("method", ["qlora", "qdora"])
def test_lanes_of_an_nf4_base(tmp_path, method):
    keys = [f"method={{name: {method}, rank: 4}}", "train.steps=10"]
    lanes = together([run_of(tmp_path / "lanes", i, *keys, f"train.batch_rows={2 + i}") for i in range(2)])
    for i, lane in enumerate(lanes):
        close(lane.losses, alone(run_of(tmp_path / "alone", i, *keys, f"train.batch_rows={2 + i}")).losses)
        same_artefact(tmp_path / "lanes" / str(i), tmp_path / "alone" / str(i))


def test_bf16_lanes_stay_near_the_runs_alone(tmp_path):
    keys = ["method.rank=4", "train.steps=10", "train.precision=bf16"]
    lanes = together([run_of(tmp_path / "lanes", i, *keys) for i in range(2)])
    for i, lane in enumerate(lanes):
        close(lane.losses, alone(run_of(tmp_path / "alone", i, *keys)).losses, 2e-2)


@pytest.mark.parametrize("how", ["tokens", "recomputed"])
def test_how_lanes_are_put_through_the_base_changes_nothing(tmp_path, how):
    """A pass a micro-batch, or blocks that are computed twice."""
    keys = ["train.steps=5", f"train.gradient_checkpointing={'true' if how == 'recomputed' else 'false'}"]
    kinds = ["method.rank=4", "method={name: dora, rank: 4}"]
    runs = [run_of(tmp_path / "lanes", i, *keys, kind) for i, kind in enumerate(kinds)]
    lanes = together(runs, pass_tokens=1 if how == "tokens" else None)
    for i, (lane, kind) in enumerate(zip(lanes, kinds, strict=True)):
        close(lane.losses, alone(run_of(tmp_path / "alone", i, *keys, kind)).losses, 1e-5)


class At(Recorder):
    """Does something after some steps."""

    def __init__(self, work: dict[int, Callable[[], None]]) -> None:
        super().__init__()
        self._work = work

    def emit(self, event: dict[str, Any]) -> None:
        super().emit(event)
        if event["kind"] == "step" and event["step"] in self._work:
            self._work[event["step"]]()


def test_lanes_join_and_leave_without_a_trace(tmp_path):
    stays, leaves, joins = (run_of(tmp_path, i, "train.steps=30", "method.rank=4") for i in range(3))
    lanes = Together(stays)
    late, expelled = Recorder(), threading.Event()

    def change() -> None:
        wait_until(lambda: gone.losses)
        lanes.base.expel("leaves")
        expelled.set()
        lanes.start("joins", joins, late)

    def until_both_are_here() -> None:
        wait_until(lambda: "stays" in lanes.base.lanes)

    def until_expelled() -> None:  # or it might come to its end before
        assert expelled.wait(60)

    gone, channel = At({1: until_both_are_here, 20: until_expelled}), At({10: change})
    lanes.start("leaves", leaves, gone)
    lanes.start("stays", stays, channel)
    lanes.end()
    assert isinstance(lanes.errors.pop("leaves"), LaneEnded)
    assert not lanes.errors
    assert 0 < len(gone.losses) < 30
    assert not (tmp_path / "1" / "artefact").exists()
    for number, recorder in ((0, channel), (2, late)):
        close(recorder.losses, alone(run_of(tmp_path / "alone", number, "train.steps=30", "method.rank=4")).losses)
    assert not any(layer.trained for layer in lanes.base.pooled.linears.values())


def test_a_lanes_nan_is_its_own(tmp_path):
    wild = run_of(tmp_path, 0, "train.steps=20", "train.learning_rate=1e30", "train.clip_norm=null", "method.rank=4")
    calm = run_of(tmp_path, 1, "train.steps=20", "method={name: dora, rank: 4}")
    lanes = Together(wild)
    lanes.start("wild", wild, Recorder())
    lanes.start("calm", calm, channel := Recorder())
    lanes.end()
    assert isinstance(error := lanes.errors.pop("wild"), RunError)
    assert "no finite loss" in str(error)
    assert not lanes.errors
    single = run_of(tmp_path / "alone", 1, "train.steps=20", "method={name: dora, rank: 4}")
    close(channel.losses, alone(single).losses)


def test_a_lane_whose_pass_fails_fails_alone(tmp_path):
    """Its tokens are none of the base's vocabulary; the others' gradients of the pass that failed count once."""
    keys = ["train.steps=12", "train.micro_batch_rows=2", "method.rank=4", "method.dropout=0.1"]
    kinds = [keys, [*keys[:2], "method={name: dora, rank: 4}"]]
    lanes = Together(first := run_of(tmp_path, 0, *kinds[0]))
    wrong = random_rows(8, vocabulary=10**6, longest=24)
    runs = [first, run_of(tmp_path, 1, *kinds[1])]
    channels = [Recorder(), Recorder()]
    for i, (run, channel) in enumerate(zip(runs, channels, strict=True)):
        lanes.start(str(i), run, channel)
    lanes.start("wrong", run_of(tmp_path, 2, *keys), Recorder(), [*ROWS, *wrong])
    lanes.end()
    assert isinstance(lanes.errors.pop("wrong"), IndexError)
    assert not lanes.errors
    for i, (channel, kind) in enumerate(zip(channels, kinds, strict=True)):
        close(channel.losses, alone(run_of(tmp_path / "alone", i, *kind)).losses)


def test_a_pass_with_too_many_tokens_is_made_in_parts(tmp_path, monkeypatch):
    """Memory runs out in the middle of each pass that has more than two micro-batches."""
    passes: list[int] = []
    whole = Base._pass

    def scarce(self, parts):
        passes.append(len(parts))
        whole(self, parts)
        if len(parts) > 2:
            raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Base, "_pass", scarce)
    keys = ["train.steps=10", "train.micro_batch_rows=2", "method.rank=4"]
    lanes = together([run_of(tmp_path / "lanes", i, *keys) for i in range(3)])
    monkeypatch.undo()
    for i, lane in enumerate(lanes):
        close(lane.losses, alone(run_of(tmp_path / "alone", i, *keys)).losses)
    assert max(passes) > 2
    assert max(passes[len(passes) // 2 :]) == 2, "it learned how much is too much"


def test_what_a_lane_commits_a_run_alone_goes_on_from_and_back(tmp_path):
    keys = ["train.steps=12", "train.commit_every=4", "train.keep_last=9", "method={name: dora, rank: 4}"]
    unbroken = alone(run_of(tmp_path / "unbroken", 0, *keys))
    run = run_of(tmp_path / "moved", 0, *keys)
    first = Recorder(stop_at=4)
    lanes = Together(run)
    lanes.start("0", run, first)
    lanes.end()
    second = Recorder(stop_at=8)
    train_worker(run, MemoryData(ROWS, HELD_OUT), World(), second)  # type: ignore[arg-type]
    (third,) = together([run])
    ends = [recorder.of("step")[-1]["step"] for recorder in (first, second)]
    assert [recorder.of("resume")[0]["step"] for recorder in (second, third)] == ends
    assert 0 < ends[0] < ends[1] < 12
    close([*first.losses, *second.losses, *third.losses], unbroken.losses)
    same_artefact(tmp_path / "moved" / "0", tmp_path / "unbroken" / "0")


def test_dropout_of_a_lane_is_that_of_the_run_alone(tmp_path):
    """It is not merely as strong: the same inputs are dropped."""
    keys = ["train.steps=3", "method.dropout=0.5", "method.rank=8", "train.micro_batch_rows=2", "train.batch_rows=4"]
    other = run_of(tmp_path, 1, "train.steps=3", "method.rank=2")
    lane, _ = together([run_of(tmp_path, 0, *keys), other])
    close(lane.losses, alone(run_of(tmp_path / "alone", 0, *keys)).losses, 1e-5)


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("method={name: ia3}", "method ia3"),
        ("train.optimizer=lion", "train.optimizer"),
        ("workers.count=2", "several workers"),
        ("data.packing=off", "data.packing"),
        ("train.neftune=5", "neftune"),
        ("train.layer_decay=0.9", "layer_decay"),
        ("method={name: dora, dropout: 0.1}", "dropout"),
    ],
)
def test_what_cannot_be_a_lane_says_why(tmp_path, override, word):
    assert refusal(toy_run(tmp_path)) is None
    assert word in (refusal(toy_run(tmp_path, override)) or "")


def test_runs_of_different_bases_are_told_apart(tmp_path):
    run = toy_run(tmp_path)
    assert difference(run, toy_run(tmp_path, "seed=5", "method.rank=3")) is None
    assert difference(run, toy_run(tmp_path, "method={name: qlora}")) == "method, quantized"
    assert difference(run, toy_run(tmp_path, "train.precision=bf16")) == "train.precision"


def test_the_base_alone_is_measured_once(tmp_path, monkeypatch):
    runs = [run_of(tmp_path, i, "train.steps=1") for i in range(3)]
    seen: list[int] = []
    original = Base._together

    def counted(self, asks):
        seen.extend(len(ask.what.batches) for ask in asks if isinstance(ask.what, Losses))
        original(self, asks)

    monkeypatch.setattr(Base, "_together", counted)
    lanes = together(runs)
    assert len({e["loss"] for lane in lanes for e in lane.of("evaluation") if e["step"] == 0}) == 1
    assert len(seen) == 1 + len(runs)  # the base, and each at its end
