"""Attach a method to a base: which parameters are trained."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from ftray.config import LOW_RANK, Full, Run
from ftray.errors import ModelError
from ftray.model.targets import check_patterns, select

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
    check_patterns(method, select(method.targets, candidates))
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


def targets(wanted: Literal["all-linear"] | list[str], candidates: list[str]) -> list[str]:
    """Endings of module paths that PEFT shall adapt, each known to match. Raises ModelError that lists what could."""
    select(wanted, candidates)
    return sorted({path.rsplit(".", 1)[-1] for path in candidates}) if wanted == "all-linear" else list(wanted)


def _transposed(model: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(m, Conv1D) for m in model.modules())


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trained parameters by name, each tensor once (tied ones under their first name)."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def load_trained_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Put back what `trained_state` gave. Raises ModelError unless the keys and shapes are exactly those."""
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
