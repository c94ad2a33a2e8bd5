"""How a step's gradients come about and how the weights move: one interface, one class for each way.

The loop knows rows, losses and the rate; a strategy knows what is divided among the workers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ftray.config import Run
from ftray.model.adalora import rank_budget
from ftray.model.load import evaluating, largest_parameter
from ftray.model.methods import load_trained_state, trained_state
from ftray.train.batch import Batch
from ftray.train.commits import Commit, State
from ftray.train.optimizers import build_optimizer, load_optimizer_state, optimizer_state, set_rate
from ftray.train.world import World


class Strategy(Protocol):
    """Every method is called by all workers at the same point of the loop."""

    def gradients(self, batches: list[Batch], divisor: float, seeds: list[int]) -> list[Tensor]:
        """Gradients of the step's loss, which is the sum over all micro-batches and workers divided by `divisor`;
        returns each micro-batch's own sum (a scalar, detached). `seeds` set what is drawn at random in each."""
        ...

    def update(self, rate: float, apply: bool) -> float:
        """Clip, and move the weights unless `apply` is false or the gradient is not finite; forget the gradients.
        Returns the gradient's norm before clipping, the same on every worker."""
        ...

    def loss(self, batches: Iterable[Batch]) -> float:
        """The summed loss of micro-batches, without gradients and in evaluation mode."""
        ...

    def state(self) -> State | None:
        """What a commit holds of the weights and the optimizer. Rank 0 writes it; a worker that has one too passes
        through it meanwhile, because its tensors are gathered from all."""
        ...

    def load(self, commit: Commit) -> None:
        """Put back what `state` gave."""
        ...

    def frozen(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters that are not trained, whole, one at a time."""
        ...

    def held(self) -> dict[str, int]:
        """Bytes of this worker's tensors by what they are for, in the middle of a step: after `gradients`."""
        ...

    def close(self) -> None:
        """The run has ended."""
        ...


def choose(run: Run, model: nn.Module, objective: nn.Module, world: World) -> Strategy:
    """The strategy of `run`. ZeRO 0 divides nothing, which is what DataParallel does."""
    if run.train.optimizer == "mezo":
        from ftray.train.mezo import MeZO

        return MeZO(run, model, objective, world)
    if run.strategy is None or run.strategy.zero == 0:
        return DataParallel(run, model, objective, world)
    from ftray.train.zero import Zero

    return Zero(run, model, objective, world)


def divided_weights(run: Run, world: World) -> Any:
    """DeepSpeed's configuration where the model must be created divided (ZeRO 3), else None."""
    if run.strategy is None or run.strategy.zero < 3:
        return None
    from ftray.train.zero import configuration, prepare

    prepare(run, world)
    return configuration(run, world, largest_parameter(run), 1)


class Replicated:
    """What the strategies share in which every worker holds the whole model."""

    def __init__(self, run: Run, model: nn.Module, objective: nn.Module, world: World) -> None:
        self.model, self.objective, self.world = model, objective, world
        self.precision = run.train.precision

    def loss(self, batches: Iterable[Batch]) -> float:
        with evaluating(self.objective):
            return sum(float(self.forward(batch)) for batch in batches)

    def forward(self, batch: Batch) -> Tensor:
        """The summed loss of a micro-batch."""
        self.world.mark("a micro-batch")
        with autocast(self.precision, self.world):
            return self.objective(batch)

    def frozen(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, p.detach()) for name, p in self.model.named_parameters() if not p.requires_grad)

    def held(self) -> dict[str, int]:
        weights = sum(p.nbytes for p in self.model.parameters())
        return {"weights": weights, "masters": 0, "states": 0, "gradients": 0, "buffers": 0, "nvme": 0}

    def close(self) -> None:
        pass


class DataParallel(Replicated):
    """Every worker moves the whole model alike: torch's DDP, or nothing around it for one worker."""

    def __init__(self, run: Run, model: nn.Module, objective: nn.Module, world: World) -> None:
        super().__init__(run, model, objective, world)
        self.clip_norm = run.train.clip_norm
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(model, run.train)
        self.wrapped = _distributed(objective, self.trained, world)
        self.budget = rank_budget(model)

    def gradients(self, batches: list[Batch], divisor: float, seeds: list[int]) -> list[Tensor]:
        share = self.world.size / divisor  # DDP divides by the number of workers
        last, losses = len(batches) - 1, []
        for i, (batch, seed) in enumerate(zip(batches, seeds, strict=True)):
            self.world.mark("a micro-batch")
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

    def state(self) -> State | None:
        if not self.world.is_first:
            return None
        tensors, plain = optimizer_state(self.optimizer)
        names = self._names_by_index()
        return State(trained_state(self.model), _renamed(tensors, names), _renamed(plain, names))

    def load(self, commit: Commit) -> None:
        load_trained_state(self.model, commit.state.model)
        indices = {name: index for index, name in self._names_by_index().items()}
        tensors, plain = dict(commit.state.optimizer), commit.state.plain
        load_optimizer_state(self.optimizer, _renamed(tensors, indices), _renamed(plain, indices))

    def _names_by_index(self) -> dict[str, str]:
        """The name of each parameter by its number in the optimizer."""
        names = {p: name for name, p in self.model.named_parameters()}
        parameters = (p for group in self.optimizer.param_groups for p in group["params"])
        return {str(index): names[p] for index, p in enumerate(parameters)}

    def held(self) -> dict[str, int]:
        states = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        gradients = [p.grad for p in self.trained if p.grad is not None]
        sizes = {"states": sum(t.nbytes for t in states), "gradients": sum(t.nbytes for t in gradients)}
        return super().held() | sizes


def _renamed(state: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """`state` with the first part of each path renamed, in what refers to another path too."""

    def rename(path: str) -> str:
        first, *rest = path.split("/", 1)
        return "/".join([names.get(first, first), *rest])

    return {
        rename(path): {key: rename(other) for key, other in value.items()} if isinstance(value, dict) else value
        for path, value in state.items()
    }


def autocast(precision: str, world: World, *, keep_copies: bool = True) -> torch.autocast:
    """Matrix products in bf16, where `train.precision` says so. `keep_copies`: bf16 copies of weights stay until the
    context ends, so that a weight that is used twice is cast once."""
    enabled = precision == "bf16"
    return torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=enabled, cache_enabled=keep_copies)


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
