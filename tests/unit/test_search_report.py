"""The search's page: what it says is what the search came to, and it stands alone."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from ftray.errors import UserError
from ftray.evaluate.importance import importances
from ftray.evaluate.search_report import comparable, write_search_report
from ftray.tune.driver import open_ledger
from ftray.tune.outcome import outcome
from ftray.tune.space import draw
from tests.unit.test_report import _Page
from tests.unit.test_search_config import a_search


def made(folder: Path, *overrides: str, trials: int = 12) -> Path:
    """A finished search: the rate decides, two of three trials are stopped, the last one fails."""
    search = a_search(f"output={folder}", *overrides)
    ledger = open_ledger(search)
    for index in range(trials):
        parameters = draw(search, index)
        ledger.write("trial", index=index, parameters=parameters, planned={"memory": 1.0 + index % 3, "trained": 9.0})
        ledger.write("begin", index=index, steps=40)
        if index == trials - 1:
            ledger.write("fail", index=index, error="no finite <loss> at s3://me:secret@b/rows", aside=True)
            continue
        for step in (10, 20, 30, 40) if index % 3 == 0 else (10, 20):
            loss = abs(math.log10(parameters["train.learning_rate"]) + 2) + 1 / step
            ledger.write("result", index=index, step=step, loss=loss, trained_tokens=step * 100)
        if index % 3:
            ledger.write("stop", index=index, step=20)
        else:
            ledger.write("finish", index=index, summary={"artefact": f"{search.trial_folder(index)}/artefact"})
    (folder / "outcome.json").write_text(json.dumps(outcome(search, ledger)))
    return folder


def test_the_page_says_what_the_search_came_to(tmp_path) -> None:
    found = json.loads((made(tmp_path) / "outcome.json").read_text())
    page = _Page(Path(write_search_report(str(tmp_path))).read_text(encoding="utf-8"))
    best = found["best"]
    assert "12 trials: 4 finished, 7 stopped early, 1 set aside" in page.text
    first = page.rows[next(i for i, row in enumerate(page.rows) if row[:2] == ["Trial", "State"]) + 1]
    by_loss = min((t for t in found["each"] if t["curve"]), key=lambda t: t["values"]["loss"])
    assert first[0] == f"{by_loss['index']:04d}", "the best first, whether it came to its end or not"
    assert page.row(f"{best['index']:04d}")[1:4] == ["finished", "40", f"{best['values']['loss']:.4f}"]
    assert best["artefact"] in page.text
    assert "no finite <loss> at s3://***@b/rows" in page.text
    assert "secret" not in page.text
    for title in ("Importance of each parameter", "Parallel coordinates", "of every trial against its steps"):
        assert title in page.text, title


@pytest.mark.parametrize(
    ("metric", "step", "said"),
    [
        ("accuracy", 20, ", of step 20 with a held-out loss of 1.2500, and not of step 30, where accuracy was best."),
        ("accuracy", 30, ", of step 30."),
        ("memory", 20, ", of step 20."),
        ("accuracy", None, "."),
    ],
)
def test_an_artefact_that_is_not_of_the_step_that_won_is_told(tmp_path, metric, step, said) -> None:
    found = json.loads((made(tmp_path) / "outcome.json").read_text())
    found["best"] |= {"step": 30, "artefact_step": step, "artefact_loss": 1.25, "values": {metric: 0.75}}
    (tmp_path / "outcome.json").write_text(json.dumps(found | {"metric": [metric], "mode": ["max"]}))
    text = Path(write_search_report(str(tmp_path))).read_text(encoding="utf-8")
    assert f"<code>{found['best']['artefact']}</code>{said}" in text


def test_it_needs_no_network_and_no_script(tmp_path) -> None:
    page = _Page(Path(write_search_report(str(made(tmp_path)))).read_text(encoding="utf-8"))
    outside = [v for _, name, v in page.attributes if name in ("src", "href", "xlink:href") and not v.startswith("#")]
    assert not outside
    assert "script" not in {tag for tag, _, _ in page.attributes}
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_trade_offs_are_shown_and_a_search_without_results_too(tmp_path) -> None:
    made(tmp_path / "two", "sampler=optuna", "metric=[loss, memory]")
    text = Path(write_search_report(str(tmp_path / "two"))).read_text(encoding="utf-8")
    assert "loss against memory" in text
    made(tmp_path / "none", trials=1)
    page = _Page(Path(write_search_report(str(tmp_path / "none"))).read_text(encoding="utf-8"))
    assert "No trial has a value of loss" in page.text
    with pytest.raises(UserError, match="no search"):
        write_search_report(str(tmp_path))


def test_stopped_trials_are_compared_where_all_have_been(tmp_path) -> None:
    found = json.loads((made(tmp_path) / "outcome.json").read_text())
    step, compared = comparable(found)
    assert (step, len(compared)) == (20, 11)


def test_importance_finds_what_decides_and_is_fair_to_what_does_not() -> None:
    drawn = random.Random(0)
    trials = [{"rate": drawn.random(), "name": drawn.choice("ab"), "noise": drawn.random()} for _ in range(200)]
    trials = [t | ({"only": drawn.choice([1, 2])} if t["name"] == "a" else {}) for t in trials]
    values = [abs(t["rate"] - 0.5) + (0.3 if t["name"] == "a" else 0) for t in trials]
    values[3] = 1e9  # one that diverged
    found = importances(trials, values)
    assert next(iter(found)) == "name"
    assert found["only"] < 0.05, "that trials have it at all is the name's doing"
    assert found["name"] > 0.4
    assert found["rate"] > 0.15
    assert found["noise"] < 0.05
    many = [sum(importances([{"x": drawn.choice(range(20))} for _ in range(40)], [drawn.random() for _ in range(40)])
                .values()) for _ in range(100)]  # fmt: skip
    assert sum(many) / 100 < 0.1, "many values explain nothing by themselves"
    assert importances([{"x": 1}] * 5, [1, 2, 3, 4, 5]) == {"x": 0.0}


@pytest.mark.parametrize("trials", [4, 5, 6, 8, 9, 20])
def test_importance_of_a_number_is_found_in_few_trials_too(trials: int) -> None:
    found = importances([{"rate": 0.001 * (i + 1)} for i in range(trials)], [-float(i) for i in range(trials)])
    assert found["rate"] > 0.5


def test_importance_that_nothing_tells_is_left_out() -> None:
    assert importances([{"rate": 0.1}, {"rate": 0.2}, {"rate": 0.3}], [1, 2, 3]) == {}
    assert importances([{"targets": [name]} for name in "abcd"], [1, 2, 3, 4]) == {}
