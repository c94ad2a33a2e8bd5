"""`ftray generate` on Ray Data: workers die, the driver stops, one line a row."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from ftray.config import Decoding, Model, Source
from ftray.errors import RunError
from ftray.evaluate import generate as generating
from ftray.evaluate import places
from ftray.evaluate.generate import _Actor, generate
from ftray.evaluate.generation import Asking
from ftray.registry.base import facts_of_base
from tests.adapters import change_facts, seal, write_adapter
from tests.ray.holding import held
from tests.ray.runs import processes

pytestmark = pytest.mark.usefixtures("local_ray")
ROWS = 96


def up_to(number: int, gate: Path) -> type:
    """The actor, which begins part `number` and those after it only once the file `gate` is there; what that says is an
    error. So what the driver does before comes in the middle, however late it is."""

    class UpTo(_Actor):
        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            if any(json.loads(text)["number"] >= number for text in batch["part"]):
                end = time.monotonic() + 240
                while not gate.exists():
                    assert time.monotonic() < end, "nobody opened the gate"
                    time.sleep(0.02)
                if error := gate.read_text():
                    raise RuntimeError(error)
            return super().__call__(batch)

    return UpTo


def test_workers_without_a_place_are_told_and_not_waited_for(tmp_path: Path, monkeypatch):
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "Cheese {i}?"}}\n' for i in range(8)))
    source = Source.model_validate(
        {"path": str(tmp_path / "prompts.jsonl"), "format": {"name": "prompt_completion", "completion": ""}}
    )
    cpus = int(ray.cluster_resources()["CPU"])
    asking = Asking(
        source, str(tmp_path / "out.jsonl"), Decoding(max_tokens=2), base="embedded", part_rows=1, workers=cpus
    )
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(places, "_TOLD_AFTER", 0.5)
    monkeypatch.setattr(places, "_SETTLE_SECONDS", 1.0)
    with held(cpus):
        monkeypatch.setattr(places, "WAIT_SECONDS", 2.0)
        with pytest.raises(RunError, match="for 2 s no node had 1 CPU free for a worker"):
            generate(asking, told.append)
    assert "waiting for a worker's place, 1 CPU, for at most 2 s" in [event.get("text") for event in told]
    monkeypatch.setattr(places, "WAIT_SECONDS", 240.0)
    with held(cpus - 1):
        assert generate(asking, told.append)["rows"] == 8


def test_a_dead_worker_and_a_stopped_driver_lose_nothing(tmp_path: Path, monkeypatch):
    base = facts_of_base(Model(path="embedded"))
    for i in range(3):
        write_adapter(tmp_path / f"a{i}", seed=i, base=base, scale=0.05)
        change_facts(tmp_path / f"a{i}", run=None)
        seal(tmp_path / f"a{i}")
    rows = [{"prompt": f"Tell me about cheese {i}.", "who": str(tmp_path / f"a{i % 3}")} for i in range(ROWS)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source.model_validate(
        {"path": str(tmp_path / "prompts.jsonl"), "format": {"name": "prompt_completion", "completion": ""}}
    )
    asking = Asking(
        source,
        str(tmp_path / "out.jsonl"),
        Decoding(max_tokens=8),
        adapter_column="who",
        base="embedded",
        part_rows=8,
        workers=1,
    )
    stopped, killed = RuntimeError("stopped in the middle"), []

    def stop(event: dict[str, Any]) -> None:
        if event["kind"] == "progress" and event["done"] >= 24:
            raise stopped

    monkeypatch.setattr(generating, "_Actor", up_to(8, tmp_path / "first"))
    with pytest.raises(RuntimeError, match="stopped in the middle"):
        generate(asking, stop)
    kept = len(list((tmp_path / "out.jsonl.parts").glob("part-*.json")))
    assert 3 <= kept <= 8
    (tmp_path / "first").write_text("its driver has stopped")
    before = {process.pid for process in processes("MapWorker")}

    def kill_a_worker(event: dict[str, Any]) -> None:
        if event["kind"] == "progress" and not killed:
            killed.extend(p.pid for p in processes("MapWorker") if p.pid not in before)
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
            (tmp_path / "second").touch()

    monkeypatch.setattr(generating, "_Actor", up_to(11, tmp_path / "second"))
    facts = generate(asking, kill_a_worker)
    assert len(killed) == 1
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [answer["row"] for answer in answers] == list(range(1, ROWS + 1))
    assert [answer["adapter"] for answer in answers] == [row["who"] for row in rows]
    assert all(answer["error"] is None and answer["tokens"] for answer in answers)
    assert facts["failed"] == 0
    assert not (tmp_path / "out.jsonl.parts").exists()
