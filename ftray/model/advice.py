"""The cheapest change that makes a run fit its GPU: what a plan that does not fit tells the user. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import ValidationError

from ftray.config import DoRA, Freeze, Full, LoRA, Run, Strategy, Train
from ftray.config.training import OWNERS
from ftray.model.plan import Plan, make_plan
from ftray.model.shapes import Shapes

_BUSY_TOKENS = 2048
"""Assumed: a micro-batch of so many tokens still keeps a GPU busy; below it, recomputing is the cheaper way."""


@dataclass(frozen=True)
class Advice:
    overrides: tuple[str, ...]
    """What to add to the command, `key=value` each."""
    plan: Plan
    """The plan with them."""
    instead: Advice | None = None
    """Adapters over NF4, where the overrides keep full tuning by moving it to the host."""


def cheapest_fit(run: Run, shapes: Shapes) -> Advice | None:
    """The first of the changes, in the order of what they cost, with which the run fits; None if none does, or if it
    fits as it is. Smaller micro-batches change nothing but time, checkpointing costs a third more of it, 8-bit states
    and NF4 change the numbers a little, and offload to the host (ZeRO 2, then 3) costs much time and the host's memory;
    adapters in place of full tuning are told beside it, since they change the method."""
    if make_plan(run, shapes).fits is not False:
        return None
    for overrides in _candidates(run):
        if _fits(run, shapes, overrides):
            instead = _instead(run, shapes) if "strategy" in overrides else None
            return _advice(run, shapes, overrides, instead)
    return None


def _advice(run: Run, shapes: Shapes, overrides: dict[str, object], instead: Advice | None = None) -> Advice:
    needed = _needed(run, shapes, overrides)
    texts = tuple(f"{key}={_yaml(key, value)}" for key, value in needed.items())
    return Advice(texts, make_plan(_with(run, needed), shapes), instead)


def _instead(run: Run, shapes: Shapes) -> Advice | None:
    recompute = {"train.gradient_checkpointing": True, "method": "qlora"} | _undivided(run)
    return _advice(run, shapes, recompute) if _fits(run, shapes, recompute) else None


def _needed(run: Run, shapes: Shapes, overrides: dict[str, object]) -> dict[str, object]:
    """Without those that it fits without; the dearest are tried first."""
    for key in reversed(list(overrides)):
        fewer = {k: v for k, v in overrides.items() if k != key}
        if _fits(run, shapes, fewer):
            overrides = fewer
    return overrides


def _fits(run: Run, shapes: Shapes, overrides: dict[str, object]) -> bool:
    try:
        changed = _with(run, overrides)
    except ValidationError:  # these do not go together
        return False
    return bool(make_plan(changed, shapes).fits)


def _candidates(run: Run) -> Iterator[dict[str, object]]:
    """Sets of overrides, cheapest first."""
    rows, length = run.train.micro_batch_rows, run.data.max_length
    smaller: list[dict[str, object]] = []
    while rows > 1:
        rows //= 2
        smaller.append({"train.micro_batch_rows": rows})
    yield from (change for change in smaller if int(str(change["train.micro_batch_rows"])) * length >= _BUSY_TOKENS)
    recompute: dict[str, object] = {} if run.train.gradient_checkpointing else {"train.gradient_checkpointing": True}
    steps: list[dict[str, object]] = [recompute]
    if run.train.optimizer != "paged_adamw_8bit" and run.strategy is None:
        steps.append(steps[-1] | _optimizer(run, "paged_adamw_8bit"))
    if isinstance(run.method, Full | Freeze):
        if run.strategy is None or run.strategy.offload_parameters == "none":
            adamw = {} if run.train.optimizer == "adamw" else _optimizer(run, "adamw")
            steps += [recompute | adamw | {"strategy": offload} for offload in (_STATES_TO_HOST, _ALL_TO_HOST)]
    elif isinstance(run.method, LoRA | DoRA):
        steps.append(steps[-1] | {"method.name": f"q{run.method.name}"} | _undivided(run))
    elif not run.method.quantized:
        steps.append(steps[-1] | {"method.quantization": "nf4"})
    for step in steps:
        yield from (step | change for change in ({}, *smaller) if step or change)


def _optimizer(run: Run, name: str) -> dict[str, object]:
    """Another optimizer, and at their defaults the keys that were set for the run's own."""
    changes: dict[str, object] = {"train.optimizer": name}
    for key, owners in OWNERS.items():
        usual = Train.model_fields[key].default
        if name not in owners and getattr(run.train, key) != usual:
            changes[f"train.{key}"] = usual
    return changes


def _undivided(run: Run) -> dict[str, object]:
    """What ZeRO 3, which cannot divide a base in NF4, must become for one: ZeRO 2, and what 3 alone has put back."""
    strategy = run.strategy
    if strategy is None or strategy.zero < 3:
        return {}
    changes: dict[str, object] = {"strategy.zero": 2}
    if strategy.offload_parameters != "none":
        changes["strategy.offload_parameters"] = "none"
    if strategy.offload_optimizer == "nvme":
        changes["strategy.offload_optimizer"] = "cpu"
    if strategy.nvme_path:
        changes["strategy.nvme_path"] = None
    usual = Strategy.model_fields["keep_elements"].default
    return changes if strategy.keep_elements == usual else changes | {"strategy.keep_elements": usual}


_STATES_TO_HOST = {"zero": 2, "offload_optimizer": "cpu"}
_ALL_TO_HOST = {"zero": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"}


def _with(run: Run, overrides: dict[str, object]) -> Run:
    values = run.dump()
    for key, value in overrides.items():
        *path, last = key.split(".")
        at = values
        for part in path:
            at = at[part]
        at[last] = {"name": value} if key == "method" else value
    return Run.model_validate(values)


def _yaml(key: str, value: object) -> str:
    if key == "method":
        return f"'{{name: {value}}}'"
    if isinstance(value, dict):
        return "'{" + ", ".join(f"{name}: {item}" for name, item in value.items()) + "}'"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
