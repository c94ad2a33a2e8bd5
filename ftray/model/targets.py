"""Which linear layers a low-rank method is put on, and with which rank. No torch: works on paths.

The planner and the code that attaches a method both ask here, so that what `check` prints is what a run trains.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Literal, TypeVar

from ftray.config import DoRA, LoRA, QDoRA, QLoRA
from ftray.errors import ModelError

LowRank = LoRA | DoRA | QLoRA | QDoRA
Value = TypeVar("Value", int, float)


def select(targets: Literal["all-linear"] | Sequence[str], linears: Iterable[str]) -> list[str]:
    """Paths out of `linears` (every linear layer but the output head) that `targets` names, in their order.

    Raises ModelError when a name matches nothing; it lists what could match.
    """
    paths = list(linears)
    if targets == "all-linear":
        return paths
    for target in targets:
        if not any(ends_with(path, target) for path in paths):
            raise ModelError(
                f"{target!r} matches no linear layer of this base", where="method.targets", hint=_could(target, paths)
            )
    if not targets:
        raise ModelError("no target is named", where="method.targets", hint="name some, or write all-linear")
    return [path for path in paths if any(ends_with(path, target) for target in targets)]


def ends_with(path: str, name: str) -> bool:
    """`q_proj` and `self_attn.q_proj` are ends of `model.layers.0.self_attn.q_proj`; `proj` is not."""
    return path == name or path.endswith(f".{name}")


def _could(target: str, candidates: Sequence[str]) -> str:
    names = sorted({path.rsplit(".", 1)[-1] for path in candidates})
    near = difflib.get_close_matches(target.rsplit(".", 1)[-1], names, n=1)
    known = f"linear layers here: {', '.join(names)}; or all-linear"
    return f"did you mean {near[0]!r}? {known}" if near else known


def rank_of(path: str, method: LowRank) -> int:
    """Rank of one target, by the first pattern of `rank_pattern` that matches the end of its path."""
    return _by_pattern(path, method.rank_pattern, method.rank)


def alpha_of(path: str, method: LowRank) -> float:
    return _by_pattern(path, method.alpha_pattern, method.alpha)


def _by_pattern(path: str, patterns: dict[str, Value], default: Value) -> Value:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):  # as PEFT matches its rank_pattern
            return value
    return default


def check_patterns(method: LowRank, targeted: Sequence[str]) -> None:
    """Raises ModelError for a pattern that is no regular expression, or that no target matches."""
    for key, patterns in (("rank_pattern", method.rank_pattern), ("alpha_pattern", method.alpha_pattern)):
        for pattern in patterns:
            where = f"method.{key}.{pattern}"
            try:
                matched = any(re.match(rf"(.*\.)?({pattern})$", path) for path in targeted)
            except re.error as error:
                raise ModelError(f"not a regular expression: {error}", where=where) from None
            if not matched:
                raise ModelError("matches none of the targets", where=where, hint=f"targets end like {targeted[0]}")
