"""Which runs can be lanes of one base (`ftray.train.lanes`). No torch."""

from __future__ import annotations

from typing import Any

from ftray.config import LOW_RANK, DoRA, QDoRA, Run


def refusal(run: Run) -> str | None:
    """Why `run` cannot be a lane; None if it can."""
    method, train = run.method, run.train
    if not isinstance(method, LOW_RANK):
        return f"method {method.name} trains something else than low-rank rows"
    dropped = method.dropout > 0
    reasons = [
        (train.optimizer != "adamw", "train.optimizer is not adamw"),
        (run.objective.name != "sft", "objective is not sft"),
        (run.strategy is not None and run.strategy.zero > 0, "strategy divides the model among workers"),
        (run.workers.most > 1, "it wants several workers"),
        (run.model.random_weights, "the base has random weights of its own"),
        (run.data.packing == "off", "data.packing is off"),
        (train.neftune is not None, "train.neftune is set"),
        (train.layer_decay != 1, "train.layer_decay is set"),
        (dropped and isinstance(method, DoRA | QDoRA), "DoRA with dropout puts every token through the base twice"),
        (dropped and train.gradient_checkpointing, "dropout with train.gradient_checkpointing would be drawn twice"),
    ]
    return next((reason for applies, reason in reasons if applies), None)


def base_of(run: Run) -> dict[str, Any]:
    """What runs must have in common to be lanes of one base."""
    quantized = run.method.quantized
    return {
        "model.path": run.model.path,
        "model.revision": run.model.revision,
        "model.trust_remote_code": run.model.trust_remote_code,
        "method, quantized": quantized,
        "method.double_quantization": run.method.double_quantization if quantized else None,  # type: ignore[union-attr]
        "train.precision": run.train.precision,
        "train.gradient_checkpointing": run.train.gradient_checkpointing,
    }


def difference(a: Run, b: Run) -> str | None:
    """The key in which two runs need different bases; None if they may share one."""
    mine, other = base_of(a), base_of(b)
    return next((key for key, value in mine.items() if other[key] != value), None)
