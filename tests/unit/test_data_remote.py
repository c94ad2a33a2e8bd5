"""Prepared data on a store that is no disk: written there, copied once, refused when damaged."""

from __future__ import annotations

import json

import fsspec
import pytest

from ftray.config import Run
from ftray.data import sources
from ftray.data.collect import Preparation
from ftray.data.fragments import Fragment
from ftray.data.prepare import make_plan
from ftray.data.prepared import PreparedData
from ftray.data.sources import fragments_of, raw_rows
from ftray.data.work import Job, run_fragment
from ftray.errors import DataError, RunError
from ftray.manifest import verify


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("FTRAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "FRAGMENT_BYTES", 600)
    fs = fsspec.filesystem("memory")
    lines = [json.dumps({"text": f"row {i}"}) for i in range(100)]
    lines[40] = "bad"
    fs.pipe("/in/rows.jsonl", "\n".join(lines).encode())
    yield Run.model_validate(
        {
            "name": "remote",
            "output": "memory://out/run",
            "model": {"path": "embedded"},
            "method": {"name": "lora"},
            "train": {"steps": 1},
            "data": {"sources": [{"path": "memory://in/*.jsonl", "format": "text"}], "held_out_fraction": 0.2},
        }
    )
    fs.rm("/", recursive=True)


def prepare_here(run: Run, least: int = 3, too_long: str = "refuse") -> tuple[str, dict]:
    """`prepare` without Ray: a memory store belongs to one process."""
    plan = make_plan(run)
    fragments = fragments_of(run.data.sources[0], plan.files["train"][0], 0, "train")
    assert len(fragments) >= least
    formats = {"train": [run.data.sources[0].format], "held_out": []}
    threshold = round(0.2 * 2**64)
    job = Job(plan.folder, plan.vocabulary, formats, 64, too_long, "batch", 0, threshold)
    preparation = Preparation(run, job, fragments)
    for number in reversed(range(len(fragments))):
        result = json.loads(json.dumps(run_fragment(number, fragments[number], job)))
        assert run_fragment(number, fragments[number], job) == result  # done before: its note is read
        preparation.add(result)
    return plan.folder, preparation.conclude(plan.digest, None, 1.0)


def test_prepared_data_on_an_object_store(run, tmp_path):
    folder, facts = prepare_here(run)
    assert folder.startswith("memory://out/run/data/")
    verify(folder)
    data = PreparedData.open(folder)
    assert str(tmp_path / "cache") in data.folder
    assert len(data.train) + len(data.held_out) == 99
    assert facts["rows"]["rejected"] == 1
    [entry] = fsspec.filesystem("memory").cat("/out/run/rejected.jsonl").decode().splitlines()
    assert json.loads(entry) | {"row": 41, "file": "memory:///in/rows.jsonl"} == json.loads(entry)
    assert PreparedData.open(folder).folder == data.folder
    assert not [p for p in fsspec.filesystem("memory").find("/out") if "work" in p.split("/") or "rejected-" in p]


def test_a_changed_store_is_copied_again(run):
    folder, _ = prepare_here(run)
    before = PreparedData.open(folder).folder
    path = next(p for p in fsspec.filesystem("memory").find("/out") if p.endswith("train-000000.arrow"))
    fsspec.filesystem("memory").pipe(path, b"cut off")
    with pytest.raises(DataError, match=r"train-000000\.arrow has 7 bytes"):
        PreparedData.open(folder)
    assert PreparedData.open(before)


def test_a_store_that_cannot_be_written_is_an_error_of_the_run(run, tmp_path):
    plan = make_plan(run)
    (tmp_path / "file").write_text("")
    job = Job(
        str(tmp_path / "file" / "x"),
        plan.vocabulary,
        {"train": [run.data.sources[0].format]},
        64,
        "refuse",
        "off",
        0,
        0,
    )
    [fragment, *_] = fragments_of(run.data.sources[0], plan.files["train"][0], 0, "train")
    assert isinstance(run_fragment(0, fragment, job)["error"], RunError)


def test_a_file_that_went_away_is_an_error_that_names_it(run, tmp_path):
    plan = make_plan(run)
    job = Job(str(tmp_path), plan.vocabulary, {"train": [run.data.sources[0].format]}, 64, "refuse", "off", 0, 0)
    error = run_fragment(0, Fragment(0, "train", "gone.jsonl", str(tmp_path / "gone.jsonl"), "jsonl"), job)["error"]
    assert isinstance(error, DataError)
    assert error.where == "gone.jsonl"


def test_raw_rows_for_those_who_do_not_train(run):
    assert list(raw_rows(run.data.sources[0]))[39:42] == [{"text": "row 39"}, {"text": "row 41"}, {"text": "row 42"}]
