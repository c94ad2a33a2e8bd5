"""Adapters that PEFT puts on linear layers: LoRA and DoRA, AdaLoRA, VeRA, IA3."""

from __future__ import annotations

import warnings
from typing import Any, Literal

from torch import nn

from ftray.config import IA3, AdaLoRA, Run, VeRA
from ftray.errors import ModelError
from ftray.model.adalora import RankBudget
from ftray.model.targets import check_patterns, ia3_targets, select


def attach_adapter(model: Any, run: Run, steps: int | None) -> Any:
    """PEFT's model of `run.method` on a frozen base. Raises ModelError."""
    method = run.method
    if isinstance(method, AdaLoRA):
        config = _adalora_config(run, method, model, steps)
    elif isinstance(method, VeRA):
        config = _vera_config(run, method, model)
    elif isinstance(method, IA3):
        config = _ia3_config(run, method, model)
    else:
        config = lora_config(run, model)
    model = peft_model(model, config, run)
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):  # PEFT would copy every input to fp32 and autocast back again
            module.cast_input_dtype_enabled = run.train.precision != "bf16"
    if isinstance(method, AdaLoRA):
        model.rank_budget = RankBudget(model, method.orthogonality)
    return model


def peft_model(model: Any, config: Any, run: Run) -> Any:
    """`get_peft_model` without its warnings and without this machine's folder in what it saves."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The PEFT config's `base_model_name_or_path` was renamed")
        model = get_peft_model(model, config)
    model.peft_config["default"].base_model_name_or_path = run.model.path
    return model


def origin(run: Run) -> dict[str, Any]:
    """What every PEFT config says of the base."""
    return {"task_type": "CAUSAL_LM", "base_model_name_or_path": run.model.path, "revision": run.model.revision}


def lora_config(run: Run, model: nn.Module) -> Any:
    """PEFT's LoraConfig of a low-rank method on this model, with targets that exist."""
    from peft import LoraConfig

    method: Any = run.method
    candidates = linear_layers(model)
    check_patterns(method, select(method.targets, candidates))
    return LoraConfig(
        **origin(run),
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


def _adalora_config(run: Run, method: Any, model: nn.Module, steps: int | None) -> Any:
    from peft import AdaLoraConfig

    assert steps is not None, "AdaLoRA's ranks follow the steps of the whole run"
    start, settle = round(method.start * steps), round(method.settle * steps)
    before = max(start, 1)  # what no step has judged yet cannot be taken away
    if before >= steps - settle:
        raise ModelError(
            f"of {steps} steps, {before} come before ranks are taken away and {settle} after it, which leaves none",
            where="method.start and method.settle",
            hint="train more steps, or lower both shares",
        )
    return AdaLoraConfig(
        **origin(run),
        init_r=method.rank,
        target_r=method.target_rank,
        tinit=start,
        tfinal=settle,
        deltaT=method.every,
        beta1=method.sensitivity_decay,
        beta2=method.uncertainty_decay,
        orth_reg_weight=method.orthogonality,
        total_step=steps,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules=targets(method.targets, linear_layers(model)),
        fan_in_fan_out=_transposed(model),
    )


def _vera_config(run: Run, method: VeRA, model: nn.Module) -> Any:
    from peft import VeraConfig

    return VeraConfig(
        **origin(run),
        r=method.rank,
        vera_dropout=method.dropout,
        d_initial=method.initial,
        target_modules=targets(method.targets, linear_layers(model)),
        save_projection=True,  # drawn again, they could differ with another version of torch
        fan_in_fan_out=_transposed(model),
    )


def _ia3_config(run: Run, method: IA3, model: Any) -> Any:
    from peft import IA3Config

    family = model.config.get_text_config().model_type
    wanted, feedforward = ia3_targets(method, family, linear_layers(model))
    return IA3Config(
        **origin(run),
        target_modules=wanted,
        feedforward_modules=feedforward,
        fan_in_fan_out=_transposed(model),
    )


def linear_layers(model: nn.Module) -> list[str]:
    """Paths of the layers that can be adapted: all linear ones (GPT-2's Conv1D too) but the head."""
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
