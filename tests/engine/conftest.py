from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ftray.config import Model
from ftray.engine.engine import Engine, load_base
from ftray.engine.options import EngineOptions
from ftray.model.served import Base
from ftray.train.loop import train_worker
from ftray.train.world import World
from tests.engine.crowd import CONTEXT, Adapters, nothing_is_left
from tests.toys import MemoryData, Recorder, cheese_rows, toy_run

METHODS = {
    "lora": ("{name: lora, rank: 16}", 1e-2),
    "lora patterns": ("{name: lora, rank: 4, rank_pattern: {q_proj: 2}, alpha_pattern: {k_proj: 3}}", 1e-2),
    "rslora": ("{name: lora, rank: 8, rslora: true, targets: [q_proj, v_proj]}", 1e-2),
    "qlora": ("{name: qlora, rank: 32}", 5e-3),
    "dora": ("{name: dora, rank: 4, targets: [q_proj, down_proj]}", 1e-2),
    "qdora": ("{name: qdora, rank: 8}", 1e-2),
    "adalora": ("{name: adalora, rank: 6, target_rank: 3, every: 2}", 2e-2),
    "vera": ("{name: vera, rank: 64}", 5e-2),
    "ia3": ("{name: ia3}", 1e-1),
    "prefix": ("{name: prefix, tokens: 8}", 3e-2),
    "projected prefix": ("{name: prefix, tokens: 70, projection: true, hidden: 32}", 3e-3),
    "prompt": ("{name: prompt, tokens: 8, text: 'Bless the cheese, my friend.'}", 3e-2),
    "p_tuning": ("{name: p_tuning, tokens: 5, hidden: 64}", 3e-3),
    "bottleneck": ("{name: bottleneck, size: 16}", 5e-3),
    "houlsby": ("{name: bottleneck, size: 24, placement: houlsby, activation: silu}", 5e-3),
}
"""Every method that trains something beside a frozen base, and a rate that moves it far in a few steps."""


@pytest.fixture(scope="session")
def artefacts(tmp_path_factory) -> dict[str, Path]:
    """An artefact of each of METHODS, on the embedded base, by name."""
    root, rows, made = tmp_path_factory.mktemp("artefacts"), cheese_rows(32), {}
    for name, (method, rate) in METHODS.items():
        run = toy_run(root / name.replace(" ", "-"), "train.steps=10", f"train.learning_rate={rate}", method=method)
        train_worker(run, MemoryData(rows), World(), Recorder())  # type: ignore[arg-type]
        made[name] = Path(run.folder, "artefact")
    return made


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(Model(path="embedded"), quantized=False, dtype=torch.float32)


@pytest.fixture
def adapters(base) -> Adapters:
    return Adapters(base)


@pytest.fixture
def new_engine(base, adapters):
    """Engines one at a time; at the end of a test nothing may be left in the last one."""
    made: list[Engine] = []

    def new(**options: Any) -> Engine:
        if made:
            made[-1].close()
        made.append(Engine(base, adapters.load, EngineOptions(**({"slots": 4, "context": CONTEXT} | options))))
        return made[-1]

    yield new
    try:
        nothing_is_left(made[-1])
    finally:
        made[-1].close()
    assert base.pooled.nbytes == 0


@pytest.fixture
def engine(new_engine) -> Engine:
    return new_engine()
