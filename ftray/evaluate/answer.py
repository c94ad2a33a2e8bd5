"""One answer, whoever gave it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Answer:
    text: str = ""
    prompt_tokens: int = 0
    tokens: int = 0
    """Written."""
    reason: str = ""
    """`stop`, or `length` where `max_tokens` cut it off."""
    expected: tuple[float, ...] = ()
    """Log probability of each token of the answer that was expected, where one was."""
