"""What an engine holds beside its base, and whether there is room for it. No torch.

    plan = memory_plan(shapes, options, quantized=True, precision="bf16", gpu=True, adapters=True)
    plan.total_gib

Weights, keys and values are exact, from shapes alone. What adapters take nobody knows before they are read; there, and
for the rest, the plan says what it assumes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from ftray.engine.options import EngineOptions
from ftray.errors import ModelError
from ftray.model.activations import COMPUTE_BYTES
from ftray.model.plan import CONTEXT_BYTES, SLACK
from ftray.model.shapes import Shapes
from ftray.model.states import GIB, Item, nf4_bytes

PAGE = 64
"""Places of a slot that lie together: a slot has whole pages."""
RANK = 16
"""Assumed of adapters: this rank, on every linear layer."""
SCORE_BYTES = {2: 10, 4: 8}
"""Of each score while a prompt is read, by the bytes of a number: itself, in fp32 and the softmax; in fp32 itself and
the softmax. Measured on a CPU with all else that `slots._read` holds, 256 tokens of 1,024: 10.5 and 9.1."""
LOGIT_BYTES = 8
"""Of each logit beside itself: a copy in fp32 and its softmax."""


@dataclass(frozen=True)
class Need:
    """What slots take, and reading prompts into them."""

    slots: int
    context: int
    """Places of a slot."""
    prompt_tokens: int
    """Of one step, at most."""
    heads: int
    token: int
    """Bytes of one token's keys and values in all layers."""
    each: int
    """Bytes of a number."""

    @property
    def pages(self) -> int:
        return -(-self.context // PAGE)

    @property
    def kept(self) -> int:
        """Bytes of keys and values."""
        return self.slots * self.pages * PAGE * self.token

    @property
    def scores(self) -> int:
        """Bytes of the attention of one layer while the longest piece of a prompt is read."""
        return self.heads * min(self.prompt_tokens, self.context) * self.context * SCORE_BYTES[self.each]

    def fits(self, free: int) -> bool:
        return self.kept + self.scores <= free

    def refuse(self, free: int | None, where: str) -> None:
        """Raises ModelError where that is more than the `free` bytes of `where`; None: nobody knows."""
        if free is None or self.fits(free):
            return
        fewer = (replace(self, slots=n) for n in range(self.slots - 1, 0, -1))
        shorter = (replace(self, context=n * PAGE) for n in range(self.pages - 1, 0, -1))
        smaller = [f"engine.slots={it.slots}" for it in fewer if it.fits(free)][:1]
        smaller += [f"engine.context={it.context}" for it in shorter if it.fits(free)][:1]
        raise self.too_much(f"{where} has {free / GIB:,.2f} GiB free", " or ".join(smaller))

    def too_much(self, why: str, fits: str = "") -> ModelError:
        return ModelError(
            f"engine.slots {self.slots:,} × engine.context {self.context:,} take {self.kept / GIB:,.2f} GiB of keys and"
            f" values, and reading a prompt {self.scores / GIB:,.2f} GiB; {why}",
            where="engine.slots, engine.context",
            hint=f"{fits} fits" if fits else "lower them, or take a smaller base or a larger device",
        )


@dataclass(frozen=True)
class MemoryPlan:
    need: Need
    items: tuple[Item, ...]

    @property
    def total_gib(self) -> float:
        """On the replica's GPU, or of its process where there is none."""
        return sum(item.bytes for item in self.items if item.place == "GPU") / GIB

    def to_json(self) -> dict[str, Any]:
        return {
            "slots": self.need.slots,
            "context": self.need.context,
            "prompt_tokens": self.need.prompt_tokens,
            "items": [{"name": i.name, "bytes": i.bytes, "how": i.how, "place": i.place} for i in self.items],
            "total_gib": self.total_gib,
        }


def memory_plan(
    shapes: Shapes,
    options: EngineOptions,
    *,
    quantized: bool,
    precision: Literal["bf16", "fp32"],
    gpu: bool,
    adapters: bool,
) -> MemoryPlan:
    """What one replica takes at most. Without `adapters` it serves the base alone."""
    each = COMPUTE_BYTES[precision]
    need = Need(
        slots=options.slots,
        context=options.places(shapes.positions),
        prompt_tokens=options.reads(gpu),
        heads=shapes.heads,
        token=2 * shapes.layers * shapes.kv_heads * shapes.head_dim * each,
        each=each,
    )
    items = [*_weights(shapes, quantized, each), *_in_use(shapes, need)]
    if adapters:
        items.append(_pools(shapes, options.adapters or options.slots, each))
    slack = int(SLACK * sum(item.bytes for item in items))
    items.append(Item("allocator's slack", slack, f"{SLACK:.0%} of the above, assumed"))
    items.append(Item("libraries", CONTEXT_BYTES, "device context and libraries, assumed"))
    if adapters:
        items.append(Item("adapters in memory", options.adapter_memory, "engine.adapter_memory, at most", "host"))
    return MemoryPlan(need, tuple(items))


def _weights(shapes: Shapes, quantized: bool, each: int) -> Iterator[Item]:
    held = [layer.weights for layer in shapes.linears if quantized and layer.fits_nf4]
    if held:
        yield Item("weights in NF4", sum(nf4_bytes(n, True) for n in held), f"{sum(held):,} parameters")
    rest = shapes.parameters - sum(held)
    how = f"{rest:,} × {each} B" + (": embeddings, norms, head, odd shapes" if held else "")
    yield Item("weights not quantized" if held else "weights", each * rest, how)


def _in_use(shapes: Shapes, need: Need) -> Iterator[Item]:
    how = f"{need.slots:,} slots × {need.pages * PAGE:,} places × {need.token:,} B"
    yield Item("keys and values", need.kept, how)
    read = min(need.prompt_tokens, need.context)
    how = f"{need.heads} heads × {read:,} tokens × {need.context:,} places × {SCORE_BYTES[need.each]} B"
    yield Item("scores of a prompt", need.scores, how)
    width = 2 * shapes.hidden + 3 * shapes.intermediate
    how = f"{need.prompt_tokens:,} tokens × {width:,} × {need.each} B, assumed"
    yield Item("activations of a step", need.prompt_tokens * width * need.each, how)
    logit = need.each + LOGIT_BYTES
    how = f"{need.slots:,} slots × {shapes.vocabulary:,} × {logit} B"
    yield Item("logits", need.slots * shapes.vocabulary * logit, how)


def _pools(shapes: Shapes, count: int, each: int) -> Item:
    blocks = 1 << (count - 1).bit_length()  # pools grow by doubling
    one = RANK * each * sum(layer.inputs + layer.outputs for layer in shapes.linears)
    return Item("adapters on the device", blocks * one, f"{blocks:,} × {one:,} B: rank {RANK} on every linear, assumed")
