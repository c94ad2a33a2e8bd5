"""Attach a method to a base: which parameters are trained, and what a commit holds of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ftray.config import VIRTUAL_TOKENS, Bottleneck, Freeze, Full, Run
from ftray.errors import ModelError
from ftray.model import bottleneck
from ftray.model.adalora import rank_budget
from ftray.model.adapters import attach_adapter
from ftray.model.positions import refuse_positions
from ftray.model.source import learns_positions, parameter_kinds
from ftray.model.targets import unfrozen
from ftray.model.virtual import attach_virtual

TRAINED_DTYPE = torch.float32


def attach(model: Any, run: Run, steps: int | None = None) -> Any:
    """The model with `run.method` attached: what requires gradients is trained, in fp32.

    What is drawn at random comes from the run's seed. `steps` of the whole run are needed for AdaLoRA alone, whose
    ranks follow them. Raises ModelError when a target matches nothing, or rows are longer than the base's positions.
    """
    method, settings = run.method, model.config.get_text_config()
    refuse_positions(run, getattr(settings, "max_position_embeddings", None), learns_positions(model))
    if isinstance(method, Full):
        return model.requires_grad_(True)
    model.requires_grad_(False)
    torch.manual_seed(run.seed)
    if isinstance(method, Freeze):
        _unfreeze(model, method)
    elif isinstance(method, VIRTUAL_TOKENS):
        model = attach_virtual(model, run)
    elif isinstance(method, Bottleneck):
        bottleneck.insert(model, bottleneck.settings_of(method))
    else:
        model = attach_adapter(model, run, steps)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(TRAINED_DTYPE)
    return model


def _unfreeze(model: Any, method: Freeze) -> None:
    """Let the chosen parameters be trained. Norms are held in fp32 whether trained or not: frozen ones may get the fp32
    output of a trained embedding, and torch's LayerNorm takes no narrower weights than its input."""
    kinds = [(name, parameter, kind) for name, parameter, kind in parameter_kinds(model)]
    layers = model.config.get_text_config().num_hidden_layers
    chosen = set(unfrozen(method, [(name, kind) for name, _, kind in kinds], layers))
    for name, parameter, kind in kinds:
        parameter.requires_grad_(name in chosen)
        if kind == "norm":
            parameter.data = parameter.data.to(TRAINED_DTYPE)


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trained parameters by name, each tensor once (tied ones under their first name), and what the method knows
    besides: AdaLoRA's importances and ranks."""
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    budget = rank_budget(model)
    return state | budget.state() if budget else state


def load_trained_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Put back what `trained_state` gave. Raises ModelError unless the keys and shapes are exactly those."""
    if budget := rank_budget(model):
        state = budget.load(dict(state))
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    check_same(state, {name: p.shape for name, p in own.items()})
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])


def check_same(state: Mapping[str, torch.Tensor], shapes: dict[str, torch.Size]) -> None:
    """Raises ModelError unless the names and shapes of a commit's parameters are exactly `shapes`."""
    if shapes.keys() != state.keys():
        odd = sorted(shapes.keys() ^ state.keys())[:3]
        raise ModelError(f"the commit holds other parameters than this run trains, for example {odd}")
    for name, shape in shapes.items():
        if state[name].shape != shape:
            raise ModelError(f"{name} is {tuple(shape)} here and {tuple(state[name].shape)} in the commit")
