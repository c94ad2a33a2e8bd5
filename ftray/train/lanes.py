"""Many runs on one frozen base: each is a lane with its own rows, loss, gradients, clipping, optimizer and schedule.

Every lane's loop is the loop of any run, on a thread of its own. Where it needs the model it asks, and one thread
answers: micro-batches of all lanes go through the base laid end to end, as many tokens at once as there is memory for.
A lane's gradient depends on its own tokens alone, so it follows the same run alone, within rounding.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ftray.config import Run
from ftray.data.prepared import PreparedData
from ftray.model import threads
from ftray.model.ending import unlearned_end
from ftray.model.load import evaluating, load_base
from ftray.model.methods import attach, trained_state
from ftray.model.pooled import PooledModel, Route
from ftray.model.served import row_norms
from ftray.train.batch import Batch, joined
from ftray.train.lane import Gradients, Lane, LaneEnded, Losses
from ftray.train.loop import Channel, Equipment, parameter_count, train_worker, trained_count
from ftray.train.loss import TargetLoss, losses, target_states
from ftray.train.strategy import autocast
from ftray.train.world import World

PASS_TOKENS = {"cpu": 2048, "cuda": 32768}
"""Tokens of one pass at most, if memory allows. Measured on two cores: more gains nothing."""
_PATIENCE = 0.25
"""Share of the last pass's time for which lanes that have asked wait for one that has not."""
_LEAST_PATIENCE = 0.01


@dataclass
class _Ask:
    """What a lane wants, and where it waits for it."""

    what: Gradients | Losses | Callable[[], Any]
    answer: Future[Any] = field(default_factory=Future)

    @property
    def joint(self) -> bool:
        """Better answered together with others."""
        return not callable(self.what)


@dataclass(frozen=True)
class _Part:
    """One micro-batch in a joint pass."""

    lane: Lane
    batch: Batch
    seed: int | None
    weight: float
    done: Callable[[Tensor], None]
    """Takes the sum of its losses."""


class Base:
    """A frozen base, the thread that computes with it, and the lanes on it. Raises ModelError.

    `pass_tokens`: tokens that go through the base at once, at most; a micro-batch that is longer goes alone.
    """

    def __init__(self, run: Run, world: World, pass_tokens: int | None = None) -> None:
        self.run, self.world = run, world
        self.pass_tokens = pass_tokens or PASS_TOKENS[world.device.type]
        self.lanes: dict[str, Lane] = {}
        self.base_losses: dict[Any, Any] = {}
        self.base_lock = threading.Lock()
        self._norms: dict[str, Tensor] = {}
        self.unlearned_end = cache(lambda end: self.do(partial(unlearned_end, self.model, end)))
        self._asks: list[_Ask] = []
        self._changed = threading.Condition()
        self._closing = False
        self._seconds = 0.0
        self._thread = threading.Thread(target=self._serve, name="ftray-lanes", daemon=True)
        self._thread.start()
        self.do(self._load)

    def _load(self) -> None:
        """On the computing thread, so that no other has threads of OpenMP's; see `ftray.model.threads`."""
        self.model, self.unquantized = load_base(self.run, self.world.device)
        self.model.requires_grad_(False).train()
        self._checkpointed(True)
        self.pooled = PooledModel(self.model)
        self.objective = TargetLoss(self.model)

    # -------------------------------------------------------------------------------------------------- for the lanes

    def equip(self, name: str, hold: Callable[[], None] | None) -> Callable[[Run, World, int], Equipment]:
        """What `train_worker` takes for the lane `name`."""

        def equipment(run: Run, _world: World, steps: int) -> Equipment:
            lane = Lane(name, run, self, hold)

            @contextmanager
            def lend() -> Iterator[Any]:
                with self._alone(), self._attached(run, steps) as model:
                    yield model

            def join() -> tuple[int, int]:
                with self._attached(run, steps) as model:
                    lane.take_from(model)
                    return trained_count(model), parameter_count(model)

            trained, parameters = self.do(join)
            with self._changed:
                self.lanes[name] = lane
                self._changed.notify_all()
            return Equipment(
                strategy=lane,
                objective=self.objective,
                trained=trained,
                parameters=parameters,
                unquantized=self.unquantized,
                unlearned_end=self.unlearned_end,
                lend=lend,
                base_losses=self.base_losses,
                base_lock=self.base_lock,
                aside=partial(self.without, lane),  # an evaluation is told when its commit counts
            )

        return equipment

    def train(
        self,
        name: str,
        run: Run,
        data: PreparedData,
        channel: Channel,
        *,
        restarts: int = 0,
        hold: Callable[[], None] | None = None,
    ) -> dict[str, Any]:
        """The run as a lane, in this thread; returns its summary. `hold` is called before each step and may wait.
        Raises as `train_worker` does, and LaneEnded when the base was closed or the lane expelled."""
        threads.use_one()
        try:
            equip = self.equip(name, hold)
            return train_worker(run, data, self.world, channel, restarts=restarts, equip=equip)
        finally:
            self._leave(name)

    def shapes_of(self, run: Run) -> dict[str, torch.Size]:
        """Of what the run would train, by name."""

        def look() -> dict[str, torch.Size]:
            with self._attached(run) as model:
                return {name: tensor.shape for name, tensor in trained_state(model).items()}

        return self.do(look)

    def expel(self, name: str) -> None:
        """Have the lane end before its next step; unknown names are ignored."""
        with self._changed:
            if name in self.lanes:
                self.lanes[name].expelled = True

    def _leave(self, name: str) -> None:
        with self._changed:
            lane = self.lanes.pop(name, None)
            self._changed.notify_all()
        if lane is not None and not self._closing:
            self.do(lane.drop)

    @contextmanager
    def without(self, lane: Lane) -> Iterator[None]:
        """The lane waits for something else than the base, so others need not wait for it meanwhile."""
        with self._changed:
            lane.away = True
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                lane.away = False

    def do(self, work: Callable[[], Any]) -> Any:
        """Have the computing thread do `work`, with nothing else under way."""
        return self._answered(_Ask(work))

    def ask(self, what: Gradients | Losses) -> Any:
        return self._answered(_Ask(what))

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _answered(self, ask: _Ask) -> Any:
        with self._changed:
            if self._closing:
                raise LaneEnded
            self._asks.append(ask)
            self._changed.notify_all()
        return ask.answer.result()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """The computing thread stands still meanwhile."""
        reached, go_on = threading.Event(), threading.Event()

        def stand_still() -> None:
            reached.set()
            go_on.wait()

        ask = _Ask(stand_still)
        with self._changed:
            self._asks.append(ask)
            self._changed.notify_all()
        reached.wait()
        try:
            yield
        finally:
            go_on.set()
            ask.answer.result()

    @contextmanager
    def _attached(self, run: Run, steps: int | None = None) -> Iterator[Any]:
        """PEFT's model of a run on this base, for its fresh weights, their names, and its artefact."""
        for path, layer in self.pooled.linears.items():
            self.model.set_submodule(path, layer.base)
        self._checkpointed(False)
        try:
            yield attach(self.model, run, steps)
        finally:
            for path, layer in self.pooled.linears.items():
                self.model.set_submodule(path, layer)
            if hasattr(self.model, "peft_config"):
                del self.model.peft_config
            self.model.requires_grad_(False)
            self._checkpointed(True)

    def _checkpointed(self, on: bool) -> None:
        """PEFT would hook into the embeddings of a base that recomputes."""
        if self.run.train.gradient_checkpointing:
            if on:
                self.model.activation_checkpointing_enable({"use_reentrant": False})
            else:
                self.model.activation_checkpointing_disable()

    def row_norms(self, path: str) -> Tensor:
        """Squared norms of the rows of a linear layer's weight, fp32 [out]."""
        if path not in self._norms:
            self._norms[path] = row_norms(self.pooled.linears[path].base)
        return self._norms[path]

    # ------------------------------------------------------------------------------------------- the computing thread

    def _serve(self) -> None:
        while True:
            with self._changed:
                asks = self._next()
            if asks is None:
                return
            single = [ask for ask in asks if not ask.joint]
            for ask in single:
                _answer(ask, ask.what)  # type: ignore[arg-type]
            if joint := [ask for ask in asks if ask.joint]:
                self._together(joint)

    def _next(self) -> list[_Ask] | None:
        """What to do next: work for one lane at once; passes for many when all have asked or were waited for."""
        waiting_since: float | None = None
        while True:
            if single := [ask for ask in self._asks if not ask.joint]:
                self._asks = [ask for ask in self._asks if ask.joint]
                return single
            if self._closing:
                for ask in self._asks:
                    ask.answer.set_exception(LaneEnded())
                self._asks = []
                return None
            if not self._asks:
                self._changed.wait()
                continue
            now = time.monotonic()
            waiting_since = waiting_since or now
            left = waiting_since + max(_LEAST_PATIENCE, _PATIENCE * self._seconds) - now
            expected = sum(not lane.away for lane in self.lanes.values())
            if len(self._asks) >= expected or left <= 0:
                asks, self._asks = self._asks, []
                return asks
            self._changed.wait(left)

    def _together(self, asks: list[_Ask]) -> None:
        """Answer gradients and losses of many lanes. When a pass fails, all is computed again, each micro-batch by
        itself, so that the error reaches the lane whose it is and no other."""
        memory = False
        try:
            for ask, sums in zip(asks, self._computed(asks), strict=True):
                ask.answer.set_result(sums)
            return
        except Exception as error:  # noqa: BLE001 - kept no longer than here: its frames hold what the pass had made
            memory = _out_of_memory(error)
        if memory and self.world.device.type == "cuda":
            torch.cuda.empty_cache()
        for ask in asks:
            self._apart(ask)
        if memory and not any(ask.answer.exception() for ask in asks):
            whats = [ask.what for ask in asks if isinstance(ask.what, Gradients | Losses)]
            tokens = sum(batch.tokens.numel() for what in whats for batch in what.batches)
            self.pass_tokens = max(1, min(self.pass_tokens, tokens) // 2)  # each by itself fitted: fewer at once

    def _apart(self, ask: _Ask) -> None:
        try:
            if isinstance(ask.what, Gradients):
                ask.what.lane.forget()
            [sums] = self._computed([ask], apart=True)
        except Exception as error:  # noqa: BLE001 - the lane's thread raises it again
            ask.answer.set_exception(error)
        else:
            ask.answer.set_result(sums)

    def _computed(self, asks: list[_Ask], apart: bool = False) -> list[list[Tensor]]:
        """Sums of losses for each ask, one a micro-batch, their gradients added to the lanes'. `apart`: a pass for each
        micro-batch."""
        answers: list[list[Tensor]] = [[] for _ in asks]
        trained: list[_Part] = []
        measured: list[_Part] = []
        for ask, sums in zip(asks, answers, strict=True):
            what, done = ask.what, sums.append
            if isinstance(what, Gradients):
                each = zip(what.batches, what.seeds, strict=True)
                trained += [_Part(what.lane, batch, seed, 1 / what.divisor, done) for batch, seed in each]
            else:
                assert isinstance(what, Losses)
                measured += [_Part(what.lane, batch, None, 0.0, done) for batch in what.batches]
        most = 1 if apart else self.pass_tokens
        self._refresh_gains({id(part.lane): part.lane for part in (*trained, *measured)}.values())
        if measured:
            with evaluating(self.objective):
                for parts in _passes(measured, most):
                    self._pass(parts)
        if trained:
            started = time.monotonic()
            for parts in _passes(trained, most):
                self._pass(parts)
            self._seconds = time.monotonic() - started
        return answers

    def _pass(self, parts: list[_Part]) -> None:
        batch = joined([part.batch for part in parts])
        counts = [len(part.batch.labels) for part in parts]
        generators = [part.lane.generator(part.seed) for part in parts]
        segments = tuple((part.lane.name, part.batch.tokens.numel()) for part in parts)
        route = Route(segments, self.world.device, generators=tuple(generators))
        smoothing = self._by_target([part.lane.smoothing for part in parts], counts) if self.model.training else 0.0
        with self.pooled.routed(route):
            with autocast(self.run.train.precision, self.world):
                each = losses(self.model, target_states(self.model, batch), batch.labels, smoothing)
            if self.model.training:
                weights = torch.tensor([part.weight for part in parts])
                counted = weights.repeat_interleave(torch.tensor(counts)).to(each.device)
                each.backward(counted)  # inside: recomputed blocks follow the route too
        for part, own in zip(parts, each.detach().split(counts), strict=True):
            part.done(own.sum())

    def _by_target(self, values: list[float], counts: list[int]) -> float | Tensor:
        if not any(values):
            return 0.0
        return torch.tensor(values).repeat_interleave(torch.tensor(counts))[:, None].to(self.world.device)

    @torch.no_grad()
    def _refresh_gains(self, lanes: Iterable[Lane]) -> None:
        """DoRA's gains after the weights have moved: one look at each layer of the base for all lanes.

        ‖W + sBA‖² by rows is ‖W‖² + 2 s B·(A Wᵀ) + s² B (A Aᵀ) Bᵀ, and A Wᵀ the layer's own output for A's rows.
        """
        moved = [lane for lane in lanes if lane.moved and lane.magnitudes]
        for path in dict.fromkeys(path for lane in moved for path in lane.magnitudes):
            own = [lane for lane in moved if path in lane.magnitudes]
            linear = self.pooled.linears[path].base
            downs = [lane.rows[path].down for lane in own]
            image = linear(torch.cat(downs).to(self.model.dtype)).float()
            if (bias := getattr(linear, "bias", None)) is not None:
                image = image - bias.float()
            for lane, part in zip(own, image.split([len(down) for down in downs]), strict=True):
                rows = lane.rows[path]
                up, down = rows.scale * rows.up, rows.down
                squared = self.row_norms(path) + 2 * (up.T * part).sum(0) + ((up @ (down @ down.T)) * up).sum(1)
                norms = squared.clamp_min(1e-12).sqrt()
                assert rows.gain is not None
                torch.div(lane.magnitudes[path], norms, out=rows.gain)
                lane.norms[path] = norms
        for lane in moved:
            lane.moved = False


def _passes(parts: list[_Part], most: int) -> Iterator[list[_Part]]:
    """Parts that go through the base together: of `most` tokens, or one that has more."""
    chosen: list[_Part] = []
    tokens = 0
    for part in parts:
        if chosen and tokens + part.batch.tokens.numel() > most:
            yield chosen
            chosen, tokens = [], 0
        chosen.append(part)
        tokens += part.batch.tokens.numel()
    yield chosen


def _out_of_memory(error: Exception) -> bool:
    """torch has no class of its own for what a CPU refuses."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _answer(ask: _Ask, work: Callable[[], Any]) -> None:
    try:
        ask.answer.set_result(work())
    except BaseException as error:  # noqa: BLE001 - raised again in the thread that asked
        ask.answer.set_exception(error)
