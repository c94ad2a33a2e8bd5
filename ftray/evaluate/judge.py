"""A judge: a model at an OpenAI-compatible endpoint that says which of two answers is better.

Each pair is judged twice, with the answers' places swapped, since judges favour a place (Zheng et al. 2023, section
3.3). An answer wins only if it wins in both places; else it is a tie.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ftray.config import Decoding
from ftray.errors import RunError
from ftray.evaluate.endpoint import AT_ONCE, Endpoint
from ftray.evaluate.scores.metric import Measured, mean_of

Verdict = Literal["first", "second", "tie"]
PROMPT = """Two assistants answered the same question. Judge which answer is better: correct, to the point, \
in good language. Their order says nothing, nor does their length.

[Question]
{question}
{reference}
[Answer A]
{first}

[Answer B]
{second}

End with one line: "Verdict: A", "Verdict: B" or "Verdict: tie"."""
_VERDICT = re.compile(r"verdict\W*\b(a|b|tie)\b", re.IGNORECASE)
_MEANING: dict[str, Verdict] = {"a": "first", "b": "second", "tie": "tie"}
_TURNED: dict[Verdict, Verdict] = {"first": "second", "second": "first", "tie": "tie"}


@dataclass(frozen=True)
class Pair:
    question: str
    first: str
    second: str
    reference: str | None = None


@dataclass(frozen=True)
class Judged:
    """What a judge made of the answers of two systems."""

    verdicts: tuple[Verdict, ...]
    """One for each pair, both places taken together."""
    swayed: int
    """Pairs of which the place decided: the verdict moved with it."""
    unclear: int
    """Judgements without a verdict; each counts as a tie."""
    prompt_tokens: int
    answer_tokens: int
    """What the judge read and wrote, by its own count."""

    @property
    def wins(self) -> float:
        """Share of the pairs that the first wins, ties as halves."""
        return self.measured.score

    @property
    def measured(self) -> Measured:
        """For intervals: 1 for each win of the first, 1/2 for a tie."""
        return mean_of(np.array([{"first": 1.0, "tie": 0.5, "second": 0.0}[verdict] for verdict in self.verdicts]))

    def counts(self) -> dict[str, int]:
        """{"first": …, "tie": …, "second": …}"""
        found = Counter(self.verdicts)
        return {verdict: found[verdict] for verdict in ("first", "tie", "second")}

    def cost(self, prompt_price: float, answer_price: float) -> float:
        """In the currency of the prices, which are those of a million tokens."""
        return (self.prompt_tokens * prompt_price + self.answer_tokens * answer_price) / 1e6


def judge(
    endpoint: Endpoint,
    pairs: Sequence[Pair],
    decoding: Decoding | None = None,
    done: Callable[[int], None] = lambda count: None,
) -> Judged:
    """Both orders of every pair, some at once. Equal answers are a tie without asking. Raises RunError when the
    endpoint does not answer, or no judgement at all has a verdict."""
    decoding = decoding or Decoding(max_tokens=512)
    asked = [i for i, pair in enumerate(pairs) if pair.first.strip() != pair.second.strip()]

    def ask(prompt: str) -> tuple[Verdict | None, int, int]:
        answer = endpoint.chat([{"role": "user", "content": prompt}], decoding)
        return verdict_of(answer.text), answer.prompt_tokens, answer.tokens

    prompts = [_prompt(pairs[i], swapped) for i in asked for swapped in (False, True)]
    found = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for each in pool.map(ask, prompts):
            found.append(each)
            done(len(found) // 2)
    unclear = sum(verdict is None for verdict, _, _ in found)
    if found and unclear == len(found):
        raise RunError("the judge gave no verdict at all", where=endpoint.model, hint="take a more capable model")
    verdicts: list[Verdict] = ["tie"] * len(pairs)
    swayed = 0
    for number, i in enumerate(asked):
        straight, turned = found[2 * number][0] or "tie", _TURNED[found[2 * number + 1][0] or "tie"]
        if straight == turned:
            verdicts[i] = straight
        elif "tie" not in (straight, turned):
            swayed += 1
    read, written = sum(each[1] for each in found), sum(each[2] for each in found)
    return Judged(tuple(verdicts), swayed, unclear, read, written)


def verdict_of(text: str) -> Verdict | None:
    """The last verdict in the judge's words; None without any."""
    said = _VERDICT.findall(text)
    return _MEANING[said[-1].lower()] if said else None


def _prompt(pair: Pair, swapped: bool) -> str:
    first, second = (pair.second, pair.first) if swapped else (pair.first, pair.second)
    reference = f"\n[A right answer]\n{pair.reference}\n" if pair.reference else ""
    return PROMPT.format(question=pair.question, reference=reference, first=first, second=second)
