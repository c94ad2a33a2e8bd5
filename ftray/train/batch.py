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
    virtual: Tensor | None
    """int64 [S·V]: places in the row that virtual tokens take, V in front of each of its S sequences."""
    prefixed: bool
    """Every sequence has a prefix, in keys and values alone, from which positions count."""
    bare: Batch | None
    """The same rows without virtual tokens or prefix, for the base alone; None where there are none."""
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
        packed = self.packed and self.packed.to(device)
        return replace(self, **moved, packed=packed, bare=self.bare and self.bare.to(device))


def collate(
    rows: Sequence[Row], pad_id: int, *, packed: bool, virtual_tokens: int = 0, prefix_tokens: int = 0
) -> Batch:
    """The micro-batch of `rows`. Without rows it is one filler token without targets, so that a worker that has
    nothing to do in this step takes part in its communication. In front of every sequence of packed rows come
    `virtual_tokens` places in the row, or `prefix_tokens` that only positions count."""
    if not rows:
        filler = np.array([pad_id], dtype=np.int32)
        rows = [Row(filler, np.zeros(1, bool), np.ones(1, np.int32))]
        return replace(_packed(rows, pad_id, virtual_tokens, prefix_tokens), real_tokens=0)
    if packed:
        return _packed(rows, pad_id, virtual_tokens, prefix_tokens)
    assert virtual_tokens == prefix_tokens == 0, "a padded row has no place for virtual tokens"
    return _padded(rows, pad_id)


def _packed(rows: Sequence[Row], pad_id: int, virtual_tokens: int, prefix_tokens: int) -> Batch:
    tokens = np.concatenate([row.tokens for row in rows]).astype(np.int64)
    targets = np.concatenate([row.targets for row in rows])
    lengths = np.concatenate([row.sequence_lengths for row in rows])
    real = len(tokens)
    virtual = None
    bare = _packed(rows, pad_id, 0, 0) if virtual_tokens or prefix_tokens else None
    if virtual_tokens:
        own = np.arange(real) + virtual_tokens * np.repeat(1 + np.arange(len(lengths)), lengths)
        lengths = lengths + virtual_tokens
        tokens, targets = _spread(tokens, own, int(lengths.sum()), pad_id), _spread(targets, own, int(lengths.sum()), 0)
        virtual = torch.from_numpy(np.setdiff1d(np.arange(len(tokens)), own, assume_unique=True))
    positions = np.concatenate([prefix_tokens + np.arange(n) for n in lengths])
    at = np.flatnonzero(targets)
    return Batch(
        tokens=torch.from_numpy(tokens)[None],
        positions=torch.from_numpy(positions)[None],
        predictors=torch.from_numpy(at - 1),
        labels=torch.from_numpy(tokens[at]),
        lengths=torch.from_numpy(lengths.astype(np.int64)),
        packed=Packed.of(torch.from_numpy(lengths)),
        virtual=virtual,
        prefixed=prefix_tokens > 0,
        bare=bare,
        real_tokens=real,
    )


def _spread(values: np.ndarray, places: np.ndarray, length: int, fill: int) -> np.ndarray:
    """[length] with `values` at `places`, `fill` elsewhere."""
    out = np.full(length, fill, values.dtype)
    out[places] = values
    return out


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
        virtual=None,
        prefixed=False,
        bare=None,
        real_tokens=sum(len(row.tokens) for row in rows),
    )


def joined(batches: Sequence[Batch]) -> Batch:
    """Packed micro-batches as one, their sequences laid end to end."""
    if len(batches) == 1:
        return batches[0]
    assert all(batch.packed and batch.virtual is None and not batch.prefixed for batch in batches)
    starts = np.cumsum([0, *(batch.tokens.shape[1] for batch in batches)])
    lengths = torch.cat([batch.lengths for batch in batches])
    packed = Packed.of(lengths.cpu())
    device = batches[0].tokens.device
    return Batch(
        tokens=torch.cat([batch.tokens for batch in batches], 1),
        positions=torch.cat([batch.positions for batch in batches], 1),
        predictors=torch.cat([b.predictors + int(start) for b, start in zip(batches, starts, strict=False)]),
        labels=torch.cat([batch.labels for batch in batches]),
        lengths=lengths,
        packed=packed.to(device),
        virtual=None,
        prefixed=False,
        bare=None,
        real_tokens=sum(batch.real_tokens for batch in batches),
    )
