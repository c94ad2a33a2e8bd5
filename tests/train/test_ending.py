"""A base that never learned the token which ends an answer: no adapter under its frozen head can write it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ftray.config import Model
from ftray.model import ending
from ftray.model.ending import unlearned_end
from ftray.model.load import load_base, load_frozen
from ftray.train import loop
from ftray.train.lanes import Base
from ftray.train.loop import train_worker
from ftray.train.world import World
from tests.toys import MemoryData, Recorder, random_rows, toy_run


def with_head(rows: torch.Tensor, *, trained: bool = False) -> Any:
    head = nn.Linear(rows.shape[1], rows.shape[0], bias=False)
    head.weight = nn.Parameter(rows, requires_grad=trained)
    return SimpleNamespace(get_output_embeddings=lambda: head)


@pytest.mark.parametrize("left", ["zeros", "one row and noise"])
def test_tokens_that_were_never_seen_are_told_by_their_common_row(left, monkeypatch):
    monkeypatch.setattr(ending, "_ROWS", 7)  # not all at once, nor in whole blocks
    torch.manual_seed(0)
    rows = torch.randn(100, 16)
    common = torch.zeros(16) if left == "zeros" else torch.randn(16)
    rows[50:80] = common + 1e-4 * torch.randn(30, 16) * (left != "zeros")
    assert unlearned_end(with_head(rows), 60) == 29
    assert unlearned_end(with_head(rows), 3) == 0
    assert unlearned_end(with_head(rows.to(torch.bfloat16)), 3) == 0
    assert unlearned_end(with_head(rows, trained=True), 60) == 0


@pytest.fixture
def forgetful(monkeypatch):
    """The embedded base, whose end token has the row of twenty others."""

    def load(run, *arguments: Any):
        base, unquantized = load_base(run, *arguments)
        weight = base.get_output_embeddings().weight
        with torch.no_grad():
            weight[100:120] = weight[base.config.eos_token_id]
        return base, unquantized

    monkeypatch.setattr(loop, "load_base", load)
    monkeypatch.setattr("ftray.train.lanes.load_base", load)


def warnings(channel: Recorder) -> list[str]:
    return [event["text"] for event in channel.of("warning")]


@pytest.mark.parametrize(("method", "told"), [("{name: lora, rank: 2}", True), ("{name: full}", False)])
def test_a_run_says_once_that_its_answers_may_not_end(tmp_path, forgetful, method, told):
    run = toy_run(tmp_path, "train.steps=3", "train.commit_every=1", method=method)
    data = MemoryData(random_rows(16))
    first = Recorder(stop_at=1)
    train_worker(run, data, World(), first)
    assert [("the base never learned" in w and "that of 20 other tokens" in w) for w in warnings(first)] == [
        True
    ] * told
    again = Recorder()
    train_worker(run, data, World(), again)
    assert warnings(again) == []


def test_a_run_that_names_another_end_is_not_told(tmp_path, forgetful):
    channel = Recorder()
    run = toy_run(tmp_path, "train.steps=1", 'evaluate.decoding.stop=["\\n"]')
    train_worker(run, MemoryData(random_rows(16)), World(), channel)
    assert warnings(channel) == []


def test_a_lane_says_so_too(tmp_path, forgetful):
    run, channel = toy_run(tmp_path, "train.steps=1"), Recorder()
    base = Base(run, World())
    try:
        base.train("a", run, MemoryData(random_rows(16)), channel)
    finally:
        base.close()
    assert len(warnings(channel)) == 1


def test_the_embedded_base_knows_how_to_end(tmp_path):
    channel = Recorder()
    run = toy_run(tmp_path, "train.steps=1")
    train_worker(run, MemoryData(random_rows(16)), World(), channel)
    assert warnings(channel) == []


def test_a_base_of_another_maker_does_not(ftray_data: Path):
    model = Model(path=str(ftray_data / "weights/stories260K-llama"))
    base, _ = load_frozen(model, quantized=False, dtype=torch.float32, device="cpu", attention="sdpa")
    assert unlearned_end(base, base.config.eos_token_id) > 150
