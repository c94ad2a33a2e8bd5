"""Rows that are longer than a base has positions. No torch."""

from __future__ import annotations

from ftray.config import Run
from ftray.errors import ModelError


def refuse_positions(run: Run, positions: int | None, learned: bool) -> None:
    """Raises ModelError where rows, with virtual tokens in front of them, need more than the base's `positions`; None:
    unknown. Without virtual tokens only where each position has an embedding that was `learned`: a rotation can be
    computed for any, and `beyond` tells of it."""
    tokens, length = run.method.virtual_tokens + run.method.prefix_tokens, run.data.max_length
    if positions is None or tokens + length <= positions or not (tokens or learned):
        return
    if tokens:
        raise ModelError(
            f"{tokens} virtual tokens and rows of up to {length} are more than the base's {positions} positions",
            where="method.tokens",
            hint=f"lower method.tokens or data.max_length: together at most {positions}",
        )
    raise ModelError(
        f"rows of up to {length} tokens are more than the base's {positions} positions, and it has learned no others",
        where="data.max_length",
        hint=f"lower it to {positions}",
    )


def beyond(run: Run, positions: int | None) -> str | None:
    """What to tell of rows that reach beyond the positions of a base that can compute more; None: they do not."""
    if positions is None or run.data.max_length <= positions:
        return None
    return (
        f"rows of up to {run.data.max_length:,} tokens reach beyond the {positions:,} positions that the base was made"
        " for; it computes the others, but has not seen them"
    )
