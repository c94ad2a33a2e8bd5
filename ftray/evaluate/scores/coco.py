"""METEOR, ROUGE-L and CIDEr as the E2E challenge and COCO's caption evaluation compute them, with `pycocoevalcap`.

Its Python code scores ROUGE-L and CIDEr. Its Java programs (the PTB tokenizer, METEOR 1.5 of Denkowski and Lavie 2014)
are called here directly: so one tokenizer process serves all references, METEOR's answers are sums that bootstrap
samples can add up, and nothing is written into the package's folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
        from pycocoevalcap.rouge.rouge import Rouge

        scorer = Rouge()
        rows = zip(ptb(answers), self.tokenized, strict=True)
        return mean_of([scorer.calc_score([answer], texts) for answer, texts in rows])


class Cider(_Coco):
    """n-grams weighed by how few rows' references have them (of all rows, also where a sample is scored)."""

    name = "cider"

    def measure(self, answers: Sequence[str]) -> Measured:
        from pycocoevalcap.cider.cider import Cider as Scorer

        keys = range(len(self.tokenized))
        _, by_row = Scorer().compute_score(
            {i: self.tokenized[i] for i in keys}, {i: [text] for i, text in enumerate(ptb(answers))}
        )
        return mean_of(by_row)


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
