"""Metrics on plain text that need no Java: overlap (chrF, ROUGE), right or wrong, form, variety, length."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from importlib.util import find_spec
from typing import Any

import numpy as np

from ftray.errors import UserError
from ftray.evaluate.scores.metric import Measured, Metric, References, mean_of


def needs(module: str, metric: str) -> None:
    """Raises UserError where a package of the extra `evaluate` is missing."""
    if find_spec(module) is None:
        raise UserError(f"the metric {metric} needs the package {module}", hint="pip install 'ftray[evaluate]'")


# ------------------------------------------------------------------------------------------------------------- overlap


class Chrf(Metric):
    """chrF2 of Popović 2015 with sacrebleu's settings, from 0 to 1; with several references the best one's."""

    name = "chrf"

    def __init__(self, references: References) -> None:
        super().__init__(references)
        needs("sacrebleu", self.name)
        from sacrebleu.metrics import CHRF

        self._chrf = CHRF()
        most = max(map(len, self.references), default=0)
        self._streams: list[Any] = [
            [texts[i] if i < len(texts) else None for texts in self.references] for i in range(most)
        ]

    def measure(self, answers: Sequence[str]) -> Measured:
        # what sacrebleu's own bootstrap adds up; no public name leads to it
        counts = self._chrf._extract_corpus_statistics(list(answers), self._streams)
        stats = np.concatenate([np.ones((len(counts), 1)), np.array(counts, np.float64)], 1)
        return Measured(stats, self._value, self._value(stats))

    def _value(self, sums: np.ndarray) -> np.ndarray:
        return np.array([self._chrf._compute_score_from_stats(row[1:].tolist()).score / 100 for row in sums])


class Rouge(Metric):
    """F1 of Lin 2004 with `rouge-score`'s words and stems; with several references the best one's."""

    kind: str

    def __init__(self, references: References) -> None:
        super().__init__(references)
        needs("rouge_score", self.name)
        from rouge_score.rouge_scorer import RougeScorer

        self._scorer = RougeScorer([self.kind], use_stemmer=True)

    def measure(self, answers: Sequence[str]) -> Measured:
        rows = zip(self.references, answers, strict=True)
        return mean_of([self._scorer.score_multi(texts, answer)[self.kind].fmeasure for texts, answer in rows])


class Rouge1(Rouge):
    name, kind = "rouge_1", "rouge1"


class Rouge2(Rouge):
    name, kind = "rouge_2", "rouge2"


class RougeL(Rouge):
    name, kind = "rouge_l", "rougeL"


# ------------------------------------------------------------------------------------------------------ right or wrong


class ExactMatch(Metric):
    """The answer is one of the references, runs of white space apart."""

    name = "exact_match"

    def measure(self, answers: Sequence[str]) -> Measured:
        return mean_of(_any_equal(self.references, answers, lambda text: " ".join(text.split())))


def label_of(text: str) -> str:
    """An answer as a label: its first line that says anything, without outer white space and a final period, case
    folded."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    return lines[0].rstrip(".").rstrip().casefold() if lines else ""


class Accuracy(Metric):
    """The answer is the right label."""

    name = "accuracy"

    def measure(self, answers: Sequence[str]) -> Measured:
        return mean_of(_any_equal(self.references, answers, label_of))


class MacroF1(Metric):
    """Mean over the references' labels of F1; a label counts as much as any other, however rare it is. Of each row's
    references the first counts."""

    name = "macro_f1"

    def __init__(self, references: References) -> None:
        super().__init__(references)
        self._right = [label_of(texts[0]) for texts in self.references]
        self.labels = sorted(set(self._right))
        self._number = {label: i for i, label in enumerate(self.labels)}

    def measure(self, answers: Sequence[str]) -> Measured:
        """Columns: right, given and true answers of each label."""
        count = len(self.labels)
        stats = np.zeros((len(self._right), 1 + 3 * count))
        stats[:, 0] = 1
        for row, right, answer in zip(stats, self._right, answers, strict=True):
            given = self._number.get(label_of(answer))
            row[1 + 2 * count + self._number[right]] = 1
            if given is not None:
                row[1 + count + given] = 1
                row[1 + given] = float(self.labels[given] == right)
        return Measured(stats, self._value, stats[:, 1 : 1 + count].sum(1))

    def _value(self, sums: np.ndarray) -> np.ndarray:
        right, given, true = np.split(sums[:, 1:], 3, axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            f1 = np.where(given + true > 0, 2 * right / (given + true), np.nan)
        return np.nanmean(f1, axis=1)  # a sample may lack a label


_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)")


def number_of(text: str) -> Decimal | None:
    """The answer to a sum: the number behind `####` if there is one (GSM8K), else the last one in the text."""
    marked = text.rpartition("####")[2] if "####" in text else ""
    found = _NUMBER.findall(marked)[:1] or _NUMBER.findall(text)[-1:]
    try:
        return Decimal(found[0].replace(",", "").rstrip(".")) if found else None
    except InvalidOperation:
        return None


class NumericAnswer(Metric):
    """The last number (behind `####`, as in GSM8K, if that is there) is the reference's."""

    name = "numeric_answer"

    def measure(self, answers: Sequence[str]) -> Measured:
        right = _any_equal(self.references, answers, number_of)
        said = [number_of(answer) is not None for answer in answers]
        return mean_of([float(r and s) for r, s in zip(right, said, strict=True)])


def _any_equal(references: References, answers: Sequence[str], form: Callable[[str], Any]) -> list[float]:
    rows = zip(references, answers, strict=True)
    return [float(form(answer) in [form(text) for text in texts]) for texts, answer in rows]


# ---------------------------------------------------------------------------------------------------------------- form


class ValidJson(Metric):
    """The answer is one JSON value and nothing else."""

    name = "valid_json"

    def measure(self, answers: Sequence[str]) -> Measured:
        return mean_of([float(_json(answer) is not _NO_JSON) for answer in answers])


class JsonSchema(Metric):
    """The answer is a JSON value of the schema."""

    name = "json_schema"

    def __init__(self, references: References, schema: dict[str, Any]) -> None:
        super().__init__(references)
        needs("jsonschema", self.name)
        import jsonschema

        kind = jsonschema.validators.validator_for(schema)
        try:
            kind.check_schema(schema)
        except jsonschema.SchemaError as error:
            raise UserError(f"this is no JSON schema: {error.message}", where="evaluate.json_schema") from None
        self._validator = kind(schema)

    def measure(self, answers: Sequence[str]) -> Measured:
        values = [_json(answer) for answer in answers]
        return mean_of([float(v is not _NO_JSON and self._validator.is_valid(v)) for v in values])


_NO_JSON = object()


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _NO_JSON


# -------------------------------------------------------------------------------------------------- variety and length


class Distinct(Metric):
    """Different n-grams of all answers together, over all n-grams (Li et al. 2016)."""

    order: int

    def measure(self, answers: Sequence[str]) -> Measured:
        found = [_word_grams(answer, self.order) for answer in answers]
        all_of_them: Counter[tuple[str, ...]] = Counter()
        for grams in found:
            all_of_them.update(grams)
        total = max(all_of_them.total(), 1)
        rows = np.array([len(grams) / max(grams.total(), 1) for grams in found])
        whole = np.full(len(found), len(all_of_them) / total)
        return Measured(mean_of(whole).stats, mean_of(whole).value, rows, sampled=False)


class Distinct1(Distinct):
    name, order = "distinct_1", 1


class Distinct2(Distinct):
    name, order = "distinct_2", 2


class Words(Metric):
    """Mean length of an answer; neither long nor short is better by itself."""

    name = "words"
    unit = "words"

    def measure(self, answers: Sequence[str]) -> Measured:
        return mean_of([len(answer.split()) for answer in answers])


def _word_grams(text: str, n: int) -> Counter[tuple[str, ...]]:
    words = text.casefold().split()
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))
