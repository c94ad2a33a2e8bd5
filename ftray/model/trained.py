"""What lanes train at one linear layer of a frozen base: low-rank rows, each lane's beside its own tokens.

A lane's tokens lie side by side in the batch, so each lane is two products of its own on its part of the batch, and its
gradients go straight to where its optimizer reads them: nothing of the size of all lanes is made. For a token x of a
lane with A, B, scale s, and under DoRA the gain g = magnitude / ‖W + s B A‖ (a constant to the gradient, Liu et al.
2024, section 4.3), on a base W, c:

    y = g * (W x + s B A drop(x)) + c

Shapes: T tokens of the batch, k of one span, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

GENERATOR = torch.Generator | None


@dataclass
class LowRankRows:
    """One lane's weights at one layer, and their gradients, which are added up. Views of what its optimizer moves."""

    down: Tensor
    """A, [r, in]"""
    up: Tensor
    """B, [out, r]"""
    down_grad: Tensor
    up_grad: Tensor
    scale: float
    dropout: float
    gain: Tensor | None = None
    """[out]; None: no DoRA."""
    gain_grad: Tensor | None = None


@dataclass(frozen=True)
class Span:
    """Tokens of one lane that lie side by side."""

    rows: LowRankRows
    start: int
    stop: int
    generator: GENERATOR
    """Of dropout; None: nothing is dropped."""


def add_low_rank(anchor: Tensor, x: Tensor, y: Tensor, bias: Tensor | None, spans: Sequence[Span]) -> Tensor:
    """The layer's output [T, out] with what lanes do to their tokens; y is the base's, with `bias` in it.

    Gradients of the lanes' weights are added to theirs in the backward pass. `anchor`, any tensor that requires
    gradients, makes it a part of that pass even where x and y require none.
    """
    with torch.autocast(y.device.type, enabled=False):  # types are chosen here
        return _AddLowRank.apply(anchor, x, y, bias, spans)


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _anchor: Tensor, x: Tensor, y: Tensor, bias: Tensor | None, spans: Sequence[Span]) -> Tensor:
        out, dtype = y.clone(), _working(y)
        kept: list[Tensor] = [x]
        ctx.kept, ctx.spans = [], spans
        for span in spans:
            rows, part = span.rows, slice(span.start, span.stop)
            own, mask = x[part].to(dtype), None
            if rows.dropout and span.generator is not None:
                mask = torch.empty_like(own).bernoulli_(1 - rows.dropout, generator=span.generator)
                own = own * mask.div_(1 - rows.dropout)
            hidden = (own @ rows.down.to(dtype).T).mul_(rows.scale)
            piece = out[part]
            _add_product(piece, hidden, rows.up.to(dtype).T)
            before = None
            if rows.gain is not None:
                if bias is not None:
                    piece -= bias
                before = piece.clone()
                piece *= rows.gain
                if bias is not None:
                    piece += bias
            ctx.kept.append([_keep(kept, tensor) for tensor in (mask, hidden, before)])
        ctx.save_for_backward(*kept)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None, Tensor, None, None]:
        saved = ctx.saved_tensors
        x, dtype = saved[0], _working(gradient)
        of_x = torch.zeros_like(x) if ctx.needs_input_grad[1] else None
        of_y = gradient.clone() if any(span.rows.gain is not None for span in ctx.spans) else gradient
        for span, places in zip(ctx.spans, ctx.kept, strict=True):
            mask, hidden, before = (None if place is None else saved[place] for place in places)
            rows, part = span.rows, slice(span.start, span.stop)
            own, inner = x[part].to(dtype), gradient[part].to(dtype)
            assert hidden is not None
            if mask is not None:
                own = own * mask
            if before is not None:
                assert rows.gain is not None
                assert rows.gain_grad is not None
                rows.gain_grad += (inner * before).sum(0)
                inner = inner * rows.gain.to(dtype)
                of_y[part] = inner
            low = (inner @ rows.up.to(dtype)).mul_(rows.scale)  # [k, r]
            _add_product(rows.up_grad, inner.T, hidden)
            _add_product(rows.down_grad, low.T, own)
            if of_x is not None:
                back = low @ rows.down.to(dtype)
                of_x[part] = back if mask is None else back.mul_(mask)
        return None, of_x, of_y, None, None


def _working(tensor: Tensor) -> torch.dtype:
    """What low-rank products are computed in. On a CPU fp32 whatever the base has: torch's bf16 products of such small
    matrices cost several times as much (measured: 0.24 ms against 0.04 ms for [128, 4] × [4, 192])."""
    return torch.float32 if tensor.device.type == "cpu" else tensor.dtype


def _add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    """into += a @ b"""
    if into.dtype == a.dtype:
        into.addmm_(a, b)
    else:
        into += a @ b


def _keep(kept: list[Tensor], tensor: Tensor | None) -> int | None:
    """The tensor's place among those that are kept."""
    if tensor is None:
        return None
    kept.append(tensor)
    return len(kept) - 1
