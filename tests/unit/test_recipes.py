"""Every shipped recipe loads and passes `check`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from ftray.cli.main import call
from ftray.cli.recipes import list_recipes, recipe_text
from ftray.config import LOW_RANK, Run, load_run, recipe_names

NEEDS_FTRAY_DATA = [name for name in recipe_names() if "FTRAY_DATA" in recipe_text(name)]
ELSEWHERE = [name for name in recipe_names() if name not in NEEDS_FTRAY_DATA]
EXPECTED = {
    "e2e-lora-stories260k",
    "e2e-qlora-tiny",
    "gpt2-medium-full-e2e",
    "gpt2-medium-lora-e2e",
    "llama-3.1-8b-full-zero3-offload",
    "llama-3.1-8b-full-zero3-offload-1gpu",
    "llama-3.1-8b-qlora-1gpu",
    "llama-3.1-8b-qlora-2x8gpu",
    "mistral-7b-qlora-alpaca",
    "mistral-7b-qlora-alpaca-reversed",
    "quickstart-cheese",
    "quickstart-restaurant",
    "tiny-full-zero1-offload",
    "tiny-full-zero2-offload",
    "tiny-full-zero3-offload",
}


def test_the_recipes_that_are_promised_are_there() -> None:
    assert set(recipe_names()) >= EXPECTED


@pytest.mark.parametrize(("name", "about"), list_recipes())
def test_the_first_line_says_what_it_is(name: str, about: str) -> None:
    assert recipe_text(name).startswith("# ")
    assert 20 <= len(about) <= 120


@pytest.mark.parametrize("name", ELSEWHERE)
def test_check(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _check(name, tmp_path, capsys)


@pytest.mark.parametrize("name", NEEDS_FTRAY_DATA)
def test_check_with_the_shared_data(
    name: str, ftray_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FTRAY_DATA", str(ftray_data))
    _check(name, tmp_path, capsys)


def _check(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, overrides = load_run(name), []
    if run.data.sources[0].path.startswith("runs/"):  # rows that the user makes first, as the recipe says
        (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
        overrides.append(f"data.sources.0.path={tmp_path}/rows.jsonl")
    assert call(["check", name, *overrides, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["run"]["name"] == run.name
    assert 0 < found["plan"]["trained_parameters"] <= found["plan"]["parameters"]
    assert found["plan"]["fits"] in (True, None)
    assert (found["plan"]["trained_share"] < 0.25) == isinstance(run.method, LOW_RANK)
    if run.workers.gpu_memory_gib:
        assert run.method.quantized or run.strategy
        assert found["plan"]["fits"] is True


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_have_their_keys_in_the_order_of_the_run_file(name: str) -> None:
    raw = yaml.safe_load(recipe_text(name))
    assert list(raw) == [key for key in Run.model_fields if key in raw]


def test_the_plan_of_an_8b_qlora_without_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["check", "llama-3.1-8b-qlora-2x8gpu"]) == 0
    told = capsys.readouterr().out
    assert "8,030,261,248 parameters" in told
    assert "128 rows a step = 16 workers × 2 micro-batches of 4" in told
    assert "167,772,160 of 8,198,033,408 parameters, 2.05 %" in told
    assert "fits 80 GiB" in told


def test_the_lora_papers_hyperparameters() -> None:
    run = load_run("gpt2-medium-lora-e2e")
    t = run.train
    assert (t.epochs, t.batch_rows, t.learning_rate, t.weight_decay) == (5, 8, 2e-4, 0.01)
    assert (t.schedule.name, t.schedule.warmup, t.optimizer) == ("linear", 500, "adamw")
    assert t.label_smoothing == 0.1
    assert isinstance(run.method, LOW_RANK)
    assert (run.method.rank, run.method.alpha, run.method.dropout, run.method.targets) == (4, 32, 0.1, ["c_attn"])


def test_the_same_rows_turned_around() -> None:
    forward, backward = load_run("mistral-7b-qlora-alpaca"), load_run("mistral-7b-qlora-alpaca-reversed")
    assert forward.data.sources[0].path == backward.data.sources[0].path
    turned = backward.data.sources[0].format
    assert turned.name == "prompt_completion"
    assert "{output}" in turned.prompt
    assert turned.completion == "{instruction}"
