"""Losses of rows under a base and any of its adapters, many adapters in one pass.

The rows lie side by side in the engine's slots, as prompts do, so every method that the engine serves has its loss
taken as it is served: each token of a row meets its own adapter alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ftray.engine.slots import Piece, Slots
from ftray.model.pooled import Route
from ftray.model.served import Adapter, Base
from ftray.train.loss import Head

PASS_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens of one pass."""
_SLOTS = 64
"""Rows of one pass, at most."""
_HEAD_TOKENS = 512
"""Tokens whose logits are held at once."""


@dataclass(frozen=True)
class LossRow:
    """A row under one adapter."""

    adapter: str | None
    """Key in the adapters; None: the base alone."""
    tokens: np.ndarray
    """int32 [T]"""
    targets: np.ndarray
    """bool [T], never the first"""


def row_losses(
    base: Base,
    adapters: Mapping[str, Adapter],
    rows: Sequence[LossRow],
    done: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """float64 [rows]: sum of the cross-entropy of each row's targets, in nats. The base must have no engine now, and no
    row may be longer than its positions. `done` is told how many rows there are results for."""
    for key, adapter in adapters.items():
        base.pooled.put(key, adapter.deltas, adapter.bottlenecks)
    try:
        found = np.zeros(len(rows))
        count = 0
        for chosen in _passes(base, adapters, rows):
            found[chosen] = _sums(base, adapters, [rows[i] for i in chosen])
            done(count := count + len(chosen))
        return found
    finally:
        for key in adapters:
            base.pooled.drop(key)


def _virtual(adapters: Mapping[str, Adapter], row: LossRow) -> int:
    return adapters[row.adapter].virtual_tokens if row.adapter is not None else 0


def _passes(base: Base, adapters: Mapping[str, Adapter], rows: Sequence[LossRow]) -> Iterator[list[int]]:
    """Rows that go through together: of one adapter, as far as they fill a pass, and of like length. Each further
    adapter of a pass costs every layer two products of its own."""
    most = PASS_TOKENS[base.model.device.type]
    lengths = [len(row.tokens) + _virtual(adapters, row) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (base.pooled.order(rows[i].adapter), -lengths[i]))
    few: list[int] = []
    tokens = 0
    for i in order:
        if few and (tokens + lengths[i] > most or len(few) == _SLOTS):
            yield few
            few, tokens = [], 0
        few.append(i)
        tokens += lengths[i]
    if few:
        yield few


@torch.inference_mode()
def _sums(base: Base, adapters: Mapping[str, Adapter], rows: Sequence[LossRow]) -> np.ndarray:
    device = base.model.device
    virtual = [_virtual(adapters, row) for row in rows]
    slots = Slots(base.model, len(rows), max(len(row.tokens) + v for row, v in zip(rows, virtual, strict=True)))
    ids: list[np.ndarray] = []
    segments: list[tuple[str | None, int]] = []
    pieces, predictors, labels, owners, prompts = [], [], [], [], []
    start = 0
    for slot, (row, before) in enumerate(zip(rows, virtual, strict=True)):
        adapter = adapters[row.adapter] if row.adapter is not None else None
        if adapter is not None and adapter.prefix is not None:
            slots.fill(slot, adapter.prefix)
            pieces.append(Piece(slot, before, len(row.tokens)))
            before = 0
        else:
            pieces.append(Piece(slot, 0, before + len(row.tokens)))
            if adapter is not None and adapter.prompt is not None:
                prompts.append((start, adapter.prompt))
        ids += [np.zeros(before, np.int64), row.tokens.astype(np.int64)]
        at = np.flatnonzero(row.targets)
        predictors.append(start + before + at - 1)
        labels.append(row.tokens[at].astype(np.int64))
        owners.append(np.full(len(at), slot))
        count = before + len(row.tokens)
        start += count
        if segments and segments[-1][0] == row.adapter:
            segments[-1] = (row.adapter, segments[-1][1] + count)
        else:
            segments.append((row.adapter, count))
    step = slots.step = slots.plan([], pieces)
    tokens = torch.from_numpy(np.concatenate(ids)).to(device)[None]
    with base.pooled.routed(Route(tuple(segments), device, base.pooled.compiled)):
        hidden = base.model.base_model(
            **_inputs(base, tokens, prompts), position_ids=step.positions[None], use_cache=False
        ).last_hidden_state[0]
    losses = _cross_entropy(base, hidden, np.concatenate(predictors), np.concatenate(labels))
    return np.bincount(np.concatenate(owners), losses, len(rows))


def _inputs(base: Base, tokens: Tensor, prompts: Sequence[tuple[int, Tensor]]) -> dict[str, Tensor]:
    """Tokens, or embeddings where some are virtual."""
    if not prompts:
        return {"input_ids": tokens}
    embeds = base.model.get_input_embeddings()(tokens)
    for start, prompt in prompts:
        embeds[0, start : start + len(prompt)] = prompt.to(embeds)
    return {"inputs_embeds": embeds}


def _cross_entropy(base: Base, hidden: Tensor, predictors: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """float64 [N]: of each target."""
    head = Head(base.model.get_output_embeddings(), base.config)
    at, wanted = (torch.from_numpy(values).to(hidden.device) for values in (predictors, labels))
    pieces = [
        F.cross_entropy(head(hidden[some]).float(), right, reduction="none")
        for some, right in zip(at.split(_HEAD_TOKENS), wanted.split(_HEAD_TOKENS), strict=True)
    ]
    return torch.cat(pieces).double().cpu().numpy()
