"""The search file: strict, and every run it can make is checked as a run file is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ftray.cli.main import call
from ftray.cli.recipes import list_search_recipes
from ftray.config.reading import search_recipe_names
from ftray.config.search import load_search, parse_search
from ftray.errors import ConfigError
from ftray.tune.space import draw, grid, how_many

SEARCH = """
name: rates
run:
  name: any
  model: {path: embedded}
  method: {name: lora, rank: 8, alpha: 16}
  data:
    sources: [{path: rows.jsonl, format: text}]
    held_out_fraction: 0.1
  train: {steps: 40, evaluate_every: 10, learning_rate: 1e-3}
space:
  train.learning_rate: {loguniform: [1e-4, 1e-1]}
  method.rank: {choice: [2, 4, 8]}
"""


def a_search(*overrides: str, text: str = SEARCH):
    return parse_search(text, "rates.yaml", overrides)


def test_a_trials_run_is_a_whole_run_file(tmp_path) -> None:
    search = a_search(f"output={tmp_path}/found")
    run = search.run_of({"train.learning_rate": 0.02, "method.rank": 4}, 7)
    assert (run.name, run.folder) == ("rates-0007", f"{tmp_path}/found/trials/0007")
    assert (run.train.learning_rate, run.method.rank, run.method.alpha) == (0.02, 4, 16)
    assert run.data.cache == f"{tmp_path}/found/data"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("sample=3", "sample: unknown key; did you mean 'samples'?"),
        ("sampler=optun", "did you mean 'optuna'?"),
        ("scheduler={name: asha, graze: 3}", "unknown key; did you mean 'grace'?"),
        ("metric=los", "'los' is not known; did you mean 'loss'?"),
        ("metric=[loss, memory]", "several metrics need sampler: optuna"),
        ("space={train.learning_rate: {uniform: [1, 2], choice: [1]}}", "exactly one of choice, grid"),
        ("space={train.learning_rate: {loguniform: [0, 2]}}", "both must be above 0"),
        ("space={train.learning_rate: {uniform: [2, 1]}}", "the first must be below the second"),
        ("space={train.learning_rate: {unifrom: [2, 1]}}", "did you mean 'uniform'?"),
        ("space={method.rank: {integers: [1, 8], step: 0.5}}", "step 0.5 of integers is no whole number"),
        ("space={output: {choice: [a]}}", "says where and how a trial runs"),
        ("space={a: {choice: [1], when: {b: 1}}, b: {choice: [1], when: {a: 1}}}", "goes round in a circle"),
        ("sampler=grid", "sampler grid needs listed values"),
        ("run={name: x, model: {path: embedded}, data: {}}", "set data.held_out or data.held_out_fraction"),
        ("metric=accuracy", "set objective: dpo"),
    ],
)
def test_what_is_refused_and_how(override: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        a_search(override)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("space", "told"),
    [
        ("{method.name: {choice: [full, qlora]}}", "method.name: with scheduler pbt trials go on from each other's"),
        ("{method.rank: {choice: [2, 4]}}", "this key decides which weights there are, of which shapes"),
        ("{method.rank_pattern: {choice: [{q_proj: 2}, {}]}}", "of which shapes"),
        ("{method.targets: {choice: [all-linear, [q_proj]]}}", "of which shapes"),
        ("{method.alpha_pattern: {choice: [{q_proj: 2}, {}]}}", "another update of the same weights"),
        ("{seed: {choice: [1, 2]}}", "which rows come when"),
        ("{data.max_length: {choice: [64, 128]}}", "which rows come when"),
        ("{train.batch_rows: {choice: [4, 8]}}", "which rows come when"),
        ("{train.steps: {choice: [4, 8]}}", "how long a trial is"),
        ("{train.optimizer: {choice: [lion, adamw]}}", "another value of this key; pbt can change train.learning_rate"),
        ("{method: {choice: [lora, qlora]}}", "another value of this key"),
    ],
)
def test_population_based_training_changes_what_a_commit_can_go_on_with(space: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        a_search("scheduler=pbt", f"space={space}")
    assert told in str(caught.value)
    a_search("scheduler=asha", f"space={space}")


def test_population_based_training_is_of_lanes() -> None:
    rates = "space={train.learning_rate: {loguniform: [1e-4, 1e-2]}, method.dropout: {choice: [0, 0.1]}}"
    assert a_search("scheduler=pbt", rates, "space.train.schedule.warmup={choice: [0, 5]}").scheduler.name == "pbt"
    with pytest.raises(ConfigError, match="leave out lanes: off"):
        a_search("scheduler=pbt", rates, "lanes=off")


def test_a_scheduler_needs_evaluations() -> None:
    text = SEARCH.replace("evaluate_every: 10, ", "")
    assert a_search(text=text).scheduler.name == "fifo"
    with pytest.raises(ConfigError, match=r"set train\.evaluate_every"):
        a_search("scheduler=asha", text=text)


def test_a_wrong_key_of_the_space_is_told_with_the_nearest() -> None:
    search = a_search("space={train.learning_rat: {choice: [1]}}")
    with pytest.raises(ConfigError, match=r"trial 0000 \(train.learning_rat=1\)") as caught:
        search.run_of(draw(search, 0), 0)
    assert "did you mean 'learning_rate'?" in str(caught.value)


def test_a_run_file_is_no_search_file() -> None:
    with pytest.raises(ConfigError, match="this is a run, not a search"):
        parse_search(yaml.safe_dump(yaml.safe_load(SEARCH)["run"]), "run.yaml")


def test_overrides_reach_the_run_dotted_and_nested() -> None:
    search = a_search("overrides.train.steps=80", "overrides.method.alpha=4", "overrides.data.max_length=64")
    run = search.run_of({}, 0)
    assert (run.train.steps, run.method.alpha, run.data.max_length) == (80, 4, 64)


def test_another_method_drops_the_keys_that_it_has_not() -> None:
    search = a_search(
        "space={method.name: {choice: [lora, dora, prefix]}, "
        "method.rank: {choice: [2], when: {method.name: [lora, dora]}}, "
        "method.tokens: {choice: [5], when: {method.name: prefix}}}"
    )
    for index in range(12):
        parameters = draw(search, index)
        run = search.run_of(parameters, index)
        if parameters["method.name"] == "prefix":
            assert parameters.keys() == {"method.name", "method.tokens"}
            assert run.method.tokens == 5
        else:
            assert parameters.keys() == {"method.name", "method.rank"}
            assert (run.method.rank, run.method.alpha) == (2, 16)


def test_another_optimizer_or_schedule_drops_what_it_does_not_look_at() -> None:
    search = a_search(
        "overrides.train={optimizer: sgd, momentum: 0.8, clip_norm: 0.5}",
        "overrides.train.schedule={name: wsd, decay: 0.5, final: 0.1}",
        "space={train.momentum: {choice: [0.7], when: {train.optimizer: sgd}}, "
        "train.optimizer: {choice: [sgd, adamw, mezo]}, train.schedule.name: {choice: [wsd, linear, constant]}}",
    )
    seen = set()
    for index in range(24):
        train = search.run_of(draw(search, index), index).train
        seen.add((train.optimizer, train.schedule.name))
        assert train.momentum == (0.7 if train.optimizer == "sgd" else 0.9)
        assert train.clip_norm == (1.0 if train.optimizer == "mezo" else 0.5)
        schedules = {"wsd": (0.5, 0.1), "linear": (0.2, 0.1), "constant": (0.2, 0.0)}
        assert (train.schedule.decay, train.schedule.final) == schedules[train.schedule.name]
    assert len(seen) > 6


@pytest.mark.parametrize(
    ("when", "told"),
    [
        ("{method.nam: lora}", "which no run has: .*nam: unknown key; did you mean 'name'"),
        ("{method.name: [dora, qlra]}", "method.name=.*qlra.*no run has"),
        ("{train.learning_rate: quick}", "train.learning_rate=.*no run has"),
        ("{train.batch_rows: 3}", "asks for train.batch_rows=3, and it may be 4, 8"),
    ],
)
def test_a_when_that_can_never_hold_is_refused(when: str, told: str) -> None:
    space = f"space={{train.batch_rows: {{choice: [4, 8]}}, method.rank: {{choice: [2], when: {when}}}}}"
    with pytest.raises(ConfigError, match=told):
        a_search(space)


def test_a_when_looks_at_defaults_too() -> None:
    space = "space={train.momentum: {choice: [0.7], when: {train.optimizer: sgd}}, method.rank: {choice: [2], when: "
    assert list(draw(a_search(space + "{train.optimizer: adamw}}}"), 0)) == ["method.rank"]


def test_a_when_looks_at_the_run_where_the_space_has_no_such_key() -> None:
    search = a_search("space={method.rank: {choice: [2], when: {method.name: [dora]}}, seed: {choice: [1]}}")
    assert draw(search, 0) == {"seed": 1}


def test_draws_are_pure_and_each_key_by_itself() -> None:
    search, more = a_search("samples=8"), a_search("samples=8", "space.train.batch_rows={choice: [4, 8]}")
    drawn = [draw(search, i) for i in range(8)]
    assert drawn == [draw(a_search("samples=20"), i) for i in range(8)]
    assert drawn != [draw(a_search("seed=1"), i) for i in range(8)]
    for before, now in zip(drawn, (draw(more, i) for i in range(8)), strict=True):
        assert {key: now[key] for key in before} == before
    rates = [p["train.learning_rate"] for p in drawn]
    assert all(1e-4 <= rate <= 1e-1 for rate in rates)
    assert len(set(rates)) == 8


def test_log_uniform_is_even_in_the_logarithm() -> None:
    search = a_search()
    rates = [draw(search, i)["train.learning_rate"] for i in range(3000)]
    shares = [sum(low <= rate < 10 * low for rate in rates) / len(rates) for low in (1e-4, 1e-3, 1e-2)]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.03)


def test_a_grid_and_its_conditions() -> None:
    search = a_search(
        "sampler=grid",
        "space={method.name: {choice: [lora, ia3]}, train.batch_rows: {integers: [4, 8], step: 4}, "
        "method.rank: {choice: [2, 4], when: {method.name: lora}}}",
    )
    found = grid(search)
    assert how_many(search) == len(found) == 2 * 2 + 2
    assert found[0] == {"method.name": "lora", "train.batch_rows": 4, "method.rank": 2}
    assert found[1]["method.rank"] == 4
    assert {tuple(p) for p in found if p["method.name"] == "ia3"} == {("method.name", "train.batch_rows")}


def test_grid_keys_go_with_every_random_sample() -> None:
    search = a_search(
        "samples=3", "space={train.learning_rate: {uniform: [0, 1]}, method.rank: {grid: [2, 4]}, seed: {grid: [0, 1]}}"
    )
    assert how_many(search) == 12
    trials = [draw(search, i) for i in range(12)]
    assert [(t["method.rank"], t["seed"]) for t in trials[:4]] == [(2, 0), (2, 1), (4, 0), (4, 1)]
    assert len({t["train.learning_rate"] for t in trials[:4]}) == 1
    assert len({t["train.learning_rate"] for t in trials}) == 3


def test_a_search_is_whole_when_it_is_written_and_read_again(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(yaml.safe_load(SEARCH)["run"]))
    search = a_search(f"run={tmp_path}/run.yaml", "overrides.train.steps=20", "sampler={name: optuna}")
    (tmp_path / "search.yaml").write_text(search.to_yaml())
    (tmp_path / "run.yaml").unlink()
    again = load_search(tmp_path)
    assert again.dump() == search.dump()
    assert again.run_of({}, 0) == search.run_of({}, 0)


@pytest.mark.parametrize("name", search_recipe_names())
def test_shipped_searches(name: str, ftray_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTRAY_DATA", str(ftray_data))
    search = load_search(name)
    assert search.name == name
    for index in range(8):
        search.run_of(draw(search, index), index)
    about = dict(list_search_recipes())[name]
    assert 20 <= len(about) <= 120


def test_the_schema_of_the_search_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["tune", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["required"]) == {"name", "run", "space"}
    assert schema["properties"]["seed"]["description"].startswith("What is drawn at random")
    assert schema["$defs"]["Asha"]["properties"]["grace"]["description"].startswith("Steps of the first rung")
    for key in ("sampler", "scheduler", "metric", "mode"):
        kinds = [kind.get("type") for kind in schema["properties"][key]["anyOf"]]
        assert "string" in kinds, f"{key} may be a name alone"
    assert call(["tune"]) == 2
    assert "Missing argument 'SEARCH'" in capsys.readouterr().err


def test_mistakes_on_the_command_line_are_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["tune", "no-such-search"]) == 2
    assert "e2e-asha" in capsys.readouterr().err
    (tmp_path / "s.yaml").write_text(SEARCH)
    assert call(["tune", str(tmp_path / "s.yaml"), "samplez=3"]) == 2
    assert "did you mean 'samples'?" in capsys.readouterr().err


def test_they_load_neither_torch_nor_ray() -> None:
    code = (
        "from ftray.cli.main import call; assert call(['tune', 'e2e-asha', 'samplez=3']) == 2\n"
        "import sys; assert not {'torch', 'ray', 'optuna', 'pyarrow'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
