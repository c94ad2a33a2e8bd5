"""The columns of a matrix: each task once, with all whose own it is, and every text by a name of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftray.config import Model, Run, parse_run
from ftray.evaluate.matrix import columns_of, cross, general_sources
from ftray.evaluate.systems import BaseKey, System


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"{n} and one?", "completion": str(n + 1)}) + "\n" for n in range(40))
    )
    return path


def a_run(name: str, rows: Path, *overrides: str) -> Run:
    source = {"path": str(rows), "format": "prompt_completion"}
    run: dict[str, Any] = {
        "name": name,
        "model": {"path": "embedded"},
        "method": {"name": "lora"},
        "data": {"sources": [source], "held_out_fraction": 0.25},
        "train": {"steps": 1},
    }
    return parse_run(json.dumps(run), name, overrides)


def a_system(run: Run) -> System:
    key = BaseKey(Model(path="embedded"), False, "bf16")
    return System(run.name, "adapter", run.name, key, Path("none"), run.name, run)


class Even:
    """Computes: every token of every row has the same loss."""

    def __init__(self, *_: Any) -> None:
        pass

    def close(self) -> None:
        pass

    def virtual_tokens(self) -> dict[str | None, int]:
        return dict.fromkeys((None, "one", "two", "three", "base"), 0)

    def positions(self) -> int:
        return 512

    def losses(self, rows: Any, done: Any) -> np.ndarray:
        return np.array([row.targets.sum() for row in rows], float)


def test_two_runs_on_the_same_rows_share_a_column_and_both_own_it(rows):
    systems = [a_system(a_run(name, rows)) for name in ("one", "two", "base")]
    systems.append(a_system(a_run("three", rows, "seed=7")))
    columns = columns_of(systems)
    assert [(column.name, column.of) for column in columns] == [("one", ("one", "two", "base")), ("three", ("three",))]
    found = cross(systems, columns, lambda event: None, workers=Even)
    names = [(system.name, own) for system, own in zip(found.systems, found.own, strict=True)]
    assert names == [("base", None), ("one", 0), ("two", 0), ("base (2)", 0), ("three", 1)]
    assert found.losses == pytest.approx(np.ones((5, 2)))


def test_another_share_held_out_or_another_way_to_ask_is_another_task(rows):
    runs = [
        a_run("one", rows),
        a_run("two", rows, "data.held_out_fraction=0.5"),
        a_run("three", rows, "evaluate.metrics=[exact_match]"),
    ]
    columns = columns_of([a_system(run) for run in runs])
    assert [(column.name, column.metric) for column in columns] == [
        ("one", None),
        ("two", None),
        ("three", "exact_match"),
    ]
    assert len(columns[1].rows) > len(columns[0].rows) == len(columns[2].rows)


def test_general_texts_of_one_name_are_two_columns(rows, tmp_path):
    paths = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "text.txt").write_text(f"A text of {folder}.\n")
        paths.append(str(tmp_path / folder / "text.txt"))
    (tmp_path / "one.txt").write_text("A text that is named like a run.\n")
    paths.append(str(tmp_path / "one.txt"))
    columns = columns_of([a_system(a_run("one.txt", rows))], general_sources(paths))
    assert [column.name for column in columns] == ["one.txt", *paths]
    assert [column.rows[0].answer for column in columns[1:3]] == ["A text of a.", "A text of b."]
    assert columns[1].of == ()
