"""Combinations of a run file's keys that do not work: each with the reason and the nearest thing that does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ftray.config.methods import VIRTUAL_TOKENS, DoRA, Freeze, Full, LoRA
from ftray.config.training import BITSANDBYTES, OWNERS, SHAPED

if TYPE_CHECKING:
    from ftray.config.run import Run


def refusals(run: Run) -> Iterator[str]:
    """Why `run` cannot work, most basic reason first."""
    yield from _workers(run)
    yield from _batches(run)
    yield from _methods(run)
    yield from _optimizers(run)
    yield from _zero(run)
    yield from _objectives(run)
    yield from _idle(run)
    yield from _idle_sources(run)


def _workers(run: Run) -> Iterator[str]:
    workers = run.workers
    if workers.count is not None and (workers.min is not None or workers.max is not None):
        yield (
            "workers.count fixes their number, and workers.min and workers.max let it change; give one of both"
            " (workers.count=null takes it away)"
        )
    elif workers.elastic and (workers.min is None or workers.max is None):
        absent = "min" if workers.min is None else "max"
        yield f"workers.{absent} is not given: elastic workers need both workers.min and workers.max"
    elif workers.least > workers.most:
        yield f"workers.min {workers.least} is above workers.max {workers.most}"
    if isinstance(workers.gpus, float) and 0 < workers.gpus < 1 and workers.most > 1:
        yield (
            f"workers.gpus {workers.gpus:g} puts several of {workers.number} workers on one GPU, and NCCL refuses two"
            " that share one; set workers.gpus: 1, or workers.count: 1"
        )
    if workers.elastic and run.strategy and run.strategy.zero > 0:
        yield (
            f"ZeRO {run.strategy.zero} divides states among a number of workers that stays: with fewer, each would have"
            " to hold more than was planned for; set workers.count, or leave `strategy` out with an adapter method"
        )


def _batches(run: Run) -> Iterator[str]:
    train, workers = run.train, run.workers
    if train.batch_rows < workers.most:
        yield (
            f"train.batch_rows {train.batch_rows} leaves some of {workers.most} workers without a row in every step;"
            f" raise train.batch_rows or lower workers.{'max' if workers.elastic else 'count'}"
        )
    warmup = train.schedule.warmup
    if train.steps is not None and warmup >= train.steps:
        yield (
            f"train.schedule.warmup {warmup:g} is not below train.steps {train.steps}, so the rate would never reach"
            " its peak; lower it, or give it as a share of the steps, such as 0.03"
        )
    if not (run.data.held_out or run.data.held_out_fraction):
        for key in ("evaluate_every", "evaluate_rows", "early_stopping"):
            if getattr(train, key):
                yield f"train.{key} needs held-out rows: set data.held_out or data.held_out_fraction"


def _methods(run: Run) -> Iterator[str]:
    method, train = run.method, run.train
    if run.model.random_weights and not isinstance(method, Full):
        yield f"model.random_weights with method {method.name!r} would adapt noise; pretrain with method `full`"
    if isinstance(method, VIRTUAL_TOKENS) and run.data.packing == "off":
        yield (
            f"method {method.name} puts virtual tokens before every packed sequence and has no padded layout; use"
            " data.packing: batch, which gives the same losses"
        )
    if isinstance(method, VIRTUAL_TOKENS) and train.layer_decay != 1:
        yield f"train.layer_decay has nothing to act on: method {method.name} trains no blocks; set it to 1"


def _optimizers(run: Run) -> Iterator[str]:
    method, train = run.method, run.train
    if train.optimizer != "mezo":
        return
    if method.name == "adalora":
        yield "adalora judges ranks by their gradients, and mezo has none; use method lora, or optimizer adamw"
    if getattr(method, "dropout", 0):
        yield (
            "optimizer mezo compares two losses, which dropout would blur more than the step between them, so both"
            " passes leave it out; set method.dropout: 0"
        )
    if train.neftune:
        yield (
            "optimizer mezo compares two losses without noise, so train.neftune would do nothing; leave it out, or use"
            " optimizer adamw"
        )
    if train.gradient_checkpointing:
        yield "optimizer mezo has no backward pass, so train.gradient_checkpointing would do nothing; set it to false"
    if run.strategy and run.strategy.zero:
        yield (
            "optimizer mezo has neither gradients nor states that ZeRO could divide; leave `strategy` out: workers then"
            " exchange one number a step"
        )


def _zero(run: Run) -> Iterator[str]:
    strategy, method, optimizer = run.strategy, run.method, run.train.optimizer
    if strategy is None:
        return
    if strategy.zero == 3 and method.quantized:
        yield (
            "ZeRO 3 cannot divide a base in NF4 (DeepSpeed leaves quantized weights out of it); use strategy.zero: 2,"
            f" with the base on each worker, or method {'lora' if method.name == 'qlora' else 'lora or dora'}"
        )
    if strategy.zero == 3 and not isinstance(method, Full | Freeze | LoRA | DoRA):
        yield f"method {method.name} does not work on weights that ZeRO 3 divides; use strategy.zero: 2, or method lora"
    if strategy.zero > 0 and method.name == "adalora":
        yield (
            "adalora judges every rank by its whole gradient, which ZeRO 1 to 3 divide; use method lora, or leave"
            " `strategy` out"
        )
    if strategy.offload_parameters != "none" and strategy.zero != 3:
        yield (
            f"strategy.offload_parameters needs strategy.zero: 3, here {strategy.zero}: below it, every worker holds"
            " the weights; offload_optimizer works from zero: 1 on"
        )
    if strategy.offload_optimizer != "none" and strategy.zero == 0:
        yield "strategy.offload_optimizer needs divided optimizer states: set strategy.zero to 1, 2 or 3"
    if strategy.offload_optimizer == "nvme" and strategy.zero != 3:
        yield f"offload to NVMe is ZeRO 3's alone, here {strategy.zero}; use offload_optimizer: cpu, or zero: 3"
    nvme = "nvme" in (strategy.offload_optimizer, strategy.offload_parameters)
    if nvme and not strategy.nvme_path:
        yield "offload to nvme needs strategy.nvme_path, a folder on a fast local disk"
    if strategy.nvme_path and not nvme:
        yield "strategy.nvme_path is set, but nothing is offloaded to nvme; set offload_optimizer: nvme or leave it out"
    if strategy.offload_parameters == "nvme" and strategy.offload_optimizer == "none":
        yield (
            "weights on NVMe with optimizer states on the device save nothing where it counts; set"
            " strategy.offload_optimizer to nvme or cpu"
        )
    if optimizer in BITSANDBYTES and strategy.zero > 0:
        yield (
            f"ZeRO divides the states that {optimizer} would hold in 8 bits or page; use train.optimizer: adamw, with"
            " strategy.offload_optimizer: cpu to keep them off the device"
        )
    if strategy.offload_optimizer != "none" and optimizer not in ("adamw", *BITSANDBYTES):
        yield f"offloaded states are updated by DeepSpeed's CPU Adam, not by {optimizer}; use train.optimizer: adamw"
    if optimizer == "adafactor" and strategy.zero > 0:
        yield (
            "adafactor's row and column states need whole matrices, and ZeRO 1 to 3 flatten and divide them; use adamw"
            " with strategy.offload_optimizer: cpu"
        )


def _objectives(run: Run) -> Iterator[str]:
    sources = {f"data.sources.{i}": s for i, s in enumerate(run.data.sources)}
    sources |= {f"data.held_out.{i}": s for i, s in enumerate(run.data.held_out)}
    preference = run.objective.name == "dpo"
    for key, source in sources.items():
        if preference != (source.format.name == "preference"):
            yield (
                f"{key} has the format {source.format.name}, and objective {run.objective.name} takes"
                f" {'`preference` rows: prompt, chosen, rejected' if preference else 'all others; set objective: dpo'}"
            )
    if not preference:
        return
    if run.data.packing != "batch":
        yield f"objective dpo keeps a pair's two completions together; set data.packing: batch, not {run.data.packing}"
    if run.model.random_weights:
        yield (
            "objective dpo compares with a model that already speaks, and model.random_weights has none; train it with"
            " objective: sft first"
        )
    if run.train.label_smoothing:
        yield "train.label_smoothing smooths tokens, and dpo's loss is of pairs; use objective.label_smoothing"
    divided = run.strategy is not None and run.strategy.zero == 3
    if divided and not run.method.frozen_base and not run.objective.reference_free:  # type: ignore[union-attr]
        yield (
            "dpo would need a second, frozen copy of weights that ZeRO 3 divides; use method lora, whose reference is"
            " the base itself, strategy.zero: 2, or objective.reference_free: true"
        )


# ---------------------------------------------------------------------------------------------- what would do nothing


def _idle(run: Run) -> Iterator[str]:
    """Keys that were changed, and that nothing looks at because of another key."""
    train, strategy = run.train, run.strategy
    for key, owners in OWNERS.items():
        if train.optimizer not in owners and _is_set(train, key) and getattr(train, key) is not None:
            yield (
                f"train.{key} does nothing with optimizer {train.optimizer}; leave it out (which is"
                f" {_usual(train, key)}), or use optimizer {owners[0]}"
            )
    for key, names in SHAPED.items():
        if train.schedule.name not in names and _is_set(train.schedule, key):
            yield (
                f"train.schedule.{key} does nothing with schedule {train.schedule.name}; leave it out (which is"
                f" {_usual(train.schedule, key)}), or use schedule {' or '.join(names)}"
            )
    if strategy is None:
        return
    for key in ("pin_memory", "bucket_elements", "keep_elements"):
        if strategy.zero == 0 and _is_set(strategy, key):
            yield f"strategy.{key} does nothing with strategy.zero: 0, which divides nothing; leave `strategy` out"
    if strategy.zero < 3 and _is_set(strategy, "keep_elements"):
        yield (
            f"strategy.keep_elements is of weights that ZeRO 3 gathers, here {strategy.zero}: leave it out (which is"
            f" {_usual(strategy, 'keep_elements')}), or set strategy.zero: 3"
        )
    if strategy.offload_optimizer == strategy.offload_parameters == "none" and _is_set(strategy, "pin_memory"):
        yield "strategy.pin_memory is of what is offloaded, and nothing is; leave it out, or set offload_optimizer: cpu"


def _idle_sources(run: Run) -> Iterator[str]:
    groups = {"data.sources": run.data.sources, "data.held_out": run.data.held_out}
    groups |= {"evaluate.rows": run.evaluate.rows} if run.evaluate else {}
    for group, sources in groups.items():
        for i, source in enumerate(sources):
            if group != "data.sources" and _is_set(source, "weight"):
                yield f"{group}.{i}.weight mixes what is trained on; here every row counts once: leave it out"
            for key in ("split", "subset"):
                if source.is_file and _is_set(source, key):
                    yield (
                        f"{group}.{i}.{key} is of Hugging Face data sets, and {source.path} is read as a file; leave it"
                        " out, or set reader: datasets"
                    )


def _is_set(section: Any, key: str) -> bool:
    """It differs from its default: a resolved run has every key."""
    return getattr(section, key) != type(section).model_fields[key].default


def _usual(section: Any, key: str) -> str:
    default = type(section).model_fields[key].default
    return "null" if key == "betas" else f"{default:g}" if isinstance(default, float) else f"{default}"
