"""Attention over packed rows: linear layers see one row without padding, attention sees one sequence a row.

Packed sequences must not see each other. A block-diagonal mask over the packed row costs T² whatever the lengths; here
queries, keys and values are laid out as padded sequences for the product alone, those of like length together, where
plain causal attention needs no mask: padding stands behind the real tokens, so no real token ever sees it. Both layout
changes are gathers, forward and backward, so that results do not depend on the order of atomic additions.

Shapes: T tokens of the packed row, S sequences of a group, L its longest, P places of all groups, H heads, D a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

IMPLEMENTATION = "ftray_packed"
LIKE_LENGTH = 0.7
"""A group's shortest sequence is at least this share of its longest. Cost goes by S·L²; each group costs launches."""
PLAIN_LENGTH = 256
"""Up to this length bf16 attention on a CPU is two batched products and a softmax. Measured on 2 cores, 16 sequences,
8 heads of 64, forward and backward: 9 ms against 46 ms of torch's flash kernel at length 100, 217 to 234 at 400."""


@dataclass(frozen=True)
class Packed:
    """Where each token of a packed row lies among padded sequences."""

    to_padded: Tensor
    """int64 [P]: token of the packed row at each padded place; T (one past the end) where there is none."""
    to_packed: Tensor
    """int64 [T]: padded place of each token of the packed row."""
    groups: tuple[tuple[int, int], ...]
    """(S, L) of each group; the places of one follow those of the one before."""

    @classmethod
    def of(cls, lengths: Tensor) -> Packed:
        """`lengths` int [number of sequences], on the host: tokens of each sequence, in order."""
        lengths = lengths.to(torch.int64)
        starts = lengths.cumsum(0) - lengths
        total = int(lengths.sum())
        order = torch.argsort(lengths, descending=True, stable=True)
        groups = _groups(lengths[order].tolist())
        padded, first = [], 0
        for count, longest in groups:
            members = order[first : first + count]
            place = torch.arange(longest)
            inside = place[None, :] < lengths[members, None]
            padded.append(torch.where(inside, starts[members, None] + place[None, :], total).reshape(-1))
            first += count
        to_padded = torch.cat(padded)
        to_packed = torch.empty(total + 1, dtype=torch.int64)
        to_packed[to_padded] = torch.arange(len(to_padded))
        return cls(to_padded, to_packed[:total].clone(), groups)

    def to(self, device: torch.device | str) -> Packed:
        return Packed(self.to_padded.to(device), self.to_packed.to(device), self.groups)


def _groups(descending: list[int]) -> tuple[tuple[int, int], ...]:
    """(count, longest) of runs of like length."""
    groups: list[tuple[int, int]] = []
    for length in descending:
        if groups and length >= LIKE_LENGTH * groups[-1][1]:
            groups[-1] = (groups[-1][0] + 1, groups[-1][1])
        else:
            groups.append((1, length))
    return tuple(groups)


class _Gather(torch.autograd.Function):
    """rows[index] with a zero row behind the end; the backward pass gathers by the inverse index."""

    @staticmethod
    def forward(ctx, rows, index, inverse):
        ctx.save_for_backward(inverse)
        return _take(rows, index)

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
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
    prefix: Tensor | None = None,
    **_unused,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [B, H, T, D] → ([B, T, H, D], None).

    With `packed`, B is 1 and the row holds `packed.sequences` sequences. Without, rows are padded on the right.
    `prefix` [layers, 2, key heads, V, D]: keys and values that stand in front of those of every sequence.
    """
    if softcap is not None:
        raise NotImplementedError("this attention has no soft cap; the base must use its own implementation")
    before = None if prefix is None else _of_layer(prefix, module).to(key.dtype)
    if packed is None or packed.groups == ((1, query.shape[2]),):
        out = _causal(query, key, value, scaling, dropout, sliding_window, before)
        return out.transpose(1, 2).contiguous(), None

    def pad(x: Tensor) -> Tensor:  # [1, H, T, D] → [P, H, D]
        return _Gather.apply(x[0].transpose(0, 1), packed.to_padded, packed.to_packed)

    places = [count * longest for count, longest in packed.groups]
    pieces = zip(*(pad(x).split(places) for x in (query, key, value)), strict=True)
    rows = []
    for group, piece in zip(packed.groups, pieces, strict=True):
        q, k, v = (x.unflatten(0, group).transpose(1, 2) for x in piece)  # [S, H, L, D]
        rows.append(_causal(q, k, v, scaling, dropout, sliding_window, before).transpose(1, 2).flatten(0, 1))
    return _Gather.apply(torch.cat(rows), packed.to_packed, packed.to_padded)[None], None


def _of_layer(prefix: Tensor, attention: Any) -> Tensor:
    return prefix[attention.layer_idx]


def _causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
    before: Tensor | None,
) -> Tensor:
    """[S, H, L, D] → [S, H, L, D]; keys and values `before` [2, key heads, V, D] are seen by all."""
    if before is not None:
        key, value = (
            torch.cat([b.expand(len(x), -1, -1, -1), x], 2) for b, x in zip(before, (key, value), strict=True)
        )
    mask, length, keys = None, query.shape[2], key.shape[2]
    windowed = sliding_window is not None and keys > sliding_window
    short = length <= PLAIN_LENGTH and query.device.type == "cpu" and query.dtype == torch.bfloat16
    if short and not windowed and not dropout:
        return _plain(query, key, value, scaling)
    if windowed or keys > length:
        place = torch.arange(keys, device=query.device)
        distance = place[keys - length :, None] - place[None, :]
        mask = (distance >= 0) & (distance < (sliding_window or keys))
        key, value = _for_each_query(query, key, value)  # torch's faster kernels with a mask know no shared heads
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


def _plain(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Queries see the keys before them, and all that come before the first query."""
    length, keys = query.shape[2], key.shape[2]
    key, value = _for_each_query(query, key, value)
    future = torch.full((length, keys), float("-inf"), dtype=query.dtype).triu(1 + keys - length)
    scores = (query @ key.transpose(-1, -2)) * (scaling or query.shape[-1] ** -0.5) + future
    return torch.softmax(scores, -1) @ value


def _for_each_query(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [S, key heads, …] with a head for each of the queries'."""
    repeat = query.shape[1] // key.shape[1]
    return (key, value) if repeat == 1 else (key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1))


def register() -> None:
    """Make the implementation known to transformers. It has no mask function there, so transformers builds no mask."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, packed_attention)
