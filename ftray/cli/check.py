"""`ftray check`: the resolved run, its arithmetic and its memory plan, without starting anything. No torch, no Ray."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftray.cli.words import count, facts, percent, size, some, table
from ftray.config import LOW_RANK, Full, Run, Source
from ftray.config.training import COMMIT_SECONDS, OWNERS
from ftray.errors import DataError
from ftray.manifest import is_local
from ftray.model.advice import Advice, cheapest_fit
from ftray.model.counts import targeted
from ftray.model.plan import Plan, make_plan
from ftray.model.positions import beyond
from ftray.model.shapes import Shapes
from ftray.model.source import find_shapes
from ftray.model.states import GIB, PLACES
from ftray.train.native import refuse_nvme
from ftray.train.schedule import warmup_steps


@dataclass(frozen=True)
class Found:
    """What stands behind one source of the run file."""

    key: str
    path: str
    files: int | None
    """None: not on this machine, so not looked for."""
    bytes: int = 0

    def text(self) -> str:
        if self.files is None:
            return f"{self.path} (read when the run starts)"
        if not self.files:
            return f"{self.path}: MISSING"
        return f"{self.path}: {some(self.files, 'file')}, {size(self.bytes)}"


@dataclass(frozen=True)
class Check:
    run: Run
    shapes: Shapes
    origin: str
    plan: Plan
    advice: Advice | None
    sources: list[Found]

    def to_json(self) -> dict[str, Any]:
        return {
            "run": self.run.dump(),
            "folder": self.run.folder,
            "batch": {
                "rows": self.run.train.batch_rows,
                "workers": self.run.workers.most,
                "micro_batch_rows": self.run.train.micro_batch_rows,
                "accumulation": self.run.accumulation,
                "text": batch_text(self.run),
            },
            "plan": self.plan.to_json() | {"config_from": self.origin},
            "advice": list(self.advice.overrides) if self.advice else [],
            "advice_instead": list(self.advice.instead.overrides) if self.advice and self.advice.instead else [],
            "data": [{"key": s.key, "path": s.path, "files": s.files, "bytes": s.bytes} for s in self.sources],
        }


def check(run: Run) -> Check:
    """Raises ModelError when the base is not to be found or the method does not fit it, ConfigError when what should go
    to NVMe has no place on this machine."""
    refuse_nvme(run)
    shapes, origin = find_shapes(run.model)
    return Check(run, shapes, origin, make_plan(run, shapes), cheapest_fit(run, shapes), find_sources(run))


def find_sources(run: Run) -> list[Found]:
    keyed = [(f"data.sources.{i}.path", source) for i, source in enumerate(run.data.sources)]
    keyed += [(f"data.held_out.{i}.path", source) for i, source in enumerate(run.data.held_out)]
    return [_find(key, source) for key, source in keyed]


def _find(key: str, source: Source) -> Found:
    path = source.path
    if path.startswith("embedded:"):
        from ftray.embedded import data_path

        file = data_path(path.removeprefix("embedded:"))
        return Found(key, path, 1, file.stat().st_size)
    if not is_local(path) or (source.reader == "datasets" and not os.path.exists(path)):
        return Found(key, path, None)
    plain = os.path.expanduser(path.removeprefix("file://"))
    hits = [plain] if os.path.exists(plain) else glob.glob(plain, recursive=True)
    files = [file for hit in hits for file in (Path(hit).rglob("*") if os.path.isdir(hit) else [Path(hit)])]
    files = [file for file in files if file.is_file() and not file.name.startswith((".", "_"))]
    return Found(key, path, len(files), sum(file.stat().st_size for file in files))


def require_data(check: Check) -> None:
    """Raises DataError that names every source whose files are missing."""
    if missing := [s for s in check.sources if s.files == 0]:
        raise DataError(
            "no such data: " + ", ".join(f"{s.key} {s.path}" for s in missing),
            where=f"run {check.run.name}",
            hint=f"paths are relative to the working directory, here {os.getcwd()}; or override: {missing[0].key}=…",
        )


# -------------------------------------------------------------------------------------------------------------- as text


def describe(check: Check) -> str:
    """What `ftray check` prints after the resolved run."""
    run, plan = check.run, check.plan
    pairs = [
        ("run", f"{run.name}, in {run.folder}"),
        ("batch", batch_text(run)),
        ("steps", steps_text(run)),
        ("model", model_text(check)),
        ("trained", trained_text(check)),
        ("learning", learning_text(run)),
    ]
    if plan.unquantized:
        pairs.append(("unquantized", unquantized_text(plan.unquantized)))
    lines = [source.text() for source in check.sources]
    if share := run.data.held_out_fraction:
        lines.append(f"{percent(share)} of the rows held out")
    pairs.append(("data", "\n".join(lines)))
    pairs.append(("memory", memory_text(check)))
    return f"{facts(pairs, indent=0)}\n\n{verdict(check)}"


def batch_text(run: Run) -> str:
    """The arithmetic of one step: rows = workers × micro-batches × rows of each, and what does not divide evenly."""
    if run.workers.elastic:
        sizes = run.workers.least, run.workers.most
        texts = [_batch_text(run, workers, run.accumulation_of(workers)) for workers in sizes]
        return f"{texts[0]}\nup to: {texts[1]}\n(rows of a step, and its loss, are the same with any number of workers)"
    return _batch_text(run, run.workers.least, run.accumulation)


def _batch_text(run: Run, workers: int, accumulation: int) -> str:
    rows, micro = run.train.batch_rows, run.train.micro_batch_rows
    most, least = -(-rows // workers), rows // workers
    batches = some(accumulation, "micro-batch", "micro-batches")
    head = f"{some(rows, 'row')} a step = {some(workers, 'worker')}"
    if rows == workers * accumulation * micro:
        return f"{head} × {batches} of {micro}"
    share = f"{most}" if most == least else f"{most} or {least}"
    each = f"{-(-most // accumulation)}" if most == least and most % accumulation == 0 else f"at most {micro}"
    uneven = "(the loss is a mean over target tokens, so uneven parts change nothing)"
    return f"{head} × {share} rows, in {batches} of {each}\n{uneven}"


def steps_text(run: Run) -> str:
    train, schedule = run.train, run.train.schedule
    if train.steps is None:
        steps, amount = None, f"{_epochs(train.epochs)}; steps are known once the rows are counted"
        if rows := _rows_at_most(run):
            steps = run.total_steps(rows)
            amount = f"{_epochs(train.epochs)} of at most {some(rows, 'row')}: at most {some(steps, 'step')}"
    else:
        steps, amount = train.steps, some(train.steps, "step")
    if steps is None and _is_share(schedule.warmup):
        warmup = f"{percent(schedule.warmup)} of the steps"
    else:
        warmup = some(warmup_steps(schedule, steps or 0), "step")
    final = train.learning_rate * schedule.final
    shape = schedule.name if schedule.name == "constant" else f"{schedule.name} to {final:g}"
    lines = [amount, f"rate up to {train.learning_rate:g} in {warmup}, then {shape}"]
    if steps is not None and warmup_steps(schedule, steps) >= steps:
        lines.append("the warm-up takes all of them, so the rate never reaches its peak: lower train.schedule.warmup")
    every = train.evaluate_every
    if run.data.held_out or run.data.held_out_fraction:
        lines.append("evaluation at the start and the end" + (f", and every {some(every, 'step')}" if every else ""))
    every = train.commit_every or train.evaluate_every
    at = f", and every {some(every, 'step')}" if every else ""
    late = "" if train.commit_every else f", and after {COMMIT_SECONDS / 60:g} minutes without one"
    lines.append(f"commit at the end{at}{late}")
    return "\n".join(lines)


def _epochs(epochs: float | None) -> str:
    return f"{epochs:g} epoch{'s' * (epochs != 1)}"


def _is_share(warmup: int | float) -> bool:
    return isinstance(warmup, float) and warmup < 1


def _rows_at_most(run: Run) -> int | None:
    """Rows of an epoch if every source has a `limit`: an upper bound, since bad rows are put aside."""
    limits = [source.limit for source in run.data.sources]
    if run.data.packing == "corpus" or not all(limits):
        return None
    return sum(round((source.limit or 0) * source.weight) for source in run.data.sources)


def model_text(check: Check) -> str:
    s = check.shapes
    lines = [
        f"{check.run.model.path}: {s.family}, {s.layers} layers of {s.hidden}, vocabulary {count(s.vocabulary)},"
        f" {count(s.parameters)} parameters",
        f"shape from {check.origin}",
        beyond(check.run, s.positions),
    ]
    return "\n".join(line for line in lines if line)


def trained_text(check: Check) -> str:
    run, plan, method = check.run, check.plan, check.run.method
    if isinstance(method, Full):
        return f"all {count(plan.trained)} parameters"
    text = f"{count(plan.trained)} of {count(plan.all_parameters)} parameters, {percent(plan.share)}: {method.name}"
    if isinstance(method, LOW_RANK):
        text += f", rank {method.rank}{' and others' * bool(method.rank_pattern)}, alpha {method.alpha:g}"
    if layers := targeted(run, check.shapes):
        names = list(dict.fromkeys(layer.path.rsplit(".", 1)[-1] for layer in layers))
        text += f",\non {some(len(layers), 'linear layer')}: {', '.join(names)}"
    return text


def learning_text(run: Run) -> str:
    """Optimizer and objective, and what is divided among the workers."""
    text = f"{run.objective.name} by {run.train.optimizer}"
    if run.train.optimizer in OWNERS["betas"]:
        text += ", β {:g} and {:g}".format(*run.train.betas)
    if (strategy := run.strategy) is None:
        return text
    text += f", ZeRO {strategy.zero}"
    for what, place in (("optimizer", strategy.offload_optimizer), ("weights", strategy.offload_parameters)):
        if place != "none":
            text += f", {what} {'on the host' if place == 'cpu' else 'on NVMe'}"
    return text


def unquantized_text(paths: tuple[str, ...]) -> str:
    """Layers that NF4 cannot hold, by name: `mlp.down_proj (5 layers)`."""
    numbers: dict[str, int] = {}
    for path in paths:
        name = ".".join(path.split(".")[-2:])
        numbers[name] = numbers.get(name, 0) + 1
    listed = ", ".join(f"{name} ({some(n, 'layer')})" for name, n in numbers.items())
    return f"{listed}: NF4 needs outputs that are multiples of 32 and inputs of 64"


def memory_text(check: Check) -> str:
    plan = check.plan
    places = [place for place in PLACES if plan.gib_on(place)]
    if len(places) == 1:
        rows: list[tuple[str, ...]] = [(item.name, _amount(item.bytes), item.how) for item in plan.items]
        rows.append(("total", _amount(round(plan.total_gib * GIB)), ""))
        head: tuple[str, ...] = ("what", "memory", "how")
    else:
        rows = [(item.name, _amount(item.bytes), item.place, item.how) for item in plan.items]
        rows += [("total", _amount(round(plan.gib_on(place) * GIB)), place, "") for place in places]
        head = ("what", "memory", "where", "how")
    note = f"one worker's, at most: micro-batches of {some(plan.tokens, 'token')}, every row as long as data.max_length"
    return "\n".join([note, table(head, rows, right=(1,)), *_changes(check)])


def _amount(amount: int) -> str:
    return f"{amount / GIB:,.2f} GiB" if amount >= 0.1 * GIB else size(amount)


def verdict(check: Check) -> str:
    """The last line of `ftray check`: whether the run can start as it is."""
    plan, missing = check.plan, [source.key for source in check.sources if source.files == 0]
    problems = [f"{', '.join(missing)}: no such data"] if missing else []
    if plan.fits is False:
        problems.append(f"{plan.total_gib:.2f} GiB does NOT fit {plan.limit_gib:g} GiB")
    if problems:
        return f"NOT ready: {'; '.join(problems)}"
    if plan.limit_gib is None:
        fits = f"takes {plan.total_gib:.2f} GiB a worker; set workers.gpu_memory_gib to see whether that fits"
    else:
        paged = plan.total_gib - plan.limit_gib
        fits = f"fits {plan.limit_gib:g} GiB" + (f", with {paged:.2f} GiB paged to the host" if paged > 0 else "")
    return f"ready: {fits}"


def _changes(check: Check) -> list[str]:
    """What makes a run fit that does not."""
    if check.plan.fits is not False:
        return []
    if check.advice is None:
        return ["no change of the batch, optimizer or method makes it fit: take a smaller base or a larger GPU"]
    lines = [f"the cheapest change that makes it fit, {_change(check.advice)}"]
    if check.advice.instead:
        lines.append(f"or, with adapters in place of full tuning, {_change(check.advice.instead)}")
    return lines


def _change(advice: Advice) -> str:
    host = advice.plan.gib_on("host")
    return (
        f"{advice.plan.total_gib:.2f} GiB"
        + (f" and {host:.2f} GiB of the host a worker" if host else "")
        + f": {' '.join(advice.overrides)}"
    )
