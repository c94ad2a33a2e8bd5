"""The memory plan of a run: what each worker will hold, before anything is loaded. No torch.

    plan = make_plan(run, shapes)
    plan.trained, plan.total_gib, plan.fits

Weights, trained parameters, gradients and optimizer states (`states.py`) are exact; activations follow a formula whose
terms were checked against the tensors that autograd saves (`activations.py`); the rest is marked as assumed. Rows are
taken at their longest, so a run with shorter rows needs less.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ftray.config import DPO, Freeze, Full, Run, Strategy
from ftray.model.activations import COMPUTE_BYTES, micro_batch_tokens, saved_bytes, working_bytes
from ftray.model.counts import targeted, trained_tensors
from ftray.model.positions import refuse_positions
from ftray.model.shapes import Shapes
from ftray.model.states import GIB, PLACES, Item, Place, optimizer_bytes, states

LOSS_CHUNK_TOKENS = 1024
"""Target tokens whose logits exist at once: the loss computes them chunk by chunk."""
LOGIT_BYTES = 12
"""Of each logit in a chunk: an fp32 copy and its softmax beside logits and gradient in bf16; or logits, softmax and
gradient in fp32."""

CONTEXT_BYTES = int(0.75 * GIB)
"""Assumed: the CUDA context with the libraries' workspaces, or the libraries themselves in a CPU process."""
SHOWN_COMMIT = GIB // 4
"""A copy of what a commit holds counts in the plan from this size on, in bytes."""
SLACK = 0.05
"""Assumed: what an allocator loses to fragmentation, as a share of all it gives out."""


@dataclass(frozen=True)
class Plan:
    parameters: int
    """Of the base."""
    trained: int
    """Parameters that the method trains."""
    adds: bool
    """They are added to the base's; false: they are the base's own."""
    unquantized: tuple[str, ...]
    """Linear layers that NF4 cannot hold. Empty without quantization."""
    tokens: int
    """Tokens of one worker's micro-batch, at most."""
    items: tuple[Item, ...]
    limit_gib: float | None
    """`workers.gpu_memory_gib`."""

    @property
    def all_parameters(self) -> int:
        """Of the base and what the method adds to it."""
        return self.parameters + (self.trained if self.adds else 0)

    @property
    def share(self) -> float:
        """Trained parameters as a share of all."""
        return self.trained / self.all_parameters

    @property
    def total_gib(self) -> float:
        """On the worker's GPU, or of its process where there is none."""
        return self.gib_on("GPU")

    def gib_on(self, place: Place) -> float:
        return sum(item.bytes for item in self.items if item.place == place) / GIB

    @property
    def states_gib(self) -> dict[str, float]:
        """What the run holds from its first step to its last, by place: weights, gradients, optimizer."""
        return {p: sum(i.bytes for i in self.items if i.place == p and i.stays) / GIB for p in PLACES}

    @property
    def pageable_gib(self) -> float:
        return sum(item.bytes for item in self.items if item.pageable) / GIB

    @property
    def fits(self) -> bool | None:
        """None: nothing to compare with. Paged optimizer states need not fit."""
        return None if self.limit_gib is None else self.total_gib - self.pageable_gib <= self.limit_gib

    def to_json(self) -> dict[str, Any]:
        return {
            "parameters": self.parameters,
            "trained_parameters": self.trained,
            "all_parameters": self.all_parameters,
            "trained_share": self.share,
            "unquantized": list(self.unquantized),
            "micro_batch_tokens": self.tokens,
            "items": [
                {"name": i.name, "bytes": i.bytes, "how": i.how, "place": i.place, "pageable": i.pageable}
                for i in self.items
            ],
            "total_gib": self.total_gib,
            "host_gib": self.gib_on("host"),
            "nvme_gib": self.gib_on("NVMe"),
            "states_gib": self.states_gib,
            "limit_gib": self.limit_gib,
            "fits": self.fits,
        }


def make_plan(run: Run, shapes: Shapes) -> Plan:
    """The plan of one worker. Raises ModelError when the method's targets match nothing in the base, or the rows, with
    virtual tokens, are longer than the base's positions."""
    refuse_positions(run, shapes.positions, shapes.learned_positions)
    tensors = trained_tensors(run, shapes)
    items = [item for item in _items(run, shapes, tensors) if item.bytes]
    given = sum(i.bytes for i in items if i.place == "GPU")
    slack = Item("allocator's slack", int(SLACK * given), f"{SLACK:.0%} of the above, assumed")
    context = Item("context", CONTEXT_BYTES, "device context and libraries, assumed")
    return Plan(
        parameters=shapes.parameters,
        trained=sum(tensors),
        adds=run.method.frozen_base,
        unquantized=tuple(shapes.unquantized()) if run.method.quantized else (),
        tokens=micro_batch_tokens(run),
        items=(*items, slack, context),
        limit_gib=run.workers.gpu_memory_gib,
    )


def _items(run: Run, shapes: Shapes, tensors: list[int]) -> Iterator[Item]:
    method, trained = run.method, sum(tensors)
    yield from states(run, shapes, tensors)
    if run.train.precision == "bf16" and run.train.optimizer != "mezo":
        copied = trained if method.frozen_base else min(trained, sum(layer.weights for layer in shapes.linears))
        how = f"{copied:,} × 2 B, made by autocast"
        if run.strategy and run.strategy.zero == 3 and run.train.gradient_checkpointing:
            copied, how = copied // shapes.layers, f"{copied:,} × 2 B / {shapes.layers} layers, one block's at a time"
        yield Item("bf16 copies of trained weights", 2 * copied, how)
    if not (run.strategy and run.strategy.zero):  # there a commit is gathered tensor by tensor, onto the disk
        still = run.train.optimizer == "mezo" or (run.train.optimizer == "sgd" and run.train.momentum == 0)
        size = 4 * trained + (0 if still else optimizer_bytes(tensors, run.train.optimizer))
        if size >= SHOWN_COMMIT:
            how = "weights and optimizer states of the first worker, copied; on the disk where memory is short"
            yield Item("commit under way", size, how, "host")
    if run.strategy:
        yield from _buffers(run, run.strategy, shapes, trained)
    yield _activations(run, shapes)
    yield Item("working set", working_bytes(run, shapes), "the largest layer's weights or gradients in flight")
    rows = min(LOSS_CHUNK_TOKENS, micro_batch_tokens(run))
    how = f"{rows:,} target tokens × {shapes.vocabulary:,} × {LOGIT_BYTES} B"
    yield Item("logits, one chunk", rows * shapes.vocabulary * LOGIT_BYTES, how)
    trains_head = isinstance(method, Full) or (isinstance(method, Freeze) and (method.head or method.embeddings))
    if trains_head and run.train.optimizer != "mezo":
        head = shapes.head.weights
        yield Item("gradient of the head, a chunk's and the sum", 2 * 4 * head, f"2 × {head:,} × 4 B")
    if isinstance(run.objective, DPO) and not method.frozen_base and not run.objective.reference_free:
        each = COMPUTE_BYTES[run.train.precision]
        yield Item("frozen reference", each * trained, f"{trained:,} trained parameters × {each} B")


def _activations(run: Run, shapes: Shapes) -> Item:
    """As they are, and what they would be the other way, with checkpointing or without."""
    targets, recomputed = targeted(run, shapes), run.train.gradient_checkpointing
    saved, how = saved_bytes(run, shapes, targets)
    train = run.train.model_copy(update={"gradient_checkpointing": not recomputed})
    other, _ = saved_bytes(run.model_copy(update={"train": train}), shapes, targets)
    if saved:
        how += f"; {other / GIB:,.2f} GiB {'without' if recomputed else 'with'} gradient_checkpointing"
    return Item("activations", saved, how)


def _buffers(run: Run, strategy: Strategy, shapes: Shapes, trained: int) -> Iterator[Item]:
    """What DeepSpeed holds for communication, and weights that ZeRO 3 gathered and keeps for a while."""
    bucket = min(strategy.bucket_elements, trained)
    if strategy.zero:
        yield Item("communication bucket", 4 * bucket, f"{bucket:,} × 4 B")
    if strategy.zero == 3:
        each = COMPUTE_BYTES[run.train.precision] if run.method.frozen_base else 4
        largest = max([shapes.head.weights, *(layer.weights for layer in shapes.linears)])
        kept = min(max(strategy.keep_elements, largest), shapes.parameters)
        yield Item("gathered weights", each * kept, f"{kept:,} × {each} B: keep_elements, or the largest layer")
