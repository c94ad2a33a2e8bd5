"""Small real runs for the tests of evaluation."""

from __future__ import annotations

from pathlib import Path

from ftray.config import Run, parse_run
from ftray.manifest import write_text
from ftray.train.loop import train_worker
from ftray.train.world import World
from tests.toys import MemoryData, Recorder, cheese_rows

HELD_OUT = 12


def cheese_run(folder: Path, method: str = "{name: lora, rank: 4}", *overrides: str, steps: int = 12) -> Run:
    """A short fp32 run on the cheese expert's conversations, finished, in `folder`."""
    text = f"""
name: {folder.name}
model: {{path: embedded}}
method: {method}
data:
  sources: [{{path: embedded:cheese/train.jsonl, format: messages}}]
  held_out: [{{path: embedded:cheese/held_out.jsonl, format: messages, limit: {HELD_OUT}}}]
  max_length: 256
train:
  steps: {steps}
  batch_rows: 8
  micro_batch_rows: 8
  learning_rate: 1e-2
  precision: fp32
evaluate: {{metrics: [chrf, words], decoding: {{max_tokens: 24}}}}
output: {folder}
"""
    run = parse_run(text, "cheese run", overrides)
    data = MemoryData(cheese_rows(64), cheese_rows(HELD_OUT, "held_out"))
    train_worker(run, data, World(), Recorder())  # type: ignore[arg-type]
    write_text(folder / "run.yaml", run.to_yaml())
    return run
