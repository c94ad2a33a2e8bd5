"""Generation with many adapters at once, the one way to generate text in ftray. It knows no Ray and no HTTP.

Every step is one forward pass of the base over one row: a token of each sequence that is being written, and pieces of
prompts that are being read, as many as leave the writing ones unhurried. A request gets exactly one last event, and
gives back its slot and its adapter exactly once.
"""

from __future__ import annotations

import math
import secrets
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from ftray.config import Model
from ftray.engine import slots
from ftray.engine.adapters import Adapters
from ftray.engine.choice import Choice, Chosen
from ftray.engine.grammar import Grammars
from ftray.engine.memory import Need
from ftray.engine.options import EngineOptions
from ftray.engine.probe import try_slots
from ftray.engine.request import Chunk, Event, Finished, Request
from ftray.engine.sampling import Sampler
from ftray.engine.scheduler import FairQueue, shares
from ftray.engine.sequence import VIRTUAL, Sequence, SlotTable
from ftray.engine.slots import Piece, Slots
from ftray.engine.text import Detokenizer, TextStream
from ftray.errors import FtrayError, ModelError, QueueFull, RequestError, RunError
from ftray.model.free import free_on
from ftray.model.pooled import Route
from ftray.model.served import Adapter, Base
from ftray.registry.ref import Ref

_ROUTES = 16
"""Routes that are kept: steps alternate between few."""
_JUDGED = 512
"""Expected tokens whose logits are held at once, to tell how probable they are."""


def load_base(
    source: Model,
    *,
    quantized: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    double_quantization: bool = True,
) -> Base:
    """A base for an engine. Raises ModelError, also for a family whose attention slots cannot do."""
    slots.register()
    try:
        base = Base(
            source,
            attention=slots.IMPLEMENTATION,
            quantized=quantized,
            dtype=dtype,
            device=device,
            double_quantization=double_quantization,
        )
    except KeyError as error:
        if error.args != (slots.IMPLEMENTATION,):
            raise
        raise slots.no_interface("this base") from None
    try_slots(base)
    return base


@dataclass(frozen=True)
class EngineStats:
    """What an engine is doing, and what it has done since it began; as of its last step."""

    slots: int
    running: int = 0
    waiting: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    """Read; reused ones are not counted."""
    cached_tokens: int = 0
    """Of prompts, found in slots."""
    written_tokens: int = 0
    adapter_loads: int = 0
    adapter_failures: int = 0
    adapter_evictions: int = 0
    adapter_users: int = 0
    """References to adapters by requests in flight."""
    adapter_bytes: int = 0
    resident: tuple[Ref, ...] = ()
    """Adapters in memory, last used first."""


class Engine:
    """`add`, `cancel`, `wait` and `stats` may be called from any thread, `step` from one alone.

    `load` gives the adapter of a Ref, checked, in the host's memory (`Base.read`); it runs in threads of its own, and
    its FtrayError reaches those who wait for that adapter. A base has one engine at a time. Raises ModelError for a
    context longer than the base's, and for slots for which there is no memory.
    """

    def __init__(self, base: Base, load: Callable[[Ref], Adapter], options: EngineOptions | None = None) -> None:
        self.base, self.options = base, options or EngineOptions()
        options, cpu = self.options, base.model.device.type == "cpu"
        positions = _positions(base.config)
        if options.context and options.context > positions:
            raise ModelError(
                f"this base has {positions:,} positions, and {options.context:,} places were asked for",
                where="engine.context",
                hint=f"at most {positions:,}; null takes what the base has, up to 4,096",
            )
        self.context = options.places(positions)
        self.step_tokens = options.step_tokens or (2 * options.slots if cpu else options.slots + 512)
        self.prompt_tokens = options.reads(gpu=not cpu)
        self.slots = self._make_slots()
        self.adapters = Adapters(
            base.pooled,
            load,
            on_device=options.adapters or options.slots,
            memory=options.adapter_memory,
            threads=options.load_threads,
            wake=self._wake,
        )
        self._sampler, self._detokenizer = Sampler(), Detokenizer(base.tokenizer)
        self._made: Grammars | None = None
        self._grammars_lock = threading.Lock()
        self._embed = base.model.get_input_embeddings()
        self._vocabulary = self._embed.num_embeddings
        self._ends = _end_tokens(base)
        self._queue: FairQueue[Sequence] = FairQueue()
        self._table = SlotTable(options.slots)
        self._doubtful: set[int] = set()
        """Slots whose last sequence did not end with a good answer, so that there may be NaN in them."""
        self._running: list[Sequence] = []
        """In the order in which they began."""
        self._by_id: dict[str, Sequence] = {}
        self._read_now: dict[Any, list[Sequence]] = {}
        """Those that are reading, by how their prompts open."""
        self._held_back: dict[str, str] = {}
        """Tenants of requests that wait for one of them, in this step: who comes behind takes no slot of theirs."""
        self._routes: OrderedDict[tuple[tuple[str | None, int], ...], Route] = OrderedDict()
        self._steps = self._prompt_tokens = self._cached_tokens = self._written_tokens = 0
        self._stats = EngineStats(options.slots)
        self._lock = threading.Condition()
        self._inbox: deque[Sequence] = deque()
        self._cancelled: set[str] = set()
        self._open: dict[str, str] = {}
        """Tenant of each request that has not ended, by id."""
        self._of_tenant: Counter[str] = Counter()
        self._woken = False
        """There may be something to do. Under the lock, as are the four above."""

    def _make_slots(self) -> Slots:
        model, count = self.base.model, self.options.slots
        layers, heads, width = slots.shape_of(self.base.config)
        need = Need(
            slots=count,
            context=self.context,
            prompt_tokens=self.prompt_tokens,
            heads=self.base.config.num_attention_heads,
            token=2 * layers * heads * width * model.dtype.itemsize,
            each=model.dtype.itemsize,
        )
        need.refuse(free_on(model.device), str(model.device))
        try:
            return Slots(model, count, self.context)
        except RuntimeError as error:  # torch's, of a GPU or a CPU without so much
            raise need.too_much(str(error).split("\n")[0]) from error

    # ---------------------------------------------------------------------------------------------------- any thread

    def add(self, request: Request) -> None:
        """Take a request in. Raises RequestError for one that can never be answered, QueueFull for one too many."""
        if not request.prompt:
            raise RequestError("the prompt has no tokens", hint="write some text")
        if not all(0 <= token < self._vocabulary for token in (*request.prompt, *request.expected)):
            raise RequestError(f"the prompt has tokens outside of the vocabulary of {self._vocabulary:,}")
        if len(request.prompt) >= self.context:
            raise self._too_long(request, 0)
        with self._lock:
            self._refuse_full(request)  # before a grammar is compiled, which may take half a second
        if request.sampling.seed is None:
            request = replace(request, sampling=replace(request.sampling, seed=secrets.randbits(63)))
        wanted = request.sampling.grammar
        matcher = self._grammars().matcher(wanted) if wanted else None
        choice = Choice(request.sampling, request.prompt, self._vocabulary, self._ends, matcher)
        sequence = Sequence(request, choice, TextStream(self._detokenizer, request.sampling.stop))
        with self._lock:
            self._refuse_full(request)
            self._open[request.id] = request.tenant
            self._of_tenant[request.tenant] += 1
            self._inbox.append(sequence)
        self._wake()

    def cancel(self, id: str) -> None:
        """End a request early; its last event says so. One that is not in flight is left alone."""
        with self._lock:
            if id not in self._open:
                return
            self._cancelled.add(id)
        self._wake()

    def wait(self, timeout: float) -> bool:
        """Until there is something to do, or `timeout` seconds have passed. Returns whether there is."""
        with self._lock:
            return self._lock.wait_for(lambda: self._woken, timeout)

    def stats(self) -> EngineStats:
        return self._stats

    def in_flight(self) -> int:
        """Requests that have not had their last event."""
        return len(self._open)

    def close(self) -> None:
        """Leave the base to another engine. Requests in flight get no more events."""
        self.adapters.close()

    def _refuse_full(self, request: Request) -> None:
        """Under the lock."""
        if request.id in self._open:
            raise RequestError(f"a request with the id {request.id!r} is in flight", hint="choose another id")
        if len(self._open) >= self.options.slots + self.options.queue:
            raise QueueFull(f"{len(self._open):,} requests are in flight", hint="try again later")
        if (count := self._of_tenant[request.tenant]) >= self.options.slots + self.options.tenant_queue:
            raise QueueFull(f"{count:,} requests of yours are in flight", hint="try again when some have ended")

    def _grammars(self) -> Grammars:
        """Made when they are first asked for: a tokenizer's takes a fifth of a second."""
        with self._grammars_lock:
            if self._made is None:
                self._made = Grammars(self.base.tokenizer, self._vocabulary, self._ends)
            return self._made

    def _wake(self) -> None:
        with self._lock:
            self._woken = True
            self._lock.notify_all()

    # ----------------------------------------------------------------------------------------------------- one thread

    def step(self) -> list[Event]:
        """Do what can be done now, at most one forward pass. Returns what happened, in order."""
        with self._lock:
            arrived, cancelled = list(self._inbox), self._cancelled
            self._inbox.clear()
            self._cancelled, self._woken = set(), False
        for sequence in arrived:
            self._by_id[sequence.id] = sequence
            if sequence.request.adapter:
                sequence.held = self.adapters.want(sequence.request.adapter, sequence.tenant)
            self._queue.push(sequence.tenant, sequence)
        self.adapters.collect()
        events: list[Event] = []
        for id in cancelled & self._by_id.keys():
            events += self._end(self._by_id[id], "cancelled")
        for sequence in [s for s in self._queue.waiting() if s.held and s.held.error]:
            assert sequence.held is not None
            events += self._end(sequence, "error", sequence.held.error)
        events += self._admit()
        if self._running:
            events += self._forward()
            self._wake()
        self._stats = self._count()
        return events

    def _admit(self) -> list[Event]:
        """Free slots go to those who are next."""
        events: list[Event] = []
        self._read_now, self._held_back = defaultdict(list), {}
        for reader in self._running:
            self._shares(reader)
        while self._table.free and (sequence := self._queue.pop(self._can_start, self.options.tenant_slots)):
            self._running.append(sequence)
            sequence.begins()
            known, source = self._table.take(sequence, self.options.reuse_prefixes)
            assert sequence.slot is not None
            if source is not None:
                self.slots.copy(source, sequence.slot, known)
            if sequence.slot in self._doubtful:
                self._doubtful.discard(sequence.slot)
                self.slots.clear(sequence.slot, known)
            virtual = sequence.virtual_tokens
            adapter = sequence.adapter
            if adapter and adapter.prefix is not None and known < virtual <= self.context:
                self.slots.fill(sequence.slot, adapter.prefix)
                known = virtual
            sequence.done, sequence.cached = known, max(known - virtual, 0)
            self._cached_tokens += sequence.cached
            self._queue.charge(sequence.tenant, read=sequence.undone)
            if sequence.begin >= self.context or len(sequence.tokens) > self.context:
                events += self._end(sequence, "error", self._too_long(sequence.request, virtual))
            else:
                self._shares(sequence)
        return events

    def _shares(self, sequence: Sequence) -> None:
        """Others may wait for what this one reads."""
        if self.options.reuse_prefixes and sequence.opening and sequence.undone > 1:
            self._read_now[sequence.opening].append(sequence)

    def _can_start(self, sequence: Sequence) -> bool:
        """Not while another reads what it can have copied afterwards: many that begin alike arrive together."""
        held = sequence.held
        if held is not None and held.adapter is None:
            return False
        prompt = sequence.request.prompt
        for other in self._read_now.get(sequence.opening, ()) if sequence.opening else ():
            next_read = max(other.done - other.virtual_tokens, 0) + 1
            if next_read < len(prompt) and prompt[:next_read] == other.request.prompt[:next_read]:
                self._held_back[sequence.id] = sequence.tenant
                return False
        others = sum(tenant != sequence.tenant for tenant in self._held_back.values())
        return len(self._table.free) > others and (held is None or self.adapters.start(held))

    def _too_long(self, request: Request, virtual: int) -> RequestError:
        own = f" and its adapter {virtual:,}" if virtual else ""
        tokens = len(request.prompt) + len(request.expected)
        return RequestError(
            f"the prompt has {tokens:,} tokens{own}; together with the answer they may have {self.context - 1:,}",
            hint="shorten the prompt",
        )

    def _end(
        self,
        sequence: Sequence,
        reason: Literal["stop", "length", "cancelled", "error"],
        error: FtrayError | None = None,
    ) -> list[Event]:
        """The last events of a request, which gives back all that it holds."""
        del self._by_id[sequence.id]
        if sequence.slot is None:
            self._queue.remove(sequence.tenant, sequence)
        else:
            self._running.remove(sequence)
            self._queue.done(sequence.tenant)
            self._table.give_back(sequence)
            if reason in ("cancelled", "error"):
                self._doubtful.add(sequence.slot)
            if reason == "error":
                self._table.forget(sequence.slot)
            if sequence.held:
                self.adapters.stop(sequence.held)
        sequence.kept = []
        if sequence.held:
            self.adapters.leave(sequence.held)
            sequence.held = None  # the slot remembers the sequence, and need not keep the adapter in memory
        with self._lock:
            self._of_tenant[self._open.pop(sequence.id)] -= 1
            self._of_tenant += Counter()  # drops those at zero
            self._cancelled.discard(sequence.id)
        rest = sequence.text.finish() if reason in ("stop", "length") else ""
        if reason == "length" and sequence.text.stopped:  # the rest completed a stop string
            reason = "stop"
        last: list[Event] = [Chunk(sequence.id, rest)] if rest else []
        return [*last, Finished(sequence.id, reason, sequence.usage(), error, sequence.expected)]

    # ----------------------------------------------------------------------------------------------------- the forward

    def _forward(self) -> list[Event]:
        writing, reading = self._compose()
        row = [*writing, *reading]
        events: list[Event] = []
        try:
            logits = self._logits(row, len(writing))
            self._steps += 1
            self._prompt_tokens += sum(piece.count for sequence, piece in row if not sequence.choice.count)
            self._write(*self._sampled(row, logits), events)
        except Exception as error:  # noqa: BLE001  what one step does to its requests must not end all later ones
            events += self._fail(row, error)
        return events

    @torch.inference_mode()
    def _sampled(self, row: list[tuple[Sequence, Piece]], logits: Tensor) -> tuple[Tensor, dict[Sequence, int]]:
        """(logits, those who get a token now: the first of their rows there). What follows the last token of the
        prompt stands in a sequence's first row, what follows its first expected one in the second."""
        sampled: dict[Sequence, int] = {}
        first, tables, count = 0, [logits], len(logits)
        for sequence, piece in row:
            wanted = len(sequence.wanted(piece.place, piece.count))
            own = logits[first : first + wanted]
            sequence.done += piece.count
            if sequence.undone:
                sequence.kept += [own.clone()] if wanted else []
            elif sequence.kept:
                sampled[sequence] = count
                tables += [*sequence.kept, own]
                count += sum(map(len, sequence.kept)) + wanted
            else:
                sampled[sequence] = first
            first += wanted
        logits = torch.cat(tables) if len(tables) > 1 else logits
        if expecting := {s: at for s, at in sampled.items() if s.request.expected and not s.choice.count}:
            self._judge(logits, expecting)
        return logits, sampled

    def _judge(self, logits: Tensor, sampled: dict[Sequence, int]) -> None:
        """Tell how probable what is expected is."""
        rows = self._tensor([at + i for s, at in sampled.items() for i in range(len(s.request.expected))])
        tokens = self._tensor([token for s in sampled for token in s.request.expected])
        found = iter((-functional.cross_entropy(logits[rows].float(), tokens, reduction="none")).tolist())
        for sequence in sampled:
            sequence.expected = tuple(next(found) for _ in sequence.request.expected)
            sequence.begins_answer()
            assert sequence.slot is not None
            if not math.isfinite(sum(sequence.expected)):  # its values must not reach the answer, nor who comes next
                self.slots.clear(sequence.slot, sequence.begin)

    def _write(self, logits: Tensor, sampled: dict[Sequence, int], events: list[Event]) -> None:
        """A token for each of `sampled`, and the next one for as long as the one before is what is expected: then its
        keys and values are there."""
        turn = 0
        while sampled:
            at = list(sampled.values())
            now = logits if at == list(range(len(logits))) else logits[self._tensor(at)]
            chosen = self._sampler.choose(now, [s.choice for s in sampled])
            further = {}
            for (sequence, place), found in zip(sampled.items(), chosen, strict=True):
                self._accept(sequence, found, events)
                begins = sequence.choice.count == turn + 1
                right = sequence.request.expected[turn : turn + 1] == (found.token,)
                if begins and right and sequence.id in self._by_id:
                    sequence.done += 1
                    further[sequence] = place + 1
            sampled, turn = further, turn + 1

    def _accept(self, sequence: Sequence, found: Chosen, events: list[Event]) -> None:
        if found.error:
            events += self._end(sequence, "error", found.error)
            return
        self._written_tokens += 1
        self._queue.charge(sequence.tenant, written=1)
        sequence.tokens.append(found.token)
        text = "" if found.is_end else sequence.text.add(found.token)
        logprobs = (found.logprob,) if found.logprob else ()
        events.append(Chunk(sequence.id, text, (found.token,), logprobs))
        if found.finish == "stop" or sequence.text.stopped:
            events += self._end(sequence, "stop")
        elif found.finish == "length" or len(sequence.tokens) >= self.context:
            events += self._end(sequence, "length")

    def _compose(self) -> tuple[list[tuple[Sequence, Piece]], list[tuple[Sequence, Piece]]]:
        """(sequences that write, sequences that read) in this step, each with its tokens. Writing ones of one adapter
        stand side by side, in the order of the pools; tenants share what is read."""
        order = self.base.pooled.order
        writing = [s for s in self._running if s.undone == 1]
        writing.sort(key=lambda s: (order(s.digest), s.slot))
        left = max(self.step_tokens - len(writing), 8) if writing else self.prompt_tokens
        unread: Counter[str] = Counter()
        for sequence in self._running:
            if sequence.undone > 1:
                unread[sequence.tenant] += sequence.undone
        share, judged = shares(unread, left), _JUDGED
        reading = []
        for sequence in self._running:
            if sequence.undone > 1 and share[sequence.tenant]:
                count = min(sequence.undone, share[sequence.tenant])
                if sequence.request.expected:
                    wanted = len(sequence.wanted(sequence.done, count))
                    count -= max(wanted - judged, 0)
                    judged -= min(wanted, judged)
                share[sequence.tenant] -= count
                reading += [(sequence, _piece(sequence, count))] if count else []
        return [(s, _piece(s, 1)) for s in writing], reading

    @torch.inference_mode()
    def _logits(self, row: list[tuple[Sequence, Piece]], writing: int) -> Tensor:
        """[tokens that are wanted, vocabulary]: what follows each of them, after one pass of the base over `row`, whose
        first `writing` entries are single tokens."""
        pieces = [piece for _, piece in row]
        step = self.slots.step = self.slots.plan(pieces[:writing], pieces[writing:])
        ids: list[int] = []
        keep: list[int] = []
        for sequence, piece in row:
            keep += [len(ids) + place - piece.place for place in sequence.wanted(piece.place, piece.count)]
            ids += sequence.tokens[piece.place : piece.place + piece.count]
        with self.base.pooled.routed(self._route(row)):
            output = self.base.model(
                **self._tokens(row, ids),
                position_ids=step.positions[None],
                logits_to_keep=self._tensor(keep or [len(ids) - 1]),
                use_cache=False,
            )
        return output.logits[0, : len(keep)]

    def _tokens(self, row: list[tuple[Sequence, Piece]], ids: list[int]) -> dict[str, Any]:
        """The row's tokens, or embeddings where some are virtual."""
        if VIRTUAL not in ids:
            return {"input_ids": self._tensor(ids)[None]}
        embeds = self._embed(self._tensor([max(i, 0) for i in ids]))
        start = 0
        for sequence, piece in row:
            count = min(sequence.virtual_tokens - piece.place, piece.count)
            if count > 0:
                adapter = sequence.adapter
                assert adapter is not None
                assert adapter.prompt is not None
                own = adapter.prompt[piece.place : piece.place + count]
                embeds[start : start + count] = own.to(embeds)
            start += piece.count
        return {"inputs_embeds": embeds[None]}

    def _route(self, row: list[tuple[Sequence, Piece]]) -> Route:
        """Whose each token is. Kept while the batch stays as it is, since plans for every layer hang on it."""
        segments: list[tuple[str | None, int]] = []
        for sequence, piece in row:
            if segments and segments[-1][0] == sequence.digest:
                segments[-1] = (sequence.digest, segments[-1][1] + piece.count)
            else:
                segments.append((sequence.digest, piece.count))
        key = tuple(segments)
        route = self._routes.pop(key, None) or Route(key, self.slots.device, self.base.pooled.compiled)
        self._routes[key] = route
        if len(self._routes) > _ROUTES:
            self._routes.popitem(last=False)
        return route

    def _fail(self, row: list[tuple[Sequence, Piece]], error: Exception) -> list[Event]:
        """A forward pass failed: so do the requests in it, and no other."""
        events: list[Event] = []
        for sequence, _ in row:
            if sequence.id not in self._by_id:
                continue
            wrong = RunError(f"the step failed: {type(error).__name__}: {error}")
            wrong.__cause__ = error
            events += self._end(sequence, "error", wrong)
        return events

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, device=self.slots.device)

    def _count(self) -> EngineStats:
        adapters = self.adapters
        return EngineStats(
            self.slots.count,
            len(self._running),
            len(self._queue),
            self._steps,
            self._prompt_tokens,
            self._cached_tokens,
            self._written_tokens,
            adapters.loads,
            adapters.failures,
            adapters.evictions,
            adapters.users,
            adapters.memory,
            tuple(adapters.resident()),
        )


def _piece(sequence: Sequence, count: int) -> Piece:
    assert sequence.slot is not None
    return Piece(sequence.slot, sequence.done, count)


def _positions(config: Any) -> int:
    """Positions that the base has. LongRoPE turns all sequences of a step otherwise as soon as one of them is longer
    than what the base was first trained on, so none may be."""
    allowed = getattr(config, "max_position_embeddings", None) or 4096
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(of_layers for of_layers in rope.values() if isinstance(of_layers, dict))]
    longest = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    return min([allowed, *longest])


def _end_tokens(base: Base) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's own, and those of the base's generation config."""
    more = base.model.generation_config.eos_token_id
    more = [] if more is None else [more] if isinstance(more, int) else more
    return frozenset(end for end in [base.tokenizer.eos_token_id, *more] if end is not None)
