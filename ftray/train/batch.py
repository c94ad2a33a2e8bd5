"""Rows → one micro-batch of tensors: laid end to end, or padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftray.data.prepared import Row
from ftray.model.attention import Packed


@dataclass(frozen=True)
class Batch:
    """One micro-batch. B is 1 for packed rows."""

    tokens: Tensor
    """int64 [B, T]"""
    positions: Tensor
    """int64 [B, T]: places that restart at every sequence."""
    predictors: Tensor
    """int64 [N]: places in the flattened tokens whose hidden state predicts a target."""
    labels: Tensor
    """int64 [N]: the targets."""
    lengths: Tensor
    """int64 [S]: tokens of each sequence, in order; padded, S = B and padding does not count."""
    packed: Packed | None
    real_tokens: int
    """Tokens that are not padding."""

    def inputs(self) -> dict[str, Any]:
        return {"input_ids": self.tokens, "position_ids": self.positions, "packed": self.packed}

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        moved: dict[str, Any] = {
            f.name: v.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(v := getattr(self, f.name), Tensor)
        }
        packed = self.packed
        if packed:
            packed = replace(packed, to_padded=packed.to_padded.to(device), to_packed=packed.to_packed.to(device))
        return replace(self, **moved, packed=packed)


def collate(rows: Sequence[Row], pad_id: int, *, packed: bool) -> Batch:
    """The micro-batch of `rows`. Without rows it is one filler token without targets, so that a worker that has
    nothing to do in this step takes part in its communication."""
    if not rows:
        filler = np.array([pad_id], dtype=np.int32)
        rows = [Row(filler, np.zeros(1, bool), np.ones(1, np.int32))]
        return replace(_packed(rows), real_tokens=0)
    return _packed(rows) if packed else _padded(rows, pad_id)


def _packed(rows: Sequence[Row]) -> Batch:
    tokens = np.concatenate([row.tokens for row in rows]).astype(np.int64)
    targets = np.concatenate([row.targets for row in rows])
    lengths = np.concatenate([row.sequence_lengths for row in rows])
    positions = np.concatenate([np.arange(n) for n in lengths])
    at = np.flatnonzero(targets)
    return Batch(
        tokens=torch.from_numpy(tokens)[None],
        positions=torch.from_numpy(positions)[None],
        predictors=torch.from_numpy(at - 1),
        labels=torch.from_numpy(tokens[at]),
        lengths=torch.from_numpy(lengths.astype(np.int64)),
        packed=Packed.of(torch.from_numpy(lengths)),
        real_tokens=len(tokens),
    )


def _padded(rows: Sequence[Row], pad_id: int) -> Batch:
    longest = max(len(row.tokens) for row in rows)
    tokens = np.full((len(rows), longest), pad_id, dtype=np.int64)
    targets = np.zeros((len(rows), longest), dtype=bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row.tokens)] = row.tokens
        targets[i, : len(row.tokens)] = row.targets
    at = np.flatnonzero(targets.reshape(-1))
    flat = torch.from_numpy(tokens)
    return Batch(
        tokens=flat,
        positions=torch.arange(longest).expand(len(rows), -1),
        predictors=torch.from_numpy(at - 1),
        labels=flat.reshape(-1)[torch.from_numpy(at)],
        lengths=torch.tensor([len(row.tokens) for row in rows]),
        packed=None,
        real_tokens=sum(len(row.tokens) for row in rows),
    )
