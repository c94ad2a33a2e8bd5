"""How many lanes fit beside one base, and how many tokens at once, from the memory plan. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from ftray.config import Run
from ftray.model.plan import make_plan
from ftray.model.shapes import Shapes

USED = 0.9
"""Share of the memory that is planned with."""
_OF_A_LANE = ("adapter weights", "gradients", "optimizer states")
_BY_TOKENS = ("activations", "working set")


@dataclass(frozen=True)
class Room:
    lanes: int
    """Lanes of this run's size, at least 1."""
    tokens: int
    """Tokens of one joint pass at most: never less than one micro-batch of the run has."""


def room(run: Run, shapes: Shapes, memory: int, most_tokens: int) -> Room:
    """What `memory` bytes hold: the base and one pass come first, then lanes. Raises ModelError as `make_plan` does."""
    plan = make_plan(run, shapes)
    lane = sum(item.bytes for item in plan.items if item.name in _OF_A_LANE)
    passing = sum(item.bytes for item in plan.items if item.name in _BY_TOKENS)
    fixed = sum(item.bytes for item in plan.items if item.place == "GPU") - lane - passing
    left = USED * memory - fixed - lane
    tokens = max(plan.tokens, min(most_tokens, int(left / 2 / max(passing / plan.tokens, 1))))
    return Room(max(1, 1 + int((left - passing / plan.tokens * tokens) / lane)), tokens)
