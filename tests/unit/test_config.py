"""Run files: what is read, what is refused, and how a refusal reads."""

from __future__ import annotations

import contextlib
import pickle
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ftray.config import QLoRA, Run, load_run, parse_run, recipe_names
from ftray.errors import (
    EXIT_RUN,
    EXIT_STOPPED,
    EXIT_USER,
    ArtefactError,
    ConfigError,
    DataError,
    FtrayError,
    ModelError,
    RunError,
    RunStopped,
    UserError,
)

MINIMAL = """
name: a
model: {path: embedded}
method: {name: qlora}
data: {sources: [{path: rows.jsonl, format: text}], held_out_fraction: 0.1}
train: {steps: 100}
"""


def read(*overrides: str, text: str = MINIMAL) -> Run:
    return parse_run(text, "a.yaml", overrides)


def refusal(*overrides: str, text: str = MINIMAL) -> str:
    with pytest.raises(ConfigError) as caught:
        read(*overrides, text=text)
    assert caught.value.exit_code == EXIT_USER
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------- reading


def test_defaults_are_filled_in_and_the_result_reads_back() -> None:
    run = read()
    assert isinstance(run.method, QLoRA)
    assert run.method.double_quantization
    assert run.folder == "runs/a"
    assert parse_run(run.to_yaml(), "again") == run
    assert Run.model_validate(run.dump()) == run


def test_every_shipped_recipe_reads_back() -> None:
    for name in recipe_names():
        run = load_run(name)
        assert parse_run(run.to_yaml(), name) == run


def test_yaml_numbers_and_words_of_yaml_1_2() -> None:
    assert read("train.learning_rate=1e-4").train.learning_rate == 1e-4
    assert read("train.learning_rate=3E-05").train.learning_rate == 3e-5
    assert read(text=MINIMAL.replace("steps: 100", "steps: 1, learning_rate: 1e-4")).train.learning_rate == 1e-4
    assert read("name=on").name == "on"  # YAML 1.1 makes True of it


def test_overrides_reach_into_lists_and_unions() -> None:
    run = read("data.sources.0.path=other.csv", "method={name: lora, rank: 4}", "workers.count=2", "train.epochs=2")
    assert run.data.sources[0].path == "other.csv"
    assert run.method.name == "lora"
    assert (run.train.steps, run.train.epochs) == (None, 2)  # the later of the two wins
    assert read("train.schedule.warmup=7", "train.schedule.name=linear").train.schedule.warmup == 7
    assert read("data.sources.0.format.column=story").data.sources[0].format.column == "story"  # type: ignore[union-attr]


def test_a_section_may_be_a_name_alone() -> None:
    assert read("method=lora").method == read("method={name: lora}").method
    assert read("method=lora", "method.rank=4").method.rank == 4  # type: ignore[union-attr]
    run = read("method=ia3", "train.schedule=linear", "objective=dpo", "data.sources.0.format=preference")
    names = (run.method.name, run.train.schedule.name, run.objective.name, run.data.sources[0].format.name)
    assert names == ("ia3", "linear", "dpo", "preference")
    assert "\n" not in refusal("method=q_proj") + refusal("method.targets=q_proj")


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROWS", "/data")
    text = MINIMAL.replace("rows.jsonl", '"${ROWS}/x.jsonl"')
    assert read(text=text).data.sources[0].path == "/data/x.jsonl"
    monkeypatch.delenv("ROWS")
    assert "the environment has no ROWS" in refusal(text=text)
    assert read(text=text.replace("${ROWS}", "${ROWS:-here}")).data.sources[0].path == "here/x.jsonl"
    assert read("output=${ROWS:-elsewhere}/{name}").folder == "elsewhere/a"


def test_a_run_from_a_file_a_folder_and_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(MINIMAL)
    assert load_run(tmp_path / "run.yaml") == load_run(tmp_path) == read()
    assert load_run(f"file://{tmp_path}") == read()
    assert load_run("llama-3.1-8b-qlora-1gpu").model.path == "meta-llama/Llama-3.1-8B"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no run\.yaml"):
        load_run(tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"did you mean 'llama-3\.1-8b-qlora-1gpu'"):
        load_run("llama-3.1-8b-qlora-1gpus")
    with pytest.raises(ConfigError, match="no such run file"):
        load_run(f"file://{tmp_path}/nothing.yaml")


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.learning_rat=1", "train.learning_rat: unknown key; did you mean 'learning_rate'?"),
        ("method.ranks=1", "method.ranks: unknown key; did you mean 'rank'?"),
        ("datas.x=1", "datas: unknown key; did you mean 'data'?"),
        ("data.sources.0.pth=x", "data.sources.0.pth: unknown key; did you mean 'path'?"),
        ("data.sources.0.format.colum=x", "format.colum: unknown key; did you mean 'column'?"),
        ("train.schedule.warm_up=3", "train.schedule.warm_up: unknown key; did you mean 'warmup'?"),
        ("method.zzz=1", "known keys: alpha, alpha_pattern"),
        ("method.name=qlorra", "'qlorra' is not known; did you mean 'qlora'?"),
        ("data.sources.0.format=mesages", "'mesages' is not known; did you mean 'messages'?"),
        ("train.optimizer=adamm", "train.optimizer: 'adamm' is not known; did you mean 'adamw'?"),
        ("train.optimizer=xyz", "'xyz' is not known; one of: adamw, adamw_8bit"),
        ("train.schedule=cosin", "train.schedule.name: 'cosin' is not known; did you mean 'cosine'?"),
        (
            "method={name: lora, quantization: nf4}",
            "method lora has none; method.name: qlora is LoRA over a base in NF4",
        ),
        ("method={name: dora, double_quantization: true}", "method.name: qdora is DoRA over a base in NF4"),
        ("method={name: qlora, quantization: nf4}", "its base is in NF4 as it is"),
        ("method={rank: 3}", "needs a `name`"),
        ("method=lorra", "method.name: 'lorra' is not known; did you mean 'lora'?"),
        ("method.targets=all-liner", "method.targets: 'all-liner' is not known; did you mean 'all-linear'?"),
        (
            "method.targets=q_proj",
            "method.targets: 'q_proj' is no list; write all-linear, or a list of names: [q_proj]",
        ),
        ("method={name: ia3, targets: k_proj}", "write default, or a list of names: [k_proj]"),
        ("train.steps=0", "train.steps"),
        ("train.steps=many", "train.steps"),
        ("train.precision=fp8", "train.precision"),
        ("workers.gpus=some", "workers.gpus"),
        ("name=a/b", "name"),
        ("data.max_rejected=1.5", "neither a whole number of rows nor a share"),
        ("train.schedule.warmup=1.5", "train.schedule.warmup: 1.5 is neither a whole number of steps nor a share"),
        ("data.held_out=[{path: x, format: text}]", "both `held_out` and `held_out_fraction`"),
        ("train.early_stopping={}", "early_stopping needs `evaluate_every`"),
        ("workers.count=17", "train.batch_rows 16 leaves some of 17 workers without a row"),
        ("data.sources=[]", "data.sources"),
        ("data.sources.3.path=x", "'3' in data.sources.3.path is not one of 0…0"),
        ("train.steps", "write key=value"),
        ("name.x=1", "name holds a value, not keys"),
        ("model=null", "model"),
        ("train.steps=[", "not valid YAML"),
    ],
)
def test_a_refusal_says_what_where_and_what_to_change(override: str, expected: str) -> None:
    assert expected in refusal(override)


def test_betas_are_those_of_the_optimizer() -> None:
    assert read().dump()["train"]["betas"] == [0.9, 0.999]
    for override in ("train.betas=null", "train.optimizer=lion"):
        lion = read("train.optimizer=lion", override)
        assert lion.train.betas == (0.9, 0.99)
        assert parse_run(lion.to_yaml(), "again") == lion
    assert read("train.optimizer=lion", "train.betas=[0.9, 0.999]").train.betas == (0.9, 0.999)
    assert "null" in Run.model_json_schema()["$defs"]["Train"]["properties"]["betas"]["type"]


def test_both_lengths_or_none() -> None:
    assert "exactly one of `steps` and `epochs`" in refusal(text=MINIMAL.replace("steps: 100", "steps: 1, epochs: 1"))
    assert "exactly one of `steps` and `epochs`" in refusal("train.steps=null")


def test_evaluation_needs_held_out_rows() -> None:
    text = MINIMAL.replace(", held_out_fraction: 0.1", "")
    assert "needs held-out rows" in refusal("train.evaluate_every=5", text=text)


def test_all_mistakes_are_told_at_once() -> None:
    told = refusal("train.stepps=1", "method.rnk=3", "workers.count=none")
    assert all(part in told for part in ("a.yaml", "train.stepps", "method.rnk", "workers.count"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[1, 2]", "a mapping of keys"),
        ("a: [", "not valid YAML"),
        (MINIMAL + "name: b\n", "key 'name' stands twice"),
        ("name: a\n", "model: this key is needed"),
        ("", "a mapping of keys"),
    ],
)
def test_files_that_are_no_runs(text: str, expected: str) -> None:
    assert expected in refusal(text=text)


@given(st.text(max_size=40), st.text(max_size=40))
def test_no_text_breaks_the_reader(key: str, value: str) -> None:
    for text, *overrides in ((f"{key}: {value}",), (MINIMAL, f"{key}={value}"), (MINIMAL, f"train.{key}={value}")):
        with contextlib.suppress(ConfigError):
            read(*overrides, text=text)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda s: st.lists(s, max_size=3)))
def test_no_value_breaks_the_explanations(value: object) -> None:
    for key in ("method", "data.sources", "data.sources.0.format", "train.schedule", "model.path", "method.rank"):
        with contextlib.suppress(ConfigError):
            read(f"{key}={yaml.safe_dump(value, default_flow_style=True)}")


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("kind", [UserError, ConfigError, DataError, ModelError, ArtefactError, RunError, RunStopped])
def test_errors_survive_pickling(kind: type[FtrayError]) -> None:
    error = kind("what", where="where", hint="hint")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.what, again.where, again.hint) == (kind, "what", "where", "hint")
    assert str(again) == "where: what\n  → hint"


def test_exit_codes() -> None:
    codes = {ConfigError: EXIT_USER, DataError: EXIT_USER, RunError: EXIT_RUN, RunStopped: EXIT_STOPPED}
    assert {kind: kind("x").exit_code for kind in codes} == codes
    assert (EXIT_USER, EXIT_RUN, EXIT_STOPPED) == (2, 3, 75)
