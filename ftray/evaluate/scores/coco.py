"""METEOR, ROUGE-L and CIDEr as the E2E challenge and COCO's caption evaluation compute them, with `pycocoevalcap`.

ROUGE-L and CIDEr are its Python code's, to the same numbers in a small part of the time. Its Java programs (the PTB
tokenizer, METEOR 1.5 of Denkowski and Lavie 2014) are called here directly: so one tokenizer process serves all
references, METEOR's answers are sums that bootstrap samples can add up, and nothing is written into the package's
folder.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ftray.errors import UserError
from ftray.evaluate.scores.java import Lines, run_java
from ftray.evaluate.scores.metric import Measured, Metric, References, mean_of

_tokenized: dict[str, str] = {}
"""Text → its PTB tokens without punctuation, for all metrics of a process; see `ptb`."""
_REMEMBERED = 200_000


@cache
def package() -> Path:
    """Folder of pycocoevalcap. Raises UserError where it is not installed."""
    spec = find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "METEOR, CIDEr and COCO's ROUGE-L need the package pycocoevalcap", hint="pip install 'ftray[evaluate]'"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def ptb(texts: Iterable[str]) -> list[str]:
    """The texts in the PTB tokenizer's tokens, lower-cased, without punctuation, spaces between. Raises UserError."""
    texts = list(texts)
    if new := [text for text in dict.fromkeys(texts) if text not in _tokenized]:
        if len(_tokenized) + len(new) > _REMEMBERED:
            _tokenized.clear()
            new = list(dict.fromkeys(texts))
        from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS, STANFORD_CORENLP_3_4_1_JAR

        jar = package() / "tokenizer" / STANFORD_CORENLP_3_4_1_JAR
        program = ["-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
        lines = " \n".join(_one_line(text) for text in new)
        found = run_java([*program, "-encoding", "UTF-8"], f"{lines}\n").split("\n")[: len(new)]
        punctuation = set(PUNCTUATIONS)
        for text, line in zip(new, found, strict=True):
            _tokenized[text] = " ".join(word for word in line.rstrip().split(" ") if word not in punctuation)
    return [_tokenized[text] for text in texts]


def _one_line(text: str) -> str:
    return " ".join(text.split())


class _Coco(Metric):
    """References and answers in PTB tokens."""

    def __init__(self, references: References) -> None:
        super().__init__(references)
        package()
        flat = iter(ptb(text for texts in self.references for text in texts))
        self.tokenized = [[next(flat) for _ in texts] for texts in self.references]


class CocoRougeL(_Coco):
    """The longest common subsequence with any reference, F with β 1.2 of the best precision and the best recall."""

    name = "coco_rouge_l"

    def measure(self, answers: Sequence[str]) -> Measured:
        rows = zip(ptb(answers), self.tokenized, strict=True)
        return mean_of([_rouge_l(answer.split(" "), [text.split(" ") for text in texts]) for answer, texts in rows])


def _rouge_l(answer: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """As `pycocoevalcap.rouge` has it, whose table of all prefixes takes most of an evaluation."""
    common = [longest_common(answer, words) for words in references]
    precision = max(common) / len(answer)
    recall = max(count / len(words) for count, words in zip(common, references, strict=True))
    if not precision:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


_BETA = 1.2


def longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Words of the longest common subsequence (Hyyrö 2004): bit i of `rest` is 0 where a's first i + 1 words have one
    more in common with what was read of b than its first i."""
    places = dict[str, int]()
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    rest = whole = (1 << len(a)) - 1
    for word in b:
        met = rest & places.get(word, 0)
        rest = (rest + met | rest - met) & whole
    return len(a) - rest.bit_count()


_Vector = tuple[dict[tuple[str, ...], float], list[float], int]
"""n-grams' weights, the length of those of each n, and how many of two words there are."""


class Cider(_Coco):
    """n-grams weighed by how few rows' references have them (of all rows, also where a sample is scored). As
    `pycocoevalcap.cider` has it, which weighs all references again for each system: that took most of the time."""

    name = "cider"

    def __init__(self, references: References) -> None:
        super().__init__(references)
        from pycocoevalcap.cider.cider_scorer import precook

        self._count = precook
        counted = [[precook(text) for text in texts] for texts in self.tokenized]
        rows = Counter(gram for texts in counted for gram in set().union(*texts))
        self._rarest = math.log(len(counted)) if counted else 0.0
        self._weights = {gram: self._rarest - math.log(count) for gram, count in rows.items()}
        self._vectors = [[self._vector(counts) for counts in texts] for texts in counted]

    def measure(self, answers: Sequence[str]) -> Measured:
        rows = zip(ptb(answers), self._vectors, strict=True)
        return mean_of([self._likeness(self._vector(self._count(answer)), texts) for answer, texts in rows])

    def _vector(self, counts: Mapping[tuple[str, ...], int]) -> _Vector:
        weights = {gram: count * self._weights.get(gram, self._rarest) for gram, count in counts.items()}
        squares = [0.0] * 4
        for gram, weight in weights.items():
            squares[len(gram) - 1] += weight**2
        words = sum(count for gram, count in counts.items() if len(gram) == 2)
        return weights, [math.sqrt(square) for square in squares], words

    def _likeness(self, answer: _Vector, references: Sequence[_Vector]) -> float:
        (ours, lengths, words), found = answer, 0.0
        for theirs, other_lengths, other_words in references:
            products = [0.0] * 4
            for gram, weight in ours.items():
                if other := theirs.get(gram):
                    products[len(gram) - 1] += min(weight, other) * other
            norms = zip(products, lengths, other_lengths, strict=True)
            cosines = sum(product / (a * b) for product, a, b in norms if a and b)
            found += cosines * math.exp(-((words - other_words) ** 2) / (2 * _SIGMA**2))
        return 10 * found / 4 / len(references)


_SIGMA = 6.0
"""Of CIDEr's penalty for another length."""


class Meteor(_Coco):
    name = "meteor"

    def __init__(self, references: References) -> None:
        super().__init__(references)
        program = ["-Xmx2G", "-jar", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"]
        self._java = Lines(program, package() / "meteor")
        self._counted: dict[tuple[int, str], str] = {}
        """METEOR's counts for an answer to a row."""

    def measure(self, answers: Sequence[str]) -> Measured:
        rows = list(enumerate(map(_plain, ptb(answers))))
        if new := [row for row in rows if row not in self._counted]:  # systems often give the same answer
            asked = [" ||| ".join(["SCORE", *map(_plain, self.tokenized[i]), answer]) for i, answer in new]
            self._counted |= dict(zip(new, self._java.ask(asked, len(asked)), strict=True))
        counts = np.array([self._counted[row].split() for row in rows], np.float64)
        stats = np.concatenate([np.ones((len(counts), 1)), counts], 1)
        by_row = self._value(stats)
        answer_words, reference_words, chunks, answer_matches, reference_matches = stats[:, [1, 2, 21, 22, 23]].T
        # an answer that is its reference is one chunk; METEOR adds up rows as if it had none
        whole = (chunks == 1) & (answer_matches == answer_words) & (reference_matches == reference_words)
        stats[whole, 21] = 0
        return Measured(stats, self._value, by_row)

    def _value(self, sums: np.ndarray) -> np.ndarray:
        """METEOR's own formula on sums of its counts: it answers with the score of each list of counts, and then with
        that of all lists together."""
        lines = ["EVAL ||| " + " ".join(f"{count:.1f}" for count in row) for row in sums[:, 1:]]
        return np.array(self._java.ask(lines, 2 * len(lines))[1::2], np.float64)

    def close(self) -> None:
        self._java.close()


def _plain(text: str) -> str:
    return text.replace("|||", "").replace("  ", " ")
