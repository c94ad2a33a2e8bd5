"""Training on a CUDA device: the CPU's losses, the planned memory, the share of the device's peak."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ftray.config import Run, load_run, parse_run
from ftray.embedded import base_path
from ftray.model.plan import make_plan
from ftray.model.source import find_shapes
from ftray.model.states import GIB
from ftray.train.loop import train_worker
from ftray.train.world import World
from tests.toys import MemoryData, Recorder, random_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

SHAPES: dict[str, dict[str, Any]] = {
    "28M": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8,
            "intermediate_size": 1408, "vocab_size": 32_000},
    "1B": {"hidden_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 32, "num_key_value_heads": 8,
           "intermediate_size": 7168, "vocab_size": 32_000},
}  # fmt: skip
LENGTH, ROWS, WARM_UP = 512, 16, 3


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of random Llamas, with the embedded base's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folders = {}
    for name, shape in SHAPES.items():
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=2048, tie_word_embeddings=False))
        model.bfloat16().save_pretrained(folder)
        for file in Path(base_path()).iterdir():
            if "token" in file.name or file.name.endswith(".jinja"):
                shutil.copy(file, folder)
        folders[name] = folder
    return folders


def a_run(base: Path, folder: Path, method: str, **train: Any) -> Run:
    values = {"steps": 20, "batch_rows": ROWS, "micro_batch_rows": ROWS, "learning_rate": 2e-4} | train
    text = f"""
        name: gpu
        model: {{path: {base}}}
        method: {method}
        data: {{sources: [{{path: unused.jsonl, format: text}}], max_length: {LENGTH}}}
        train: {values}
        workers: {{count: 1, gpus: 1}}
        output: {folder}
        """
    return parse_run(text, "gpu")


def rows(count: int, length: int = LENGTH) -> MemoryData:
    return MemoryData(
        [row for row in random_rows(count, vocabulary=1500, longest=2 * length) if len(row.tokens) <= length]
    )


def full_rows(count: int) -> MemoryData:
    """Rows that are all as long as the plan assumes."""
    import numpy as np

    from ftray.data.prepared import Row

    random = np.random.default_rng(0)
    ones = np.arange(LENGTH) > 0
    lengths = np.array([LENGTH], np.int32)
    return MemoryData([Row(random.integers(50, 1500, LENGTH).astype(np.int32), ones, lengths) for _ in range(count)])


def trained(run: Run, data: MemoryData, device: str) -> Recorder:
    channel = Recorder()
    train_worker(run, data, World(device=torch.device(device)), channel)  # type: ignore[arg-type]
    return channel


@pytest.mark.parametrize("method", ["{name: qlora, rank: 16}", "{name: lora, rank: 16}"])
def test_losses_are_the_cpus(bases, tmp_path, method):
    data = rows(64, 64)
    optimizer = "paged_adamw_8bit" if "qlora" in method else "adamw"
    settings: dict[str, Any] = {"optimizer": optimizer, "learning_rate": 1e-3}
    gpu = trained(a_run(bases["28M"], tmp_path / "gpu", method, **settings), data, "cuda:0")
    cpu = trained(a_run(bases["28M"], tmp_path / "cpu", method, **settings), data, "cpu")
    assert gpu.losses[-1] < gpu.losses[0]
    assert max(abs(a - b) / b for a, b in zip(gpu.losses, cpu.losses, strict=True)) < 1e-2


@pytest.mark.parametrize("base", ["28M", "1B"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["whole", "checkpointed"])
def test_memory_is_as_planned(bases, tmp_path, base, checkpointing, capsys):
    run = a_run(
        bases[base],
        tmp_path,
        "{name: qlora, rank: 16}",
        optimizer="paged_adamw_8bit",
        gradient_checkpointing=checkpointing,
    )
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    channel = trained(run, full_rows(ROWS * 20), "cuda:0")
    measured = (torch.cuda.max_memory_allocated() - before) / GIB
    plan = make_plan(run, find_shapes(run.model)[0])
    ours = ("context", "allocator's slack")  # torch does not count these as allocated
    planned = sum(i.bytes for i in plan.items if i.place == "GPU" and not i.pageable and i.name not in ours) / GIB
    with capsys.disabled():
        print(
            f"\n{base} QLoRA{', checkpointed' * checkpointing}: {measured:.2f} GiB measured, {planned:.2f} planned;",
            end=" ",
        )
        print(speed(channel, plan.parameters, frozen=True))
    assert measured == pytest.approx(planned, rel=0.1)


def speed(channel: Recorder, parameters: int, *, frozen: bool) -> str:
    """Tokens a second, and the achieved share of what a large bf16 product reaches on this device: 4 operations a
    parameter and token where the base is frozen (no gradient of its weights), else 6."""
    steps = channel.of("step")[WARM_UP:]
    rate = sum(e["tokens"] for e in steps) / sum(e["seconds"] for e in steps)
    share = rate * parameters * (4 if frozen else 6) / product_rate()
    return (
        f"{rate:,.0f} tokens/s, {share:.0%} of the bf16 rate of a large product ({product_rate() / 1e12:.0f} TFLOP/s)"
    )


_rate: list[float] = []


def product_rate() -> float:
    """bf16 operations a second of one 8192³ product, measured once."""
    if not _rate:
        a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        for _ in range(5):
            a @ a
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(20):
            a @ a
        torch.cuda.synchronize()
        _rate.append(20 * 2 * 8192**3 / (time.perf_counter() - started))
    return _rate[0]


@pytest.mark.parametrize("base", ["28M", "1B"])
def test_zero_3_with_offload(bases, tmp_path, base, capsys):
    """Full tuning on Ray Train with weights and states on the host: the losses of plain full tuning."""
    import threading

    from ftray.session import ray_session
    from ftray.train.launch import train
    from tests.ray.runs import write_run

    changes: dict[str, Any] = {
        "model__path": str(bases[base]),
        "method": {"name": "full"},
        "train__steps": 10,
        "train__precision": "bf16",
        "train__learning_rate": 1e-4,
        "workers": {"count": 1, "gpus": 1},
    }
    offload = {"zero": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"}
    losses: dict[str, list[float]] = {"plain": [], "offload": []}
    peaks = {}
    with ray_session(cpus=4):
        for name, strategy in (("plain", None), ("offload", offload)):

            def on_event(event: dict[str, Any], name: str = name) -> None:
                if event["kind"] == "step":
                    losses[name].append(event["loss"])

            file = write_run(tmp_path, name, **changes, strategy=strategy)
            summary = train(load_run(file), on_event=on_event, stop=threading.Event())
            peaks[name] = summary["peak_memory_gib"]
    with capsys.disabled():
        print(f"\n{base} full tuning, GiB of the GPU: {peaks['plain']:.2f} whole, {peaks['offload']:.2f} with offload")
    assert peaks["offload"] < 0.6 * peaks["plain"]
    assert max(abs(a - b) / b for a, b in zip(losses["offload"], losses["plain"], strict=True)) < 1e-2
