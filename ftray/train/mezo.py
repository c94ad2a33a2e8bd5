"""MeZO (Malladi et al. 2023, "Fine-Tuning Language Models with Just Forward Passes", algorithm 1): the gradient along
one random direction a step, from two forward passes. No gradient, no activation and no optimizer state is ever held.

The direction z is not held either: each parameter's is drawn again, piece by piece, from (seed, step, parameter). All
workers draw the same one, so that the two losses are all that they exchange, and their weights stay equal bit for bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ftray.config import Run
from ftray.model.load import evaluating
from ftray.model.methods import load_trained_state, trained_state
from ftray.train.batch import Batch
from ftray.train.commits import Commit, State
from ftray.train.optimizers import rate_factors
from ftray.train.seeds import mix
from ftray.train.strategy import Replicated
from ftray.train.world import World

_PIECE = {"cpu": 1 << 16, "cuda": 1 << 24}
"""Elements of a parameter that are moved at once: what a step needs beside the weights is four times this in fp32."""


class MeZO(Replicated):
    """A strategy. Between `gradients` and `update` the weights stand at θ - εz."""

    def __init__(self, run: Run, model: nn.Module, objective: nn.Module, world: World) -> None:
        super().__init__(run, model, objective, world)
        self.seed, self.step, self.train = run.seed, 0, run.train
        factors = rate_factors(model, run.train.layer_decay)
        self.trained = [(p, factors[p]) for p in model.parameters() if p.requires_grad]
        for parameter, _ in self.trained:  # drawn from one seed, but perhaps on unlike devices
            world.from_first(parameter.data)
        self.slope = 0.0

    def gradients(self, batches: list[Batch], divisor: float, seeds: list[int]) -> list[Tensor]:
        """The slope along z of the step's mean loss, with dropout off; returns the mean of both sides' losses."""
        distance = self.train.perturbation
        with evaluating(self.model):
            self._move(to=distance)
            above = [self.forward(batch) for batch in batches]
            self._move(back=distance, to=-distance)
            below = [self.forward(batch) for batch in batches]
        difference = sum(float(a) - float(b) for a, b in zip(above, below, strict=True))
        (difference,) = self.world.sum(difference)
        self.slope = difference / (2 * distance * divisor)
        return [(a + b) / 2 for a, b in zip(above, below, strict=True)]

    def update(self, rate: float, apply: bool) -> float:
        """Back to θ and, in the same pass, along z. Returns the slope's size."""
        if apply and math.isfinite(self.slope):
            self._move(back=-self.train.perturbation, rate=rate)
        else:
            self._move(back=-self.train.perturbation)
        self.step += 1
        return abs(self.slope)

    @torch.no_grad()
    def _move(self, back: float = 0.0, to: float = 0.0, rate: float | None = None) -> None:
        """Take `back` z from every trained parameter, then add `to` z; or with `rate` step against the slope.

        The sum is rounded after each of the two, so that θ + εz - εz is θ again unless an element passed a power of
        two. A step is often below half of the last place of bf16, where plain rounding would lose it: it is rounded up
        or down at random, right on average.
        """
        for index, (parameter, factor) in enumerate(self.trained):
            draw = torch.Generator(parameter.device).manual_seed(mix(self.seed, self.step, index))
            luck = torch.Generator(parameter.device).manual_seed(mix(self.seed, self.step, index, 1))
            decay = self.train.weight_decay if parameter.ndim >= 2 else 0.0
            for piece in parameter.data.view(-1).split(_PIECE[parameter.device.type]):
                z = torch.randn(len(piece), generator=draw, device=piece.device)
                value = piece.float()
                if back:
                    value = value.sub_(z, alpha=back).to(piece.dtype).float()
                if to:
                    value = value.add_(z, alpha=to)
                if rate is None:
                    piece.copy_(value)
                else:
                    value = value.mul_(1 - rate * factor * decay).sub_(z, alpha=rate * factor * self.slope)
                    piece.copy_(_rounded_at_random(value, luck) if piece.dtype == torch.bfloat16 else value)

    def state(self) -> State | None:
        return State(trained_state(self.model), {}, {}) if self.world.is_first else None

    def load(self, commit: Commit) -> None:
        load_trained_state(self.model, commit.state.model)
        self.step = commit.progress.step


def _rounded_at_random(value: Tensor, luck: torch.Generator) -> Tensor:
    """fp32 → fp32 values that bf16 holds: the next one up or down, by chance in proportion to how near it is."""
    bits = value.view(torch.int32)
    bits = bits + torch.randint(1 << 16, bits.shape, generator=luck, device=bits.device, dtype=torch.int32)
    return (bits & ~0xFFFF).view(torch.float32)
