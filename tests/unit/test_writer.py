"""Commits beside the loop: what is left of one that fails, how its error is told."""

from __future__ import annotations

import errno
import pickle

import pytest
import torch

from ftray.errors import RunError
from ftray.storage import reached
from ftray.train import writer
from ftray.train.commits import Commit, Progress, State, steps_of
from ftray.train.writer import Writer


def a_commit(step: int = 3) -> Commit:
    return Commit(Progress(step=step), State({"a": torch.ones(1000)}, {}), {})


def fails() -> None:
    raise RunError("metrics.jsonl was not kept", hint="make room")


def passes() -> None:
    pass


@pytest.mark.parametrize("staged", [True, False], ids=["on the disk at once", "copied first"])
@pytest.mark.parametrize("when", ["before", "commit"])
def test_nothing_is_left_of_a_commit_that_fails(tmp_path, monkeypatch, staged, when):
    if staged:
        monkeypatch.setattr(writer, "in_memory", lambda _: None)
    if when == "commit":
        monkeypatch.setattr(writer.commits, "complete", lambda _: fails())
    writes = Writer(str(tmp_path), print)
    writes.begin(a_commit(), before=fails if when == "before" else passes, after=passes)
    with pytest.raises(RunError, match="not kept"):
        writes.done(wait=True)
    assert list((tmp_path / "commits").glob(".*")) == [], "gibibytes, in a real run"
    assert steps_of(str(tmp_path)) == []


def test_a_commit_that_goes_well_counts(tmp_path):
    with Writer(str(tmp_path), print) as writes:
        writes.begin(a_commit(), before=passes, after=passes)
        assert writes.done(wait=True) == (3, f"{tmp_path}/commits/step-00000003")
    assert [path.name for path in (tmp_path / "commits").iterdir()] == ["step-00000003"]


def test_of_the_loops_error_and_the_commits_both_are_told(tmp_path):
    def loop() -> None:
        with Writer(str(tmp_path), print) as writes:
            writes.begin(a_commit(), before=fails, after=passes)
            raise RunError("5 steps in a row had no finite loss", where="step 9", hint="lower train.learning_rate")

    with pytest.raises(RunError) as raised:
        loop()
    told = str(raised.value)
    assert told.splitlines() == [
        "step 9: 5 steps in a row had no finite loss",
        "  → lower train.learning_rate",
        "  the commit of step 3 was not written either: metrics.jsonl was not kept",
        "  → make room",
    ]
    assert str(pickle.loads(pickle.dumps(raised.value))) == told, "it crosses processes on its way to the user"
    again = pickle.loads(pickle.dumps(RunError("alone")))
    assert (str(again), hasattr(again, "__notes__")) == ("alone", False)


def test_a_note_outlives_the_translation_of_a_disks_error(tmp_path):
    error = OSError(errno.ENOSPC, "No space left on device")
    error.add_note("the commit of step 3 was not written either")
    with pytest.raises(RunError, match="no space is left") as raised, reached(tmp_path):
        raise error
    assert "step 3 was not written either" in str(raised.value)
