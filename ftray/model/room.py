"""What lanes take beside one base, whether one more fits, and how many tokens at once, from the memory plan. No
torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ftray.config import Run
from ftray.model.plan import make_plan
from ftray.model.shapes import Shapes
from ftray.model.states import GIB

USED = 0.9
"""Share of the memory that is planned with."""
_OF_A_LANE = ("adapter weights", "gradients", "optimizer states")
_BY_TOKENS = ("activations", "working set")


@dataclass(frozen=True)
class Need:
    """What a run takes as a lane."""

    own: int
    """Bytes of its weights, gradients and optimizer states, as long as it is there."""
    tokens: int
    """Tokens of one of its micro-batches, at most."""
    token: float
    """Bytes of one token in a pass."""


@dataclass(frozen=True)
class Room:
    """The memory beside a base."""

    memory: int
    """Bytes that are planned with."""
    fixed: int
    """Of the base, and of what else is there once."""
    tokens: int
    """Tokens of one joint pass at most: never less than one micro-batch of the first run has."""

    def passing(self, lanes: Sequence[Need]) -> int:
        """Bytes of the largest pass."""
        return int(max(self.tokens, *(lane.tokens for lane in lanes)) * max(lane.token for lane in lanes))

    def fits(self, lanes: Sequence[Need], one: Need) -> bool:
        """Whether one more lane fits beside these. The first is always tried: where even that is too much, the device
        says so itself."""
        return not lanes or self._left(lanes, one) >= 0

    def more(self, lanes: Sequence[Need], one: Need) -> int:
        """How many more lanes like this one fit beside these."""
        left = self._left(lanes, one)
        return int(not lanes) if left < 0 else 1 + left // one.own

    def _left(self, lanes: Sequence[Need], one: Need) -> int:
        every = [*lanes, one]
        return self.memory - self.fixed - self.passing(every) - sum(lane.own for lane in every)

    def arithmetic(self, lanes: Sequence[Need], one: Need) -> str:
        """Why it does not fit beside these."""
        passing, theirs = self.passing([*lanes, one]), sum(lane.own for lane in lanes)
        terms = [(self.fixed, "the base"), (passing, "a pass"), (theirs, "lanes that are there"), (one.own, "its own")]
        total = sum(size for size, _ in terms)
        listed = " + ".join(f"{size / GIB:.2f} ({name})" for size, name in terms)
        return f"{listed} = {total / GIB:.2f} GiB, of {self.memory / GIB:.2f} GiB, {USED:.0%} of what there is"


def need_of(run: Run, shapes: Shapes) -> Need:
    """Raises ModelError as `make_plan` does."""
    plan = make_plan(run, shapes)
    own, passing = (sum(i.bytes for i in plan.items if i.name in names) for names in (_OF_A_LANE, _BY_TOKENS))
    return Need(own, plan.tokens, passing / plan.tokens)


def room(run: Run, shapes: Shapes, memory: int, most_tokens: int) -> Room:
    """What `memory` bytes hold beside the base of `run`, the first lane: one pass, then lanes. Raises ModelError as
    `make_plan` does."""
    first = need_of(run, shapes)
    given = sum(item.bytes for item in make_plan(run, shapes).items if item.place == "GPU")
    fixed = given - first.own - int(first.token * first.tokens)
    left = USED * memory - fixed - first.own
    tokens = max(first.tokens, min(most_tokens, int(left / 2 / max(first.token, 1))))
    return Room(int(USED * memory), fixed, tokens)
