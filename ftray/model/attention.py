"""Attention over packed rows: linear layers see one row without padding, attention sees one sequence a row.

Packed sequences must not see each other. A block-diagonal mask over the packed row costs T² whatever the lengths; here
queries, keys and values are laid out as [sequences, longest] for the product alone, where plain causal attention needs
no mask: padding stands behind the real tokens, so no real token ever sees it. Both layout changes are gathers, forward
and backward, so that results do not depend on the order of atomic additions.

Shapes: T tokens of the packed row, S sequences, L the longest, H heads, D size of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

IMPLEMENTATION = "ftray_packed"


@dataclass(frozen=True)
class Packed:
    """Where each token of a packed row lies among padded sequences."""

    to_padded: Tensor
    """int64 [S·L]: token of the packed row at each padded place; T (one past the end) where there is none."""
    to_packed: Tensor
    """int64 [T]: padded place of each token of the packed row."""
    sequences: int
    longest: int

    @classmethod
    def of(cls, lengths: Tensor, device: torch.device | str = "cpu") -> Packed:
        """`lengths` int [S] on the host: tokens of each sequence, in order."""
        lengths = lengths.to(torch.int64)
        sequences, longest = len(lengths), int(lengths.max())
        starts = lengths.cumsum(0) - lengths
        place = torch.arange(longest)
        inside = place[None, :] < lengths[:, None]
        total = int(lengths.sum())
        to_padded = torch.where(inside, starts[:, None] + place[None, :], total).reshape(-1)
        to_packed = torch.nonzero(inside.reshape(-1)).reshape(-1)
        return cls(to_padded.to(device), to_packed.to(device), sequences, longest)


class _Gather(torch.autograd.Function):
    """rows[index] with a zero row behind the end; the backward pass gathers by the inverse index."""

    @staticmethod
    def forward(ctx, rows, index, inverse):
        ctx.save_for_backward(index, inverse)
        return _take(rows, index)

    @staticmethod
    def backward(ctx, grad):
        index, inverse = ctx.saved_tensors
        return _take(grad.contiguous(), inverse), None, None


def _take(rows: Tensor, index: Tensor) -> Tensor:
    if len(index) <= len(rows):  # to packed: every place exists
        return rows.index_select(0, index)
    padded = torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])
    return padded.index_select(0, index)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed: Packed | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_unused,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [B, H, T, D] → ([B, T, H, D], None).

    With `packed`, B is 1 and the row holds `packed.sequences` sequences. Without, rows are padded on the right.
    """
    if softcap is not None:
        raise NotImplementedError("this attention has no soft cap; the base must use its own implementation")
    if packed is None:
        out = _causal(query, key, value, scaling, dropout, sliding_window)
        return out.transpose(1, 2).contiguous(), None

    if packed.sequences == 1:
        out = _causal(query, key, value, scaling, dropout, sliding_window)
        return out.transpose(1, 2).contiguous(), None

    def pad(x: Tensor) -> Tensor:  # [1, H, T, D] → [S, H, L, D]
        rows = x[0].transpose(0, 1)
        padded = _Gather.apply(rows, packed.to_padded, packed.to_packed)
        return padded.view(packed.sequences, packed.longest, *rows.shape[1:]).transpose(1, 2)

    out = _causal(pad(query), pad(key), pad(value), scaling, dropout, sliding_window)
    rows = out.transpose(1, 2).reshape(packed.sequences * packed.longest, *out.shape[1::2])
    return _Gather.apply(rows, packed.to_packed, packed.to_padded)[None], None


def _causal(query, key, value, scaling, dropout, sliding_window) -> Tensor:
    mask, length = None, query.shape[2]
    if sliding_window is not None and length > sliding_window:
        place = torch.arange(length, device=query.device)
        distance = place[:, None] - place[None, :]
        mask = (distance >= 0) & (distance < sliding_window)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def register() -> None:
    """Make the implementation known to transformers. It has no mask function there, so transformers builds no mask."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, packed_attention)
