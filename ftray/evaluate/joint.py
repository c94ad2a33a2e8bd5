"""Losses and answers of the same rows: where a prompt is a row up to its targets, one reading gives both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ftray.config import Decoding
from ftray.evaluate.answer import Answer
from ftray.evaluate.answers import Prompt
from ftray.evaluate.losses import LossRow
from ftray.evaluate.worker import Computes

OnEvent = Callable[[dict[str, Any]], None]


def losses_and_answers(
    worker: Computes,
    rows: Sequence[LossRow],
    prompts: Sequence[Prompt],
    decoding: Decoding,
    on_event: OnEvent,
) -> tuple[np.ndarray, list[Answer]]:
    """(float64 [rows]: sum of the cross-entropy of each row's targets in nats, the answer to each prompt). `decoding`
    allows as many tokens as any prompt's own does. Raises as `Computes` does."""
    virtual = worker.virtual_tokens()
    longest = max((len(prompt.tokens) + virtual[prompt.adapter] for prompt in prompts), default=0)
    joined = _joined(rows, prompts) if decoding.beams == 1 else {}
    most = longest + decoding.max_tokens  # places that there are anyway: one long row must not make all slots longer
    joined = {n: i for n, i in joined.items() if len(rows[i].tokens) + virtual[rows[i].adapter] <= most}
    alone = sorted(set(range(len(rows))).difference(joined.values()))
    losses = np.zeros(len(rows))
    if alone:
        losses[alone] = worker.losses([rows[i] for i in alone], _progress(on_event, "losses", len(alone), "rows"))
    if not prompts:
        return losses, []
    expecting = list(prompts)
    for n, i in joined.items():
        whole = rows[i].tokens.tolist()
        expecting[n] = replace(prompts[n], expected=tuple(whole[len(prompts[n].tokens) :]))
    told = _progress(on_event, "answers", len(prompts), "answers")
    answers = worker.answers(expecting, decoding, longest, told)
    for n, i in joined.items():
        losses[i] = -np.sum(answers[n].expected, where=rows[i].targets[len(prompts[n].tokens) :])
    return losses, answers


def _joined(rows: Sequence[LossRow], prompts: Sequence[Prompt]) -> dict[int, int]:
    """{prompt: the row that is this prompt and then targets}, each at most once."""
    before: dict[tuple[str | None, tuple[int, ...]], int] = {}
    for i, row in enumerate(rows):
        first = int(row.targets.argmax())
        before.setdefault((row.adapter, tuple(row.tokens[:first].tolist())), i)
    found = {n: before.pop((prompt.adapter, prompt.tokens), None) for n, prompt in enumerate(prompts)}
    return {n: i for n, i in found.items() if i is not None}


def _progress(on_event: OnEvent, what: str, total: int, unit: str) -> Callable[[int], None]:
    def told(count: int) -> None:
        on_event({"kind": "progress", "what": what, "done": count, "total": total, "unit": unit})

    return told
