"""The loop: one story of one step, for every method. It runs on each Ray Train worker, and as well without Ray.

A step takes the next rows of the order, adds up the gradients of their target tokens over micro-batches and workers,
divides by the number of these tokens (of pairs, for preferences), clips, and moves the weights. Which rows, which rate
and which dropout are pure functions of (seed, step), so a run that is taken up again goes exactly where it would have
gone.
"""

from __future__ import annotations

import contextlib
import math
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ftray.config import Run
from ftray.config.training import COMMIT_SECONDS
from ftray.data.order import Order, assign
from ftray.data.prepared import PreparedData, Rows
from ftray.data.tokenizer import load_tokenizer
from ftray.errors import ArtefactError, RunError
from ftray.model.ending import unlearned_end
from ftray.model.load import elements, load_base
from ftray.model.methods import attach
from ftray.storage import reached
from ftray.train import artefact, commits
from ftray.train.commits import Commit, Progress
from ftray.train.dpo import PreferenceLoss
from ftray.train.feed import Feed, StepRows
from ftray.train.identity import identity, refuse_other_run
from ftray.train.lease import lease
from ftray.train.loss import TargetLoss
from ftray.train.metrics import MetricsLog
from ftray.train.schedule import rate_factor
from ftray.train.seeds import mix
from ftray.train.strategy import Strategy, choose, divided_weights
from ftray.train.world import World
from ftray.train.writer import Writer


class Channel(Protocol):
    """What a worker tells, and what it is asked."""

    def emit(self, event: dict[str, Any]) -> None: ...
    def stop_requested(self) -> bool: ...


_EARLY = "early stopping"
_HeldOut = tuple[float, int, dict[str, float]]
"""Mean loss, target tokens, what else the objective tells."""


@dataclass
class Equipment:
    """What the loop of a run works with: a model of its own, or a lane of one that many runs share."""

    strategy: Strategy
    objective: TargetLoss | PreferenceLoss
    trained: int
    """Parameters that are trained."""
    parameters: int
    unquantized: list[str]
    """Linear layers that NF4 could not hold."""
    unlearned_end: Callable[[int], int]
    """Of an end token: see `ftray.model.ending`."""
    lend: Callable[[], AbstractContextManager[Any]]
    """The model with the method attached, to write the artefact with."""
    base_losses: dict[Any, _HeldOut] = field(default_factory=dict)
    """The base's own on held-out rows, found once by whoever comes first among those that share it …"""
    base_lock: threading.Lock = field(default_factory=threading.Lock)
    """… while it holds this."""
    aside: Callable[[], AbstractContextManager[Any]] | None = None
    """Commits are waited for in it: others who share the base go on. None: they are written beside the loop."""


Equip = Callable[[Run, World, int], Equipment]
"""From a run and the number of its steps."""


def train_worker(
    run: Run, data: PreparedData, world: World, channel: Channel, *, restarts: int = 0, equip: Equip | None = None
) -> dict[str, Any]:
    """Train as one worker of `world`, from the newest commit on; returns the summary (every worker the same one).

    `restarts` is how often the group of workers was started again because one was lost. `equip` gives it its place on a
    base that it shares; None: a model of its own. Raises RunError when too many steps in a row had no finite loss,
    UserError for what the user can mend.
    """
    with reached(run.folder, lasting=True), lease(run.folder) if world.is_first else contextlib.nullcontext():
        worker = _Worker(run, data, world, channel, equip or _alone)
        worker.resume()
        if restarts:
            again = {1: "again", 2: "for the third time"}.get(restarts, f"for the {restarts + 1}th time")
            worker.warn(f"a worker was lost; the group was started {again}")
        worker.train()
        return worker.finish()


def _alone(run: Run, world: World, steps: int) -> Equipment:
    """A model of the run's own."""
    base, unquantized = load_base(run, world.device, divided_weights(run, world))
    model = attach(base, run, steps).train()  # transformers loads in evaluation mode
    if run.train.gradient_checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
    objective: TargetLoss | PreferenceLoss = (
        PreferenceLoss(run, model)
        if run.objective.name == "dpo"
        else TargetLoss(model, run.train.label_smoothing, run.train.neftune)
    )
    return Equipment(
        strategy=choose(run, model, objective, world),
        objective=objective,
        trained=trained_count(model),
        parameters=parameter_count(model),
        unquantized=unquantized,
        unlearned_end=partial(unlearned_end, base),
        lend=lambda: contextlib.nullcontext(model),
    )


class _Worker:
    """One worker's state; `train` is the loop."""

    def __init__(self, run: Run, data: PreparedData, world: World, channel: Channel, equip: Equip) -> None:
        self.run, self.data, self.world, self.channel = run, data, world, channel
        self.log: MetricsLog | None = None
        self.writer = Writer(run.folder, self.warn)
        self._unlogged: list[dict[str, Any]] = []
        self.tokenizer = load_tokenizer(run.model, run.data.chat_template)
        self.identity = identity(run, self.data.digest)
        # read before the model loads: a folder of another run is refused at once
        self.found = commits.latest(run.folder, self.warn)
        if self.found:
            refuse_other_run(self.found.identity, self.identity, run.folder)
        rows = data.train
        self.order = Order(run.seed, rows.sizes, rows.weights)
        self.steps = run.total_steps(self.order.rows_per_epoch)
        self.equipment = equip(run, world, self.steps)
        self.strategy, self.objective = self.equipment.strategy, self.equipment.objective
        self.state_memory: dict[str, int] = {}
        self.feed = Feed(
            rows,
            self.order,
            world,
            batch_rows=run.train.batch_rows,
            micro_batch_rows=run.train.micro_batch_rows,
            pad_id=self.tokenizer.pad_token_id,
            packed=run.data.packing != "off",
            per_row=self.objective.per_row,
            virtual_tokens=run.method.virtual_tokens,
            prefix_tokens=run.method.prefix_tokens,
        )
        self.progress = Progress()
        self.committed: int | None = None
        self.committed_at = time.monotonic()
        """When the last commit began to count, or the loop began."""
        self.overdue = False
        """Rank 0 has not committed for long; all workers know it, or none."""

    # ------------------------------------------------------------------------------------------------------- resuming

    def resume(self) -> None:
        """Go on from the commit that was found, if any."""
        self.resumed_from: int | None = None
        if self.found:
            self.strategy.load(self.found)
            self.progress = self.found.progress
            self.committed = self.resumed_from = self.progress.step
            if self.progress.finished == _EARLY and not self._stops_early():
                self.progress.finished = None  # it has more patience now
        self.found, self.first_step = None, self.progress.step
        if self.world.is_first:
            self.log = MetricsLog(self.run.folder, self.progress.metrics_bytes)
            for warning in self._unlogged:
                self.log.write(warning)
        self.emit(
            kind="start",
            steps=self.steps,
            step=self.progress.step,
            batch_rows=self.run.train.batch_rows,
            workers=self.world.size,
            accumulation=-(-self.run.train.batch_rows // (self.world.size * self.run.train.micro_batch_rows)),
            trainable_parameters=self.equipment.trained,
            parameters=self.equipment.parameters,
            unquantized=self.equipment.unquantized,
            device=str(self.world.device),
        )
        if self.resumed_from is not None:
            self.emit(kind="resume", step=self.resumed_from)
            self._forget_lost_best()
        elif alike := self._unlearned_end():
            self.warn(
                f"answers may not end: the base never learned {self.tokenizer.eos_token!r}, whose row in the frozen"
                f" output head is that of {alike:,} other tokens; full tuning trains it, or end completions in text"
                " that the base knows, and name it in evaluate.decoding.stop and in requests"
            )

    def _unlearned_end(self) -> int:
        """0 where the run file names another end."""
        evaluate = self.run.evaluate
        named = evaluate is not None and bool(evaluate.decoding.stop)
        return 0 if named else self.equipment.unlearned_end(self.tokenizer.eos_token_id)

    def _forget_lost_best(self) -> None:
        """A best commit that is gone (set aside, or not kept by the part before) would be none to make the artefact of:
        the best is looked for among those to come."""
        progress, best = self.progress, self.progress.best_step
        if not self.run.train.keep_best or progress.finished or best in (None, progress.step):
            return
        gone = self.world.is_first and not commits.counts(commits.place_of(self.run.folder, best))
        if self.world.sum(float(gone))[0]:
            self.warn(f"the commit of the best step, {best:,}, is gone; the best is looked for anew from here")
            progress.best_loss = progress.best_step = None

    # ------------------------------------------------------------------------------------------------------- the loop

    def train(self) -> None:
        progress = self.progress
        upcoming = self.feed.steps(progress.cursor, self.steps - progress.step)
        self.committed_at, stop = time.monotonic(), False
        with contextlib.closing(upcoming), self.writer:  # type: ignore[type-var]
            while not progress.finished:
                self.written()
                if self._evaluation_due():
                    self.evaluate()
                    stop = self.world.sum(float(self.channel.stop_requested()))[0] > 0 or stop
                if self._stops_early():
                    progress.finished = _EARLY
                if progress.step >= self.steps:
                    progress.finished = "finished"
                if progress.finished or stop or self._commit_due():
                    self.commit(wait=bool(progress.finished) or stop)
                if progress.finished or stop:
                    break
                stop = self.step(upcoming)

    def _stops_early(self) -> bool:
        early = self.run.train.early_stopping
        return early is not None and self.progress.since_best >= early.patience

    def step(self, upcoming: Iterator[StepRows]) -> bool:
        """One optimizer step, which takes as long as its rows are waited for too. True when the run was asked to
        stop."""
        started, rows = time.perf_counter(), next(upcoming)
        progress, run = self.progress, self.run
        rate = run.train.learning_rate * rate_factor(run.train.schedule, progress.step, self.steps)
        seeds = [mix(run.seed, progress.step, self.world.rank, i) for i in range(len(rows.micro_batches))]
        sums = self.strategy.gradients(rows.micro_batches, rows.divisor, seeds)
        losses = torch.stack(sums).tolist()
        if progress.step <= self.first_step + 1:  # in the middle of a step, gradients and all; the first makes states
            self.state_memory = self.strategy.held()
        wishes = float(self.channel.stop_requested()), float(self._overdue())
        loss_sum, stop, overdue, *taken = self.world.sum(sum(losses), *wishes, *self.objective.take())
        self.overdue = overdue > 0
        loss = loss_sum / rows.divisor
        norm = self.strategy.update(rate, apply=math.isfinite(loss))
        if finite := math.isfinite(loss) and math.isfinite(norm):
            progress.skipped_in_a_row = 0
            progress.last_loss = loss
        progress.step += 1
        progress.cursor = rows.cursor[1]
        progress.target_tokens += rows.target_tokens
        seconds = time.perf_counter() - started
        progress.train_seconds += seconds
        if not finite:
            self._skip(rows, losses, loss, norm)
        self.emit(
            kind="step",
            step=progress.step,
            epoch=progress.cursor / self.order.rows_per_epoch,
            cursor=list(rows.cursor),
            loss=loss,
            **self.objective.figures(taken),
            learning_rate=rate,
            grad_norm=norm,
            target_tokens=rows.target_tokens,
            tokens=rows.tokens,
            seconds=seconds,
            target_tokens_per_second=rows.target_tokens / seconds,
            skipped=progress.skipped,
            time=time.time(),
        )
        return stop > 0

    def _skip(self, rows: StepRows, losses: list[float], loss: float, norm: float) -> None:
        """Count a step that changed nothing; raise RunError after too many in a row, naming the rows."""
        progress = self.progress
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        mine = [
            ([self.data.train.provenance(int(i)) for i in ids], math.isfinite(value))
            for ids, value in zip(rows.row_ids, losses, strict=True)
        ]
        told = [each for part in self.world.gather(mine) for each in part]
        bad = [names for names, finite in told if not finite]  # none: a gradient is to blame
        names = [name for names in bad or [names for names, _ in told] for name in names]
        reason = f"loss {loss:g}" if not math.isfinite(loss) else f"gradient norm {norm:g}"
        self.emit(kind="skip", step=progress.step, rows=names, reason=reason)
        if progress.skipped_in_a_row > self.run.train.max_skipped:
            raise RunError(
                f"{progress.skipped_in_a_row} steps in a row had no finite loss or gradient ({reason}); rows of the"
                f" last one: {', '.join(names[:8])}{' …' if len(names) > 8 else ''}",
                where=f"step {progress.step}",
                hint="look at these rows, lower train.learning_rate, raise train.max_skipped; the last commit is whole",
            )

    # ----------------------------------------------------------------------------------------------------- evaluation

    def _evaluation_due(self) -> bool:
        progress, every = self.progress, self.run.train.evaluate_every
        if self.data.held_out is None or progress.evaluated_at == progress.step:
            return False
        at_ends = progress.step == 0 or progress.step >= self.steps
        return at_ends or (every is not None and progress.step % every == 0)

    def evaluate(self) -> None:
        """Mean loss on the held-out rows, over all workers; keeps track of the best step, and of whether the loss still
        falls. Before the first step it is the base's own, without virtual tokens; all other methods start from it."""
        started, progress = time.perf_counter(), self.progress
        assert self.data.held_out is not None
        loss, targets, figures = self._held_out_loss(self.data.held_out)
        progress.evaluated_at = progress.step
        if progress.step == 0:
            progress.base_loss = loss
        elif math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss):
            progress.best_loss, progress.best_step = loss, progress.step
        margin = self.run.train.early_stopping.min_improvement if self.run.train.early_stopping else 0.0
        if math.isfinite(loss) and (progress.to_beat is None or loss < progress.to_beat - margin):
            progress.to_beat, progress.since_best = loss, 0
        else:
            progress.since_best += 1
        progress.final_loss = loss
        self.emit(
            kind="evaluation",
            step=progress.step,
            loss=loss,
            **figures,
            target_tokens=targets,
            trained_tokens=progress.target_tokens,
            seconds=time.perf_counter() - started,
        )

    def _held_out_loss(self, rows: Rows) -> _HeldOut:
        ids = np.arange(min(len(rows), self.run.train.evaluate_rows or len(rows)))
        if self.progress.step > 0:
            return self._measured(rows, ids, base=False)
        known, key = self.equipment.base_losses, (self.data.digest, len(ids))
        with self.equipment.base_lock:
            if key not in known:
                known[key] = self._measured(rows, ids, base=True)
            return known[key]

    def _measured(self, rows: Rows, ids: np.ndarray, base: bool) -> _HeldOut:
        micro = self.run.train.micro_batch_rows  # rows of like length together, whether padded or not
        mine = assign(ids, rows.lengths[ids], self.world.size, micro, padded=True)[self.world.rank]
        batches = (self.feed.collate([rows[int(i)] for i in few]).to(self.world.device) for few in mine)
        total = self.strategy.loss(batch.bare or batch if base else batch for batch in batches)
        total, *taken = self.world.sum(total, *self.objective.take())
        targets = int(rows.target_counts[ids].sum())
        if self.objective.per_row:
            return total / len(ids), targets, self.objective.figures(taken)
        return total / targets, targets, {"perplexity": math.exp(min(total / targets, 700.0))}

    # -------------------------------------------------------------------------------------------------------- commits

    def _commit_due(self) -> bool:
        progress, train = self.progress, self.run.train
        if progress.step == 0 or self.committed == progress.step:
            return False
        if train.keep_best and progress.best_step == progress.step:
            return True
        if train.commit_every:
            return progress.step % train.commit_every == 0
        return progress.evaluated_at == progress.step or self.overdue

    def _overdue(self) -> bool:
        """Rank 0's wish for a commit. One that is still being written is waited for by no step."""
        late = time.monotonic() - self.committed_at >= COMMIT_SECONDS
        return late and self.world.is_first and not self.writer.busy

    def commit(self, *, wait: bool) -> None:
        """Take a commit, after every worker has come here, and begin to write it; with `wait` it counts at the end.
        Then those that need not stay are removed."""
        self.world.barrier()
        self.written(wait=True)  # the one before
        state = self.strategy.state()
        if not self.world.is_first:
            if state:
                state.pass_through()
        else:
            assert self.log
            assert state
            self.progress.metrics_bytes = self.log.length()
            train, step = self.run.train, self.progress.step
            best = self.progress.best_step if train.keep_best else None
            prune = partial(commits.prune, self.run.folder, newest=step, keep_last=train.keep_last, best=best)
            self.writer.begin(Commit(self.progress, state, self.identity), before=self.log.keep, after=prune)
            aside = self.equipment.aside
            if wait or aside:
                with aside() if aside else contextlib.nullcontext():
                    self.written(wait=True)
        self.world.barrier()
        self.committed = self.progress.step

    def written(self, *, wait: bool = False) -> None:
        """Tell of the commit under way once it counts. Raises RunError where it could not be written."""
        if done := self.writer.done(wait=wait):
            step, where = done
            self.committed_at = time.monotonic()
            self.emit(kind="commit", step=step, folder=where)

    # ------------------------------------------------------------------------------------------------------ finishing

    def finish(self) -> dict[str, Any]:
        """After the last step: the artefact, of the best commit or the last. Returns the summary."""
        progress = self.progress
        reason = progress.finished or "stopped"
        summary = self._summary(reason)
        if progress.finished:
            frozen = self.strategy.frozen()
            if self.world.is_first:
                self._leave_artefact(summary, frozen)
            else:
                artefact.pass_frozen(self.run, frozen)
        self.emit(kind="end", reason=reason)
        if self.log:
            self.log.close()
        self.world.barrier()
        self.strategy.close()
        return summary

    def _leave_artefact(self, summary: dict[str, Any], frozen: Iterable[tuple[str, Tensor]]) -> None:
        """Write the artefact and tell the summary what it is. Where the best commit is lost, an artefact of that step
        which is there already stays; else it is of the last."""
        progress, folder = self.progress, self.run.folder
        step = progress.meant(self.run.train.keep_best)
        trained: Mapping[str, Tensor] | None = None
        try:
            trained = commits.read(commits.place_of(folder, step)).state.model
        except ArtefactError as error:
            if step == progress.step:
                raise
            lost = f"the commit of the best step, {step:,}, is lost ({error.what})"
            if artefact.step_and_loss(folder) == (step, progress.best_loss):
                self.warn(f"{lost}; the artefact that was made of it stays")
                artefact.pass_frozen(self.run, frozen)
            else:
                self.warn(f"{lost}; the artefact is of the last step, {progress.step:,}")
                step = progress.step
                trained = commits.read(commits.place_of(folder, step)).state.model
        summary["artefact"] = artefact.place_of(folder)
        summary["artefact_step"], summary["artefact_loss"] = step, progress.loss_at(step)
        best, base = progress.best_loss, progress.base_loss
        if base is not None and (best is None or best >= base):
            self.warn(f"no evaluation was better than the base's; the artefact is of step {step:,} all the same")
        if trained is not None:
            with self.equipment.lend() as model:
                artefact.write_artefact(self.run, model, trained, frozen, self.data, summary)

    def _summary(self, reason: str) -> dict[str, Any]:
        progress = self.progress
        return {
            "name": self.run.name,
            "folder": self.run.folder,
            "artefact": None,
            "artefact_step": None,
            "artefact_loss": None,
            "method": self.run.method.name,
            "reason": reason,
            "steps": progress.step,
            "resumed_from": self.resumed_from,
            "workers": self.world.size,
            "seconds": progress.train_seconds,
            "base_loss": progress.base_loss,
            "final_loss": progress.final_loss,
            "best_loss": progress.best_loss,
            "best_step": progress.best_step,
            "last_training_loss": progress.last_loss,
            "trainable_parameters": self.equipment.trained,
            "parameters": self.equipment.parameters,
            "target_tokens": progress.target_tokens,
            "target_tokens_per_second": progress.target_tokens / max(progress.train_seconds, 1e-9),
            "skipped_steps": progress.skipped,
            "peak_memory_gib": max(self.world.gather(peak_memory_gib(self.world.device))),
            "state_memory": self.world.gather(self.state_memory),
            "unquantized": self.equipment.unquantized,
        }

    # ---------------------------------------------------------------------------------------------------------- small

    def emit(self, **event: Any) -> None:
        if self.world.is_first:
            if self.log:
                self.log.write(event)
            self.channel.emit(event)

    def warn(self, text: str) -> None:
        warning = {"kind": "warning", "text": text}
        if self.world.is_first and self.log is None:  # before the run's folder is known to be its own
            self._unlogged.append(warning)
            self.channel.emit(warning)
        else:
            self.emit(**warning)


def trained_count(model: nn.Module) -> int:
    """Parameters that are trained."""
    return sum(elements(p) for p in model.parameters() if p.requires_grad)


def parameter_count(model: nn.Module) -> int:
    """Parameters, those of NF4 layers counted as what they stand for rather than as their packed bytes."""
    total = 0
    for p in model.parameters():
        state = getattr(p, "quant_state", None)
        total += math.prod(state.shape) if state is not None else elements(p)
    return total


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this worker: of its GPU as torch counts it, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
