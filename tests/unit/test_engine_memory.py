"""What serving takes: the plan from shapes alone, and the refusal where there is no room."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ftray.cli.serve import check_json, memory_text
from ftray.config import Model
from ftray.engine import engine as engine_module
from ftray.engine import slots as slots_module
from ftray.engine.engine import Engine, load_base
from ftray.engine.memory import Need, memory_plan
from ftray.engine.options import EngineOptions
from ftray.errors import ModelError
from ftray.model.source import find_shapes
from serve.config import parse_serve

ROOT = Path(__file__).parents[2]
LLAMA = """
applications:
- name: ftray
  import_path: serve.app:build
  args:
    model: {path: meta-llama/Llama-3.1-8B}
    registry: registry
"""


def items_of(path: str, options: EngineOptions, **how: Any) -> dict[str, int]:
    how = {"quantized": True, "precision": "bf16", "gpu": True, "adapters": True} | how
    return {item.name: item.bytes for item in memory_plan(find_shapes(Model(path=path))[0], options, **how).items}


def test_llama_at_defaults() -> None:
    items = items_of("meta-llama/Llama-3.1-8B", EngineOptions())
    assert items["keys and values"] == 32 * 4096 * 32 * 2 * 8 * 128 * 2 == 16 << 30
    assert items["weights in NF4"] + items["weights not quantized"] == pytest.approx(5.7e9, rel=0.02)
    assert items["adapters on the device"] == 32 * 41_943_040 * 2, "rank 16 on every linear layer has 41,943,040"
    assert items["adapters in memory"] == 4 << 30
    alone = items_of("meta-llama/Llama-3.1-8B", EngineOptions(), adapters=False, quantized=False)
    assert not {"adapters on the device", "adapters in memory"} & alone.keys()
    assert alone["weights"] == 2 * 8_030_261_248


@pytest.fixture(scope="module")
def base() -> Any:
    return load_base(Model(path="embedded"), quantized=False, dtype=torch.float32)


@pytest.mark.parametrize(("slots", "context"), [(3, 64), (5, 100), (1, None)])
def test_keys_and_values_are_those_of_the_engine(base: Any, slots: int, context: int | None) -> None:
    options = EngineOptions(slots=slots, context=context)
    items = items_of("embedded", options, quantized=False, precision="fp32", gpu=False)
    engine = Engine(base, lambda ref: None, options)  # type: ignore[arg-type, return-value]
    engine.close()
    assert items["keys and values"] == engine.slots.nbytes
    parameters = {p.data_ptr(): p for p in base.model.parameters()}
    assert items["weights"] == sum(p.nbytes for p in parameters.values())


def test_slots_for_which_there_is_no_memory_are_refused(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def try_it(slots: int, context: int) -> None:
        Engine(base, lambda ref: None, EngineOptions(slots=slots, context=context)).close()  # type: ignore[arg-type, return-value]

    how: dict[str, Any] = {"quantized": False, "precision": "fp32", "gpu": False, "adapters": False}
    need = memory_plan(find_shapes(Model(path="embedded"))[0], EngineOptions(slots=64, context=256), **how).need
    monkeypatch.setattr(engine_module, "free_on", lambda device: need.kept // 2 + need.scores)
    with pytest.raises(ModelError) as error:
        try_it(64, 256)
    assert error.value.where == "engine.slots, engine.context"
    assert error.value.what.startswith("engine.slots 64 × engine.context 256 take ")
    assert error.value.what.endswith(" GiB; cpu has 0.02 GiB free")
    assert error.value.hint == "engine.slots=32 or engine.context=128 fits"
    try_it(32, 256)
    try_it(64, 128)
    for slots, context in ((33, 256), (64, 192)):
        with pytest.raises(ModelError):
            try_it(slots, context)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("can't allocate\nat …")])
def test_memory_that_is_not_given_out_is_told_as_such(
    base: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def zeros(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(engine_module, "free_on", lambda device: None)
    monkeypatch.setattr(slots_module.torch, "zeros", zeros)
    with pytest.raises(ModelError, match=r"engine\.slots 2 × engine\.context 64 take .*; (CUDA|can't)") as told:
        Engine(base, lambda ref: None, EngineOptions(slots=2, context=64))  # type: ignore[arg-type, return-value]
    assert told.value.__cause__ is error


def test_what_can_help_is_told_and_nothing_else() -> None:
    need = Need(slots=1, context=64, prompt_tokens=64, heads=1, token=1 << 20, each=2)
    need.refuse(None, "a device")
    need.refuse(need.kept + need.scores, "a device")
    with pytest.raises(ModelError, match="smaller base"):
        need.refuse(need.kept, "a device")


# ------------------------------------------------------------------------------------------------------------- --check


def test_check_shows_it() -> None:
    text = memory_text(parse_serve(LLAMA, "x"))
    assert "32 slots of 4,096 places; prompts are read as on a GPU, 4,096 tokens a step" in text
    assert "keys and values          16.0 GiB  device  32 slots × 4,096 places × 131,072 B" in text
    assert "adapters in memory        4.0 GiB  host" in text
    small = memory_text(parse_serve(LLAMA, "x", ["engine={slots: 8, context: 1024}", "replicas.gpus=0"]))
    assert "8 slots of 1,024 places; prompts are read on a CPU, 256 tokens a step" in small
    assert "1.0 GiB  device  8 slots × 1,024 places" in small


def test_check_shows_it_as_json() -> None:
    file = parse_serve(LLAMA, "x")
    found = json.loads(check_json(file))
    plan = found.pop("plan")
    assert found == file.dump(), "the resolved file, as it was"
    assert (plan["slots"], plan["context"]) == (32, 4096)
    assert plan["total_gib"] == pytest.approx(sum(i["bytes"] for i in plan["items"] if i["place"] == "GPU") / (1 << 30))


def test_a_base_that_is_elsewhere_leaves_the_rest_of_the_check() -> None:
    file = parse_serve(LLAMA, "x", ["model.path=/no/such/base"])
    assert "not known here" in memory_text(file)
    assert "no such folder" in json.loads(check_json(file))["plan"]["error"]


def test_it_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "serve.yaml").write_text(LLAMA)
    code = f"""
from ftray.cli.main import call
assert call(["serve", {str(tmp_path / "serve.yaml")!r}, "--check"]) == 0
import sys
assert not {{"torch", "ray", "transformers"}} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "keys and values" in done.stdout
