"""Optimizers by name, their parameter groups, and their state as plain tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ftray.config import Train
from ftray.errors import ArtefactError
from ftray.model.load import shape


def build_optimizer(model: nn.Module, train: Train) -> torch.optim.Optimizer:
    """The optimizer of `train.optimizer` over what requires gradients: matrices decay, all else does not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, rest = [p for p in trained if len(shape(p)) >= 2], [p for p in trained if len(shape(p)) < 2]
    groups = [{"params": matrices, "weight_decay": train.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    options: dict[str, Any] = {"lr": train.learning_rate, "betas": train.betas, "eps": train.epsilon}
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True, **options)
    import bitsandbytes as bnb

    kind = {
        "adamw_8bit": bnb.optim.AdamW8bit,
        "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
        "paged_adamw_32bit": bnb.optim.PagedAdamW32bit,
    }[train.optimizer]
    return kind(groups, **options)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by path, everything else by path): the optimizer's state without Python objects, so that a commit needs
    no pickle. A tensor that several parameters share (bitsandbytes' code books) is kept once, and the others name it.
    Hyperparameters are left out: the run file has them."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    seen: dict[int, str] = {}

    def flatten(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                flatten(f"{path}/{key}" if path else str(key), item)
        elif isinstance(value, Tensor) and value.numel() and value.data_ptr() in seen:
            plain[path] = {_SAME_AS: seen[value.data_ptr()]}
        elif isinstance(value, Tensor):
            seen[value.data_ptr()] = path
            tensors[path] = value.detach().cpu().contiguous()
        elif value is None or isinstance(value, int | float | str | bool):
            plain[path] = value
        else:
            raise TypeError(f"optimizer state {path} is a {type(value).__name__}, which a commit cannot hold")

    flatten("", optimizer.state_dict()["state"])
    return tensors, plain


_SAME_AS = "same_as"


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """Put back what `optimizer_state` gave."""
    state: dict[Any, Any] = {}
    for path, value in [*tensors.items(), *plain.items()]:
        if isinstance(value, dict):
            value = tensors[value[_SAME_AS]]
        index, *keys = path.split("/")
        at = state.setdefault(int(index), {})
        for key in keys[:-1]:
            at = at.setdefault(key, {})
        at[keys[-1]] = value
    whole = optimizer.state_dict()
    known = {i for group in whole["param_groups"] for i in group["params"]}
    if not state.keys() <= known:
        raise ArtefactError(f"the commit's optimizer state has {len(state)} parameters, this run has {len(known)}")
    optimizer.load_state_dict({**whole, "state": state})
