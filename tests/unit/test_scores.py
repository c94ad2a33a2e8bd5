"""Metrics that need no Java, and the statistics over them."""

from __future__ import annotations

import math
from decimal import Decimal

import numpy as np
import pytest
from sacrebleu.metrics import CHRF

from ftray.config import Run
from ftray.config.evaluation import METRIC_NAMES, Decoding, Evaluation
from ftray.errors import UserError
from ftray.evaluate.scores import text
from ftray.evaluate.scores.metric import Measured
from ftray.evaluate.scores.mteval import tokens
from ftray.evaluate.scores.registry import KINDS, expanded, opened
from ftray.evaluate.statistics import compare, interval, resamples

REFERENCES = [["The cat sat.", "A cat was sitting."], ["Yes"], ["no"]]


def score(name: str, references: list[list[str]], answers: list[str]) -> float:
    with opened([name], references) as [metric]:
        return metric.measure(answers).score


def test_the_run_file_names_every_metric():
    assert tuple(KINDS) == METRIC_NAMES
    assert expanded(["words", "e2e", "bleu"]) == ["words", "bleu", "nist", "meteor", "coco_rouge_l", "cider"]
    assert "evaluate" in Run.model_fields


@pytest.mark.parametrize("name", [name for name in METRIC_NAMES if name not in ("meteor", "coco_rouge_l", "cider")])
def test_a_right_answer_is_better_than_a_wrong_one(name):
    """And an empty answer breaks nothing."""
    references = [['{"a": 12}', '{"a": 3}'], ["the answer is 5 of 5, in the end"], ["8 or 9 of these, I think"]]
    answers = [texts[0] for texts in references]
    wrong = ["something else altogether", "", "}{"]
    if name == "json_schema":
        with pytest.raises(UserError, match="no JSON schema"), opened([name], references, {"type": "nothing"}):
            pass
        with opened([name], references, {"type": "object", "required": ["a"]}) as [metric]:
            assert metric.measure(answers).by_row.tolist() == [1, 0, 0]
            assert metric.measure(wrong).score == 0
        return
    right, bad = score(name, references, answers), score(name, references, wrong)
    assert math.isfinite(right)
    assert math.isfinite(bad)
    if not name.startswith("distinct"):
        assert right > bad


def test_chrf_is_sacrebleus():
    answers = ["The cat sits.", "Yes", "maybe not"]
    streams = [[texts[i] if i < len(texts) else None for texts in REFERENCES] for i in range(2)]
    assert score("chrf", REFERENCES, answers) * 100 == pytest.approx(CHRF().corpus_score(answers, streams).score)


def test_right_and_wrong():
    answers = ["A cat  was sitting.", "yes.", "No"]
    assert score("exact_match", REFERENCES, answers) == pytest.approx(1 / 3)
    assert score("accuracy", REFERENCES, answers) == 1
    # one of two "a" found, "b" always, and "a" said once for "b": F1 1/2 and 4/5 … by hand
    references, answers = [["a"], ["a"], ["b"], ["b"]], ["a", "b", "b", "b"]
    assert score("macro_f1", references, answers) == pytest.approx((2 * 1 / 3 + 2 * 2 / 5) / 2)


@pytest.mark.parametrize(
    ("said", "number"),
    [
        ("He has 3 apples, so\n#### 1,234.50", "1234.50"),
        ("It is 7. Then -12 remain.", "-12"),
        ("72 #### done", "72"),
        ("none", None),
        ("", None),
        ("$1,000.", "1000"),
    ],
)
def test_the_number_that_an_answer_comes_to(said, number):
    assert text.number_of(said) == (None if number is None else Decimal(number))


def test_no_number_is_not_the_right_number():
    assert score("numeric_answer", [["no idea"], ["#### 5"]], ["none", "5.0"]) == 0.5


def test_distinct_is_over_all_answers_and_has_no_interval():
    with opened(["distinct_1"], [["a"]] * 4) as [metric]:
        found = metric.measure(["a b", "a b", "a b", "a c"])
    assert found.score == 3 / 8
    assert interval(found, resamples(4)) is None


def test_mteval_tokens():
    assert tokens('Rated 4.5, "The £20-25" Inn&quot;s') == (
        *("rated", "4.5", ",", '"', "the", "£20", "-", "25", '"', "inn", '"', "s"),
    )


def test_bleu_without_any_four_gram_is_small_but_not_nothing():
    value = score("bleu", [["one two three four five six"]], ["six five one two"])
    assert 0 < value < 0.3
    assert score("bleu", [["one two three"]], ["other words here"]) == 0


def test_a_score_outlives_the_process_that_gave_it():
    """METEOR's is a line from Java, which is closed before the results are written."""
    gone = []

    def value(sums: np.ndarray) -> np.ndarray:
        assert not gone, "asked after the end"
        return sums[:, 1]

    measured = Measured(np.ones((3, 2)), value, np.ones(3))
    gone.append(True)
    assert measured.score == 3


# ---------------------------------------------------------------------------------------------------------- statistics


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Accuracy 0.7 on 200 rows: of 200 such test sets, about 95 % have an interval with 0.7 in it."""
    random, covered = np.random.default_rng(0), 0
    weights = resamples(200, 400)
    for _ in range(200):
        around = interval(text.mean_of(random.random(200) < 0.7), weights)
        assert around is not None
        covered += around.low <= 0.7 <= around.high
    assert 0.90 <= covered / 200 <= 0.99


def test_the_paired_test_errs_as_rarely_as_it_says():
    """Two systems alike: p < 0.05 about once in twenty. One better by ten points: nearly always found."""
    random, weights = np.random.default_rng(1), resamples(200, 400)

    def found(better: float) -> float:
        count = 0
        for _ in range(100):
            hardness = random.random(200)  # shared by both, which is why the test is a paired one
            one = text.mean_of(hardness + random.normal(0, 0.15, 200) < 0.6 + better)
            other = text.mean_of(hardness + random.normal(0, 0.15, 200) < 0.6)
            difference = compare(one, other, weights)
            assert difference is not None
            count += difference.p < 0.05
        return count / 100

    assert found(0.0) <= 0.12
    assert found(0.1) >= 0.8


def test_keys_that_do_not_go_together():
    with pytest.raises(ValueError, match="beams search for the most probable"):
        Decoding(beams=4, temperature=0.7)
    with pytest.raises(ValueError, match="belong to a search"):
        Decoding(no_repeat_ngram=4)
    with pytest.raises(ValueError, match="belong together"):
        Evaluation(metrics=["json_schema"])
