"""Each diagnosis fires on a run that was made to have it, and stays silent on a healthy one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ftray.evaluate.diagnosis import Curves, diagnose, in_words
from ftray.evaluate.overlap import overlap
from ftray.evaluate.questions import Asked
from ftray.evaluate.record import read_record
from ftray.train.loop import train_worker
from ftray.train.world import World
from tests.toys import MemoryData, Recorder, cheese_rows, toy_run

HEALTHY = {"steps": 40, "rows": 256, "rate": "5e-3", "schedule": "cosine", "every": 10}
MADE = {
    "healthy": HEALTHY,
    "overfit on 20 rows": HEALTHY | {"rows": 20, "schedule": "constant", "steps": 60, "rate": "1e-2"},
    "rate 100 times too high": HEALTHY | {"rate": "5e-1", "steps": 10},
    "1 step": HEALTHY | {"steps": 1, "rate": "1e-4", "every": 1},
    "cut short": HEALTHY | {"steps": 12, "schedule": "constant", "rate": "1e-3", "every": 3},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{name: curves} of real runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    root, found = tmp_path_factory.mktemp("made"), {}
    for name, settings in MADE.items():
        folder: Path = root / name.replace(" ", "-")
        run = toy_run(
            folder,
            f"train.steps={settings['steps']}",
            f"train.learning_rate={settings['rate']}",
            f"train.schedule={{name: {settings['schedule']}, warmup: {min(2, settings['steps'] - 1)}}}",
            f"train.evaluate_every={settings['every']}",
            "train.max_skipped=1000",
            "data.held_out_fraction=0.1",
        )
        data = MemoryData(cheese_rows(int(settings["rows"])), cheese_rows(12, "held_out"))
        train_worker(run, data, World(), Recorder())  # type: ignore[arg-type]
        (folder / "run.yaml").write_text(run.to_yaml())
        found[name] = Curves.of(read_record(str(folder)))
    torch.set_num_threads(threads)
    return found


def test_a_healthy_run_is_left_alone(made):
    assert in_words(diagnose(made["healthy"])) == []


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("overfit on 20 rows", {"overfitting", "memorised rows"}),
        ("rate 100 times too high", {"divergence", "rate too high"}),
        ("1 step", {"underfitting"}),
        ("cut short", {"underfitting"}),
    ],
)
def test_a_fault_is_found_and_no_other(made, name, kinds):
    found = diagnose(made[name])
    assert found, f"nothing found in {made[name]}"
    assert {finding.kind for finding in found} <= kinds
    if name.startswith("overfit"):
        assert {finding.kind for finding in found} == kinds


def test_overfitting_names_the_commit_to_keep(made):
    curves = made["overfit on 20 rows"]
    finding = next(finding for finding in diagnose(curves) if finding.kind == "overfitting")
    best = int(curves.held_out_steps[np.argmin(curves.held_out)])
    assert finding.keep == finding.step == best
    assert f"keep the commit of step {best:,}" in finding.advice


# ------------------------------------------------------------------------------------------------------ curves by hand


def curves(losses, held_out=None, *, epochs=0.5, skipped=0, planned=None) -> Curves:
    held = held_out or {}
    return Curves(
        np.arange(1, len(losses) + 1),
        np.array(losses, float),
        np.array(list(held), int),
        np.array(list(held.values()), float),
        planned or len(losses),
        epochs,
        skipped,
        1e-3,
    )


FALLING = [4 * 0.97**i + 1 for i in range(100)]


def kinds(found: Curves) -> list[str]:
    return [finding.kind for finding in diagnose(found)]


def test_rules_on_curves_made_by_hand():
    fine = {0: 5.0, 50: 2.0, 75: 1.6, 100: 1.5}
    assert kinds(curves(FALLING, fine)) == []
    assert kinds(curves([])) == []
    assert kinds(curves(FALLING, {0: 5.0, 50: 2.0, 75: 2.01, 100: 2.03})) == []  # noise is no rise
    assert kinds(curves(FALLING, {0: 5.0, 50: 2.0, 75: 2.2, 100: 2.6})) == ["overfitting"]
    assert kinds(curves(FALLING[:50] + [1.9 + i / 10 for i in range(50)], fine)) == ["divergence"]
    assert kinds(curves(FALLING, fine, skipped=20)) == ["divergence"]
    assert kinds(curves([5.0, 5.5, *(8 * 0.95**i for i in range(98))], fine)) == ["rate too high"]
    assert kinds(curves([5 - i / 1000 for i in range(100)], {0: 5.0, 50: 4.97, 100: 4.93})) == ["underfitting"]
    assert kinds(curves(FALLING, {0: 5.0, 50: 4.0, 75: 3.5, 100: 2.0})) == ["underfitting"]
    assert kinds(curves([4 * 0.9**i for i in range(100)], {0: 5.0, 50: 2.0, 75: 1.99, 100: 2.0}, epochs=9)) == [
        "memorised rows"
    ]
    assert kinds(curves([4 * 0.9**i for i in range(100)], epochs=9)) == ["memorised rows"]


def test_a_run_that_goes_on_is_not_called_too_short():
    assert kinds(curves(FALLING, {0: 5.0, 50: 4.0, 75: 3.5, 100: 2.0}, planned=500)) == []


def test_a_loss_that_is_not_finite_breaks_nothing():
    losses = [float("nan") if i % 3 == 0 else loss for i, loss in enumerate(FALLING)]
    assert kinds(curves(losses, skipped=34)) == ["divergence"]
    assert kinds(curves([float("nan")] * 5)) == []


# ------------------------------------------------------------------------------------------------------------- overlap


def asked(text: str, answer: str = "yes", where: str = "") -> Asked:
    return Asked(text, answer, None, where=where)


def test_duplicates_exact_near_and_none():
    words = [f"word{i}" for i in range(60)]
    train = [asked(" ".join(words), where="train.csv:1"), asked("How old is a Comté?", "Two years.", "train.csv:2")]
    changed = [*words[:30], "other", *words[31:]]
    held_out = [
        asked("how old is a comté", "two years", "test.csv:1"),
        asked(" ".join(changed), where="test.csv:2"),
        asked(" ".join(reversed(words)), where="test.csv:3"),
        asked("How old is a Comté?", "Nobody knows that so exactly.", "test.csv:4"),
    ]
    found = overlap(train, held_out)
    assert [(d.held_out.where, d.train.where) for d in found.exact] == [("test.csv:1", "train.csv:2")]
    assert [(d.held_out.where, d.train.where) for d in found.near] == [("test.csv:2", "train.csv:1")]
    assert 0.8 <= found.near[0].likeness < 1
    assert found.in_words()[0].startswith("1 of 4 held-out rows (25.0 %) are training rows too")
    assert overlap(train, held_out[2:3]).in_words() == []
