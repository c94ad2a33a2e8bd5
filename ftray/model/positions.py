"""Rows that are longer than a base has positions. No torch."""

from __future__ import annotations

from ftray.config import Run
from ftray.errors import ModelError


def refuse_positions(run: Run, positions: int | None) -> None:
    """Raises ModelError where virtual tokens and rows together need more than the base's `positions`; None: unknown."""
    tokens = run.method.virtual_tokens + run.method.prefix_tokens
    if not tokens or positions is None or tokens + run.data.max_length <= positions:
        return
    raise ModelError(
        f"{tokens} virtual tokens and rows of up to {run.data.max_length} are more than the base's {positions}"
        " positions",
        where="method.tokens",
        hint=f"lower method.tokens or data.max_length: together at most {positions}",
    )
