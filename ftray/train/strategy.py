"""How a step's gradients come about and how the weights move: one interface, one class for each way.

The loop knows rows, losses and the rate; a strategy knows what is divided among the workers.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ftray.config import Run
from ftray.model.adalora import rank_budget
from ftray.model.methods import load_trained_state, trained_state
from ftray.train.batch import Batch
from ftray.train.commits import Commit, State
from ftray.train.optimizers import build_optimizer, load_optimizer_state, optimizer_state, set_rate
from ftray.train.world import World


class Strategy(Protocol):
    """Every method is called by all workers at the same point of the loop."""

    model: Any
    """The base with the method attached."""

    def gradients(self, batches: list[Batch], divisor: float, seeds: list[int]) -> list[Tensor]:
        """Gradients of the step's loss, which is the sum over all micro-batches and workers divided by `divisor`;
        returns each micro-batch's own sum (a scalar, detached). `seeds` set what is drawn at random in each."""
        ...

    def update(self, rate: float, apply: bool) -> float:
        """Clip, and move the weights unless `apply` is false or the gradient is not finite; forget the gradients.
        Returns the gradient's norm before clipping, the same on every worker."""
        ...

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a micro-batch without gradients; the model is in evaluation mode."""
        ...

    def state(self) -> State | None:
        """What a commit holds of the weights and the optimizer: rank 0's; None on other workers."""
        ...

    def load(self, commit: Commit) -> None:
        """Put back what `state` gave."""
        ...


class DataParallel:
    """Every worker holds the whole model and moves it alike: torch's DDP, or nothing around it for one worker."""

    def __init__(self, run: Run, model: nn.Module, objective: nn.Module, world: World) -> None:
        self.model, self.objective, self.world = model, objective, world
        self.precision, self.clip_norm = run.train.precision, run.train.clip_norm
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(model, run.train)
        self.wrapped = _distributed(objective, self.trained, world)
        self.budget = rank_budget(model)

    def gradients(self, batches: list[Batch], divisor: float, seeds: list[int]) -> list[Tensor]:
        share = self.world.size / divisor  # DDP divides by the number of workers
        last, losses = len(batches) - 1, []
        for i, (batch, seed) in enumerate(zip(batches, seeds, strict=True)):
            torch.manual_seed(seed)
            local = contextlib.nullcontext() if i == last or self.world.size == 1 else self.wrapped.no_sync()
            with local:
                with autocast(self.precision, self.world):
                    loss = self.wrapped(batch)
                (loss * share).backward()
            losses.append(loss.detach())
        if self.budget:
            self.budget.add_penalty()
        return losses

    def update(self, rate: float, apply: bool) -> float:
        set_rate(self.optimizer, rate)
        norm = float(nn.utils.clip_grad_norm_(self.trained, self.clip_norm or math.inf))
        if apply and math.isfinite(norm):
            self.optimizer.step()
            if self.budget:
                self.budget.reallocate()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def loss(self, batch: Batch) -> Tensor:
        with autocast(self.precision, self.world):
            return self.objective(batch)

    def state(self) -> State | None:
        if not self.world.is_first:
            return None
        return State(trained_state(self.model), *optimizer_state(self.optimizer))

    def load(self, commit: Commit) -> None:
        load_trained_state(self.model, commit.state.model)
        load_optimizer_state(self.optimizer, commit.state.optimizer, commit.state.plain)


def autocast(precision: str, world: World) -> torch.autocast:
    """Matrix products in bf16, where `train.precision` says so."""
    return torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def _distributed(objective: nn.Module, trained: list[nn.Parameter], world: World) -> Any:
    if world.size == 1:
        return objective
    for parameter in trained:  # drawn from one seed, but perhaps on unlike devices
        world.from_first(parameter.data)
    return nn.parallel.DistributedDataParallel(
        objective,
        device_ids=[world.device.index] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        broadcast_buffers=False,
        init_sync=False,  # the frozen base is the same file on every worker
    )
