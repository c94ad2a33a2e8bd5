"""Many requests at once to one engine over random adapters: what asks, what is there to be asked, what came of it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ftray.engine.engine import Engine
from ftray.engine.request import Event, Finished, Logprob, Request, Sampling
from ftray.model.pooled import Bottleneck, Delta
from ftray.model.served import Adapter, Base
from ftray.registry.ref import Ref
from tests.toys import wait_until

CONTEXT = 128
GREEDY = Sampling(16, temperature=0, ignore_end=True)
PROMPT = "What is a good cheese for a picnic?"
KINDS = ("", "lora", "lora-two", "prefix", "prompt", "bottleneck")


class Adapters:
    """Random ones, strong enough to change every text; by the name of a Ref, of any version. What a test puts into
    `special` is given, called or raised instead."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.special: dict[str, Any] = {}
        self.asked: list[str] = []

    def load(self, ref: Ref) -> Adapter:
        self.asked.append(ref.digest)
        made = self.special.get(ref.name) or self.special.get(ref.digest)
        if isinstance(made, Exception):
            raise made
        if isinstance(made, Adapter):
            return made
        return made() if made else self.make(ref.digest)

    def make(self, name: str, fill: float | None = None) -> Adapter:
        """Of the kind that its name begins with."""
        generator = torch.Generator().manual_seed(sum(map(ord, name)))

        def normal(*shape: int, width: float) -> torch.Tensor:
            return torch.randn(*shape, generator=generator) * width if fill is None else torch.full(shape, fill)

        config, linears = self.base.config, self.base.pooled.linears
        if name.startswith("prefix"):
            shape = (config.num_hidden_layers, 2, config.num_key_value_heads, 9, 32)
            return Adapter({}, {}, prefix=normal(*shape, width=1))
        if name.startswith("prompt"):
            return Adapter({}, {}, prompt=normal(9, config.hidden_size, width=0.5))
        if name.startswith("bottleneck"):
            size, hidden = 6, config.hidden_size
            parts = normal(size, hidden, width=0.1), normal(size, width=0.1), normal(size, hidden, width=0.3)
            return Adapter({}, {"model.layers.1.mlp": Bottleneck(*parts, normal(hidden, width=0.1), "gelu")})
        rank = 2 + len(name)
        return Adapter(
            {
                path: Delta(normal(rank, layer.inputs, width=0.1), normal(rank, layer.outputs, width=0.1))
                for path, layer in linears.items()
                if path.endswith(("v_proj", "down_proj"))
            },
            {},
        )


def nothing_is_left(engine: Engine) -> None:
    engine.step()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.adapter_users, engine.in_flight()) == (0, 0, 0, 0)
    assert sorted(engine._table.free) == list(range(stats.slots))
    assert not engine._by_id
    assert not engine._running
    assert not engine._cancelled
    assert not engine._of_tenant
    assert len(engine._queue) == 0
    assert not engine._queue._served
    assert all(not held.running for held in engine.adapters._held.values())


class Log:
    """What happened, by request."""

    def __init__(self) -> None:
        self.text: dict[str, str] = defaultdict(str)
        self.tokens: dict[str, list[int]] = defaultdict(list)
        self.logprobs: dict[str, list[Logprob]] = defaultdict(list)
        self.last: dict[str, Finished] = {}

    def take(self, events: Iterable[Event]) -> None:
        for event in events:
            assert event.id not in self.last, "nothing follows the last event"
            if isinstance(event, Finished):
                self.last[event.id] = event
                assert event.usage.completion_tokens == len(self.tokens[event.id])
                assert (event.error is not None) == (event.reason == "error")
            else:
                self.text[event.id] += event.text
                self.tokens[event.id] += event.tokens
                self.logprobs[event.id] += event.logprobs


def run(engine: Engine, *requests: Request, until: Callable[[Log], bool] | None = None, log: Log | None = None) -> Log:
    """Add them all, and step until all in flight have ended, or `until` holds."""
    log = log or Log()
    for it in requests:
        engine.add(it)
    end = time.monotonic() + 60
    while engine.in_flight() and not (until and until(log)):
        engine.wait(0.05)
        log.take(engine.step())
        assert time.monotonic() < end
    return log


def all_read(engine: Engine) -> None:
    """Wait, without a step, until every adapter that was asked for is read."""
    wait_until(lambda: not engine.adapters._readers)


def load(engine: Engine, base: Base, *kinds: str) -> None:
    """Have adapters in memory, so that what follows does not depend on how fast they are read."""
    once = Sampling(1, ignore_end=True)
    run(engine, *(ask(base, f"loads {kind}", once, kind, "A", "loader") for kind in kinds))


def tokens_of(base: Base, text: str) -> tuple[int, ...]:
    return tuple(base.tokenizer(text).input_ids)


def ask(
    base: Base, id: str, sampling: Sampling = GREEDY, adapter: str = "", text: str = PROMPT, tenant: str = "t"
) -> Request:
    ref = Ref("t", adapter.split("@")[0], adapter) if adapter else None
    return Request(id, tokens_of(base, text), sampling, ref, tenant)


def crowd(base: Base, count: int, **sampling: Any) -> list[Request]:
    """Requests of all kinds, prompts and lengths."""
    made = []
    for i in range(count):
        wanted = Sampling(**({"max_tokens": 3 + 5 * i % 24, "ignore_end": True, "seed": i} | sampling))
        made.append(ask(base, f"crowd{i}", wanted, KINDS[i % len(KINDS)], PROMPT[i % 9 :] * (1 + i % 3), f"t{i % 3}"))
    return made
