"""Small things that tests share: rows in memory, a channel that remembers, a run of the embedded base."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ftray.config import Run, parse_run
from ftray.data.prepared import Row


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """What another thread does, however long it takes to come to it."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"nothing in {seconds:g} s"
        time.sleep(0.001)


class MemoryRows:
    """What `ftray.data.prepared.Rows` is to the loop, from a list."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.lengths = np.array([len(row.tokens) for row in rows], np.int32)
        self.target_counts = np.array([row.targets.sum() for row in rows], np.int32)
        self.sizes, self.weights = (len(rows),), (1.0,)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Row:
        return self.rows[i]

    def provenance(self, i: int) -> str:
        return f"memory:{i + 1}"


class MemoryData:
    def __init__(self, train: list[Row], held_out: list[Row] | None = None) -> None:
        self.train = MemoryRows(train)
        self.held_out = MemoryRows(held_out) if held_out else None
        self.digest = "0" * 64
        self.facts: dict[str, Any] = {"digest": self.digest, "rows": {"train": len(train)}, "chat_template_hash": None}


class Recorder:
    """A channel that keeps events, and can ask to stop or raise at a step."""

    def __init__(self, *, stop_at: int | None = None, fail_at: int | None = None) -> None:
        self.events: list[dict[str, Any]] = []
        self.stop_at, self.fail_at = stop_at, fail_at

    def emit(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        if event["kind"] == "step" and event["step"] == self.fail_at:
            raise InterruptedError(f"killed after step {event['step']}")

    def stop_requested(self) -> bool:
        steps = self.of("step")
        return self.stop_at is not None and bool(steps) and steps[-1]["step"] >= self.stop_at

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["kind"] == kind]

    @property
    def losses(self) -> list[float]:
        return [event["loss"] for event in self.of("step")]


class CountingLinear(torch.nn.Linear):
    """Remembers how many rows each call had. A forward hook would not see calls that go past hooks."""

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.calls: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(x))
        return super().forward(x)


def random_rows(count: int, seed: int = 0, vocabulary: int = 500, longest: int = 40) -> list[Row]:
    """Rows of random tokens with a rule to learn: the second half repeats the first."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        half = random.integers(50, 50 + vocabulary, int(random.integers(2, longest // 2)))
        tokens = np.concatenate([half, half]).astype(np.int32)
        targets = np.arange(len(tokens)) >= len(half)
        rows.append(Row(tokens, targets, np.array([len(tokens)], np.int32)))
    return rows


def random_pairs(count: int, seed: int = 0) -> list[Row]:
    """Pairs of random tokens with a rule to learn: what is chosen is of the lower half of the vocabulary."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        prompt = random.integers(50, 500, int(random.integers(3, 12)))
        better, worse = (random.integers(low, low + 200, int(random.integers(2, 6))) for low in (50, 300))
        tokens = np.concatenate([prompt, better, prompt, worse]).astype(np.int32)
        border = len(prompt) + len(better)
        targets = np.ones(len(tokens), bool)
        targets[: len(prompt)] = targets[border : border + len(prompt)] = False
        rows.append(Row(tokens, targets, np.array([border, len(tokens) - border], np.int32)))
    return rows


def dpo_run(folder: Any, *overrides: str, method: str = "{name: lora, rank: 4, alpha: 8}") -> Run:
    """`toy_run` on preferences."""
    source = "data.sources=[{path: unused.jsonl, format: preference}]"
    return toy_run(folder, source, "objective=dpo", *overrides, method=method)


def toy_run(folder: Any, *overrides: str, method: str = "{name: lora, rank: 4, alpha: 8}") -> Run:
    """A short fp32 LoRA run of the embedded base in `folder`; of one or two steps, the last has the whole rate."""
    steps = next((int(item.split("=")[1]) for item in overrides if item.startswith("train.steps=")), 20)
    text = f"""
name: toy
model: {{path: embedded}}
method: {method}
data: {{sources: [{{path: unused.jsonl, format: text}}], max_length: 128}}
train:
  steps: 20
  batch_rows: 8
  micro_batch_rows: 8
  learning_rate: 2e-3
  precision: fp32
  schedule: {{name: linear, warmup: {min(2, steps - 1)}}}
output: {folder}
"""
    return parse_run(text, "toy run", overrides)


def cheese_rows(count: int, split: str = "train") -> list[Row]:
    """The first rows of an embedded tenant's data, the assistant's words as targets: something real to learn."""
    from ftray.config import Model
    from ftray.data.tokenizer import load_tokenizer
    from ftray.embedded import data_path

    tokenizer = load_tokenizer(Model(path="embedded"))
    rows = []
    for line in data_path(f"cheese/{split}.jsonl").read_text(encoding="utf-8").splitlines()[:count]:
        messages = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        tokens = np.array(tokenizer(whole, add_special_tokens=False).input_ids, np.int32)
        rows.append(Row(tokens, np.arange(len(tokens)) >= start, np.array([len(tokens)], np.int32)))
    return rows
