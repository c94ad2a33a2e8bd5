"""Attach a method to a base: which parameters are trained."""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from torch import nn

from ftray.config import LOW_RANK, Full, Run
from ftray.errors import ModelError

ADAPTER_DTYPE = torch.float32


def attach(model: Any, run: Run) -> Any:
    """The model with `run.method` attached: what requires gradients is trained, in fp32.

    Fresh adapters are drawn from the run's seed. Raises ModelError when a target matches nothing.
    """
    method = run.method
    if isinstance(method, Full):
        return model.requires_grad_(True)
    assert isinstance(method, LOW_RANK)
    from peft import get_peft_model

    torch.manual_seed(run.seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The PEFT config's `base_model_name_or_path` was renamed")
        model = get_peft_model(model.requires_grad_(False), lora_config(run, model))
    model.peft_config["default"].base_model_name_or_path = run.model.path  # PEFT put this machine's folder there
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(ADAPTER_DTYPE)
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):  # PEFT would copy every input to fp32 and autocast back again
            module.cast_input_dtype_enabled = run.train.precision != "bf16"
    return model


def lora_config(run: Run, model: nn.Module):
    """PEFT's LoraConfig of a low-rank method on this model, with targets that exist."""
    from peft import LoraConfig

    method: Any = run.method
    candidates = linear_layers(model)
    _check_patterns(method, candidates)
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=run.model.path,
        revision=run.model.revision,
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules=targets(method.targets, candidates),
        use_rslora=method.rslora,
        use_dora=method.name in ("dora", "qdora"),
        rank_pattern=dict(method.rank_pattern),
        alpha_pattern=dict(method.alpha_pattern),
        fan_in_fan_out=_transposed(model),
    )


def linear_layers(model: nn.Module) -> list[str]:
    """Paths of the layers that a low-rank method can adapt: all linear ones (GPT-2's Conv1D too) but the head."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()  # type: ignore[operator]
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]


def targets(wanted: str | list[str], candidates: list[str]) -> list[str]:
    """Endings of module paths that PEFT shall adapt, each known to match. Raises ModelError that lists what could."""
    endings = sorted({path.rsplit(".", 1)[-1] for path in candidates})
    if wanted == "all-linear":
        return endings
    for name in wanted:
        if not any(path == name or path.endswith(f".{name}") for path in candidates):
            raise ModelError(
                f"{name!r} matches no linear layer of this base",
                where="method.targets",
                hint=f"layers that exist: {', '.join(endings)}; or `all-linear`",
            )
    return list(wanted)


def _check_patterns(method: Any, candidates: list[str]) -> None:
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(method, key):
            # PEFT's own rule: the expression must match the end of the path, from a dot or the start
            if not any(re.match(rf"(.*\.)?({pattern})$", path) for path in candidates):
                raise ModelError(
                    f"{pattern!r} matches no linear layer of this base",
                    where=f"method.{key}",
                    hint=f"paths look like {candidates[0]!r}",
                )


def _transposed(model: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(m, Conv1D) for m in model.modules())


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trained parameters by name, each tensor once (tied ones under their first name)."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def load_trained_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Put back what `trained_state` gave. Raises ModelError unless the keys and shapes are exactly those."""
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if own.keys() != state.keys():
        odd = sorted(own.keys() ^ state.keys())[:3]
        raise ModelError(f"the commit holds other parameters than this run trains, for example {odd}")
    with torch.no_grad():
        for name, parameter in own.items():
            if parameter.shape != state[name].shape:
                raise ModelError(
                    f"{name} is {tuple(parameter.shape)} here and {tuple(state[name].shape)} in the commit"
                )
            parameter.copy_(state[name])
