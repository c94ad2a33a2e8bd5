"""AdaLoRA beside its forward pass: the penalty of a step, and the ranks that move (Zhang et al. 2023).

PEFT has the arithmetic; here it meets a loop that adds up gradients, and commits that hold everything a run needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_STATE = "adalora/"
"""In front of the keys that this adds to a commit's parameters; no parameter has a slash in its name."""


def rank_budget(model: nn.Module) -> RankBudget | None:
    """The model's, where AdaLoRA is attached to it."""
    return getattr(model, "rank_budget", None)


class RankBudget:
    """Which ranks are left, by their importance so far. The same on every worker: it sees gradients that are already
    averaged, and weights."""

    def __init__(self, model: Any, orthogonality: float) -> None:
        self.tuner, self.orthogonality = model.base_model, orthogonality
        self.config, self.allocator = model.peft_config["default"], model.base_model.rankallocator
        named = list(model.named_parameters())
        self.rows = [p for n, p in named if "lora_A." in n]
        """[rank, in] each."""
        self.columns = [p for n, p in named if "lora_B." in n]
        """[out, rank] each."""
        self.step = 0
        """Steps that moved the weights."""

    def add_penalty(self) -> None:
        """Add to the gradients that of `orthogonality` times the mean of ‖P Pᵀ - I‖ over all factors (section 3.1 of
        the paper has its square; this is PEFT's)."""
        if not self.orthogonality:
            return
        products = [a @ a.T for a in self.rows] + [b.T @ b for b in self.columns]
        distances = [torch.linalg.norm(p - torch.eye(len(p), device=p.device)) for p in products]
        factors = [*self.rows, *self.columns]
        gradients = torch.autograd.grad(self.orthogonality * torch.stack(distances).mean(), factors)
        for factor, gradient in zip(factors, gradients, strict=True):
            assert factor.grad is not None
            factor.grad.add_(gradient)

    def reallocate(self) -> None:
        """After an optimizer step, while its gradients are there: count importance, and take ranks away when due."""
        self.step += 1
        self.tuner.update_and_allocate(self.step)

    def state(self) -> dict[str, Tensor]:
        """By key: the step, both averages of importance, and the ranks that are left."""
        tensors = {f"{_STATE}step": torch.tensor(self.step)}
        for kind in ("exp_avg_ipt", "exp_avg_unc"):
            tensors |= {f"{_STATE}{kind}/{name}": t for name, t in getattr(self.allocator, kind).items()}
        left = self.config.rank_pattern or {}
        return tensors | {f"{_STATE}rank_pattern/{name}": torch.tensor(kept) for name, kept in left.items()}

    def load(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take what `state` gave out of a commit's parameters and return the others."""
        own = {key.removeprefix(_STATE): value for key, value in state.items() if key.startswith(_STATE)}
        device = self.rows[0].device

        def part(kind: str) -> dict[str, Tensor]:
            found = {k.removeprefix(f"{kind}/"): v for k, v in own.items() if k.startswith(f"{kind}/")}
            return {name: value.to(device) for name, value in found.items()}

        self.step = int(own["step"])
        self.allocator.exp_avg_ipt, self.allocator.exp_avg_unc = part("exp_avg_ipt"), part("exp_avg_unc")
        self.allocator.ipt = dict(self.allocator.exp_avg_ipt)  # PEFT asks it for names alone, then writes it anew
        self.config.rank_pattern = {name: kept.tolist() for name, kept in part("rank_pattern").items()} or None
        return {key: value for key, value in state.items() if not key.startswith(_STATE)}
