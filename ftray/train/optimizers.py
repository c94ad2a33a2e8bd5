"""Optimizers by name, their parameter groups, and their state as plain tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ftray.config import Train
from ftray.errors import ArtefactError
from ftray.model.load import shape
from ftray.model.targets import block_of


class SGD(torch.optim.SGD):
    """torch's SGD with decoupled weight decay (Loshchilov and Hutter 2019), as all optimizers here have it."""

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if group["decay"] and parameter.grad is not None:
                        parameter.mul_(1 - group["lr"] * group["decay"])
        return super().step(closure)


def build_optimizer(model: nn.Module, train: Train) -> torch.optim.Optimizer:
    """The optimizer of `train.optimizer` over what requires gradients."""
    groups, rate = parameter_groups(model, train), train.learning_rate
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=rate, betas=train.betas, eps=train.epsilon, fused=True)
    if train.optimizer == "sgd":
        for group in groups:
            group["decay"] = group.pop("weight_decay")
        return SGD(groups, lr=rate, momentum=train.momentum)
    if train.optimizer == "adafactor":
        # A floor of 1 for the size of a matrix makes the rate absolute, as Adam's is: else what starts at zero (LoRA's
        # B) would move by a thousandth of it.
        return torch.optim.Adafactor(groups, lr=rate, eps=(None, 1.0))
    import bitsandbytes as bnb

    if train.optimizer == "lion":
        return bnb.optim.Lion(groups, lr=rate, betas=train.betas)
    kind = {
        "adamw_8bit": bnb.optim.AdamW8bit,
        "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
        "paged_adamw_32bit": bnb.optim.PagedAdamW32bit,
    }[train.optimizer]
    return kind(groups, lr=rate, betas=train.betas, eps=train.epsilon)


def parameter_groups(model: nn.Module, train: Train) -> list[dict[str, Any]]:
    """Groups of what requires gradients, for any optimizer: matrices decay, all else does not, and `factor` is what
    the rate of a group is multiplied by (see `set_rate`)."""
    factors = rate_factors(model, train.layer_decay)
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in sorted(trained, key=lambda p: len(shape(p)) < 2):  # stable: matrices first
        matrix, factor = len(shape(parameter)) >= 2, factors[parameter]
        decay = train.weight_decay if matrix else 0.0
        group = groups.setdefault((matrix, factor), {"params": [], "weight_decay": decay, "factor": factor})
        group["params"].append(parameter)
    return list(groups.values())


def rate_factors(model: nn.Module, layer_decay: float) -> dict[nn.Parameter, float]:
    """What the rate of each trained parameter is multiplied by (ULMFiT, Howard and Ruder 2018; ELECTRA's form): 1 above
    the blocks and in the last of them, `layer_decay` less for each block further down, and once more for embeddings."""
    blocks = 1 + max(
        [block for name, _ in model.named_parameters() if (block := block_of(name)) is not None], default=-1
    )
    embeddings = {p for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    factors = {}
    for name, parameter in model.named_parameters():
        block = block_of(name)
        if block is not None:
            factors[parameter] = layer_decay ** (blocks - 1 - block)
        else:
            factors[parameter] = layer_decay**blocks if parameter in embeddings else 1.0
    return factors


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


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
            tensors[path] = value.detach()
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
