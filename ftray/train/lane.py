"""A run that shares a frozen base with others: its trained weights, gradients and optimizer, and what it asks of the
thread that computes with the base (`ftray.train.lanes`)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ftray.config import Run, Train
from ftray.errors import ModelError
from ftray.model.methods import check_same, trained_state
from ftray.model.trained import LowRankRows
from ftray.train.batch import Batch
from ftray.train.commits import Commit, State

if TYPE_CHECKING:
    from ftray.train.lanes import Base

_STATES = ("exp_avg", "exp_avg_sq")
"""As torch's AdamW calls them, and so commits."""


class LaneEnded(BaseException):
    """Unwinds the loop of a lane that was told to leave; no error of the run, so nothing may take it for one."""


@dataclass
class Gradients:
    """Of these micro-batches' losses, by the lane's weights, where they stay; `seeds` are their dropout's. Answered by
    the sums of losses, one a batch."""

    lane: Lane
    batches: list[Batch]
    divisor: float
    seeds: list[int]


@dataclass
class Losses:
    """Of held-out rows: answered as `Gradients` is."""

    lane: Lane
    batches: list[Batch]


@dataclass
class _Flat:
    """Parameters of one kind, laid end to end, and what AdamW has for them."""

    values: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    steps: Tensor
    decay: float

    @classmethod
    def of(cls, tensors: list[Tensor], decay: float, device: torch.device) -> _Flat:
        values = torch.cat([tensor.float().flatten() for tensor in tensors]).to(device)
        gradient, exp_avg, exp_avg_sq = (torch.zeros_like(values) for _ in range(3))
        return cls(values, gradient, exp_avg, exp_avg_sq, torch.zeros((), device=device), decay)

    def step(self, share: float, rate: float, train: Train) -> None:
        """AdamW's, on the gradient times `share`."""
        if share < 1:
            self.gradient.mul_(share)
        # without the optimizer object, whose hooks would cost more than this
        adamw(
            [self.values],
            [self.gradient],
            [self.exp_avg],
            [self.exp_avg_sq],
            [],
            [self.steps],
            fused=True,
            amsgrad=False,
            beta1=train.betas[0],
            beta2=train.betas[1],
            lr=rate,
            weight_decay=self.decay,
            eps=train.epsilon,
            maximize=False,
        )


_LOW_RANK_NAME = re.compile(r"^base_model\.model\.(?P<path>.+)\.lora_(?P<part>A|B|magnitude_vector)\.default\.weight$")


class Lane:
    """A run's place on the base: the strategy (`ftray.train.strategy.Strategy`) of its loop.

    What is trained lies in two flat tensors, matrices and magnitudes, and so do gradients and the optimizer's states;
    commits hold them under the names that they have in a model of the run's own.
    """

    def __init__(self, name: str, run: Run, base: Base, hold: Callable[[], None] | None = None) -> None:
        self.name, self.run, self.base, self.hold = name, run, base, hold
        self.smoothing = run.train.label_smoothing
        self.away = False
        """It waits for something else than the base."""
        self.expelled = False
        self.rows: dict[str, LowRankRows] = {}
        self.magnitudes: dict[str, Tensor] = {}
        self.norms: dict[str, Tensor] = {}
        self.moved = True
        """Gains are those of older weights."""

    def take_from(self, model: Any) -> None:
        """Hold the weights of PEFT's model of the run, and stand beside the base's layers."""
        state = trained_state(model)
        found = {name: _LOW_RANK_NAME.match(name) for name in state}
        if odd := [name for name, match in found.items() if not match]:
            raise ModelError(f"a lane cannot train {odd[0]}")
        ordered = sorted(state, key=lambda name: state[name].dim() < 2)  # stable: matrices first
        self.names, self.shapes = ordered, {name: state[name].shape for name in ordered}
        matrices = [name for name in ordered if state[name].dim() >= 2]
        vectors = ordered[len(matrices) :]
        self.flats = [
            _Flat.of([state[name] for name in names], decay, self.base.world.device)
            for names, decay in ((matrices, self.run.train.weight_decay), (vectors, 0.0))
            if names
        ]
        values, grads = (self._views(what) for what in ("values", "gradient"))
        parts: dict[str, dict[str, str]] = {}
        for name, match in found.items():
            assert match
            parts.setdefault(match["path"], {})[match["part"]] = name
        for path, names in parts.items():
            layer = model.base_model.model.get_submodule(path)
            rows = LowRankRows(
                down=values[names["A"]],
                up=values[names["B"]],
                down_grad=grads[names["A"]],
                up_grad=grads[names["B"]],
                scale=layer.scaling["default"],
                dropout=self.run.method.dropout,  # type: ignore[union-attr]
            )
            if "magnitude_vector" in names:
                self.magnitudes[path] = values[names["magnitude_vector"]]
                rows.gain = torch.empty_like(self.magnitudes[path])
                rows.gain_grad = grads[names["magnitude_vector"]]  # by the gain; `update` makes it the magnitude's
            self.rows[path] = rows
            self.base.pooled.linears[path].trained[self.name] = rows

    def _views(self, what: str) -> dict[str, Tensor]:
        """Of the flat tensors that hold `what`, by name."""
        views: dict[str, Tensor] = {}
        flats = [getattr(flat, what) for flat in self.flats]
        which, start = 0, 0
        for name in self.names:
            shape = self.shapes[name]
            if start == len(flats[which]):
                which, start = which + 1, 0
            views[name] = flats[which][start : start + shape.numel()].view(shape)
            start += shape.numel()
        return views

    def drop(self) -> None:
        for path in self.rows:
            self.base.pooled.linears[path].drop(self.name)

    def generator(self, seed: int | None) -> torch.Generator | None:
        """Of a micro-batch's dropout: what `torch.manual_seed` would be to the run alone."""
        if seed is None or not self.run.method.dropout:  # type: ignore[union-attr]
            return None
        return torch.Generator(self.base.world.device).manual_seed(seed)

    # ------------------------------------------------------------------------------------------------------- the loop's

    def gradients(self, batches: list[Batch], divisor: float, seeds: list[int]) -> list[Tensor]:
        if self.hold is not None:
            with self.base.without(self):
                self.hold()
        if self.expelled:
            raise LaneEnded
        return self.base.ask(Gradients(self, batches, divisor, seeds))

    def loss(self, batches: Iterable[Batch]) -> float:
        if self.expelled:
            raise LaneEnded
        return sum(map(float, self.base.ask(Losses(self, list(batches)))))

    def update(self, rate: float, apply: bool) -> float:
        return self.base.do(lambda: self._update(rate, apply))

    @torch.no_grad()
    def _update(self, rate: float, apply: bool) -> float:
        for path, norms in self.norms.items():
            grad = self.rows[path].gain_grad
            assert grad is not None
            grad /= norms
        train = self.run.train
        norm = math.hypot(*(float(torch.linalg.vector_norm(flat.gradient)) for flat in self.flats))
        if apply and math.isfinite(norm):
            share = min(1.0, train.clip_norm / (norm + 1e-6)) if train.clip_norm else 1.0
            for flat in self.flats:
                flat.step(share, rate, train)
            self.moved = True
        self.forget()
        return norm

    def forget(self) -> None:
        """Drop the gradients that were added up."""
        for flat in self.flats:
            flat.gradient.zero_()

    def state(self) -> State:
        return self.base.do(self._state)

    def _state(self) -> State:
        model = {name: view.clone() for name, view in self._views("values").items()}
        optimizer: dict[str, Tensor] = {}
        if float(self.flats[0].steps):
            for what in _STATES:
                optimizer |= {f"{name}/{what}": view.clone() for name, view in self._views(what).items()}
            optimizer |= {f"{name}/step": self.flats[0].steps.clone() for name in self.names}
        return State(model, optimizer)

    def load(self, commit: Commit) -> None:
        self.base.do(lambda: self._load(commit.state.model, commit.state.optimizer))

    @torch.no_grad()
    def _load(self, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        check_same(model, dict(self.shapes))
        for name, view in self._views("values").items():
            view.copy_(model[name])
        for what in _STATES if optimizer else ():
            for name, view in self._views(what).items():
                view.copy_(optimizer[f"{name}/{what}"])
        for flat in self.flats if optimizer else ():
            flat.steps.copy_(optimizer[f"{self.names[0]}/step"])
        self.moved = True

    def frozen(self) -> Iterator[tuple[str, Tensor]]:
        return iter(())

    def held(self) -> dict[str, int]:
        """The lane's own; the base is shared."""
        each = sum(flat.values.nbytes for flat in self.flats)
        return {"weights": each, "masters": 0, "states": 2 * each, "gradients": each, "buffers": 0, "nvme": 0}

    def close(self) -> None:
        pass
