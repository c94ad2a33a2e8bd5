"""The memory plan of a run: what each worker will hold, before anything is loaded. No torch.

    plan = make_plan(run, shapes)
    plan.trained, plan.total_gib, plan.fits

Weights, trained parameters, gradients and optimizer states are exact; activations follow a formula whose terms were
checked against the tensors that autograd saves (`activations.py`); the rest is marked as assumed. Rows are taken at
their longest, so a run with shorter rows needs less.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ftray.config import LOW_RANK, Run
from ftray.model.activations import COMPUTE_BYTES, micro_batch_tokens, saved_bytes, working_bytes
from ftray.model.counts import targeted, trained_tensors
from ftray.model.shapes import Shapes

GIB = 1 << 30

LOSS_CHUNK_TOKENS = 1024
"""Target tokens whose logits exist at once: the loss computes them chunk by chunk."""
LOGIT_BYTES = 12
"""Of each logit in a chunk: an fp32 copy and its softmax beside logits and gradient in bf16; or logits, softmax and
gradient in fp32."""

NF4_BLOCK = 64
"""Weights that share one scale (Dettmers et al. 2023, section 3)."""
SCALE_BLOCK = 256
"""Scales that share one scale of theirs in double quantization."""
EIGHT_BIT_BLOCK = 256
"""States of an 8-bit optimizer that share one fp32 scale (Dettmers et al. 2022)."""
EIGHT_BIT_MINIMUM = 4096
"""bitsandbytes keeps smaller tensors' states in fp32 (`min_8bit_size`)."""

CONTEXT_BYTES = int(0.75 * GIB)
"""Assumed: the CUDA context with the libraries' workspaces, or the libraries themselves in a CPU process."""
SLACK = 0.05
"""Assumed: what an allocator loses to fragmentation, as a share of all it gives out."""


@dataclass(frozen=True)
class Item:
    name: str
    bytes: int
    how: str
    """The arithmetic behind it, for the reader."""
    pageable: bool = False
    """The driver may move it to the host's memory when the GPU's is full."""


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
        return sum(item.bytes for item in self.items) / GIB

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
            "items": [{"name": i.name, "bytes": i.bytes, "how": i.how, "pageable": i.pageable} for i in self.items],
            "total_gib": self.total_gib,
            "limit_gib": self.limit_gib,
            "fits": self.fits,
        }


def make_plan(run: Run, shapes: Shapes) -> Plan:
    """The plan of one worker. Raises ModelError when the method's targets match nothing in the base."""
    tensors = trained_tensors(run, shapes)
    items = [item for item in _items(run, shapes, tensors) if item.bytes]
    slack = Item("allocator's slack", int(SLACK * sum(i.bytes for i in items)), f"{SLACK:.0%} of the above, assumed")
    context = Item("context", CONTEXT_BYTES, "device context and libraries, assumed")
    return Plan(
        parameters=shapes.parameters,
        trained=sum(tensors),
        adds=isinstance(run.method, LOW_RANK),
        unquantized=tuple(shapes.unquantized()) if run.method.quantized else (),
        tokens=micro_batch_tokens(run),
        items=(*items, slack, context),
        limit_gib=run.workers.gpu_memory_gib,
    )


def nf4_bytes(weights: int, double_quantization: bool) -> int:
    """Memory of one weight matrix in NF4: 4 bits each, and one scale a block of 64: fp32, or with double quantization
    8 bits and an fp32 scale for 256 of them, which is 0.5 or 0.127 bits a weight."""
    scales = math.ceil(weights / NF4_BLOCK)
    scale_bytes = scales + 4 * math.ceil(scales / SCALE_BLOCK) if double_quantization else 4 * scales
    return math.ceil(weights / 2) + scale_bytes


def optimizer_bytes(tensors: list[int], optimizer: str) -> int:
    """Memory of both of Adam's states for tensors of these sizes."""
    if not optimizer.endswith("8bit"):
        return 8 * sum(tensors)
    small = sum(n for n in tensors if n < EIGHT_BIT_MINIMUM)
    large = [n for n in tensors if n >= EIGHT_BIT_MINIMUM]
    return 8 * small + sum(2 * n + 2 * 4 * math.ceil(n / EIGHT_BIT_BLOCK) for n in large)


def _items(run: Run, shapes: Shapes, tensors: list[int]) -> Iterator[Item]:
    trained = sum(tensors)
    yield from _weights(run, shapes)
    if isinstance(run.method, LOW_RANK):
        yield Item("adapter weights", 4 * trained, f"{trained:,} parameters × 4 B (fp32)")
    yield Item("gradients", 4 * trained, f"{trained:,} × 4 B (fp32)")
    states = optimizer_bytes(tensors, run.train.optimizer)
    paged = run.train.optimizer.startswith("paged")
    how = f"{run.train.optimizer}: {states / trained:.2f} B a trained parameter" + (", may move to the host" * paged)
    yield Item("optimizer states", states, how, pageable=paged)
    if run.train.precision == "bf16":
        copied = trained if isinstance(run.method, LOW_RANK) else sum(layer.weights for layer in shapes.linears)
        yield Item("bf16 copies of trained weights", 2 * copied, f"{copied:,} × 2 B, made by autocast")
    saved, how = saved_bytes(run, shapes, targeted(run, shapes))
    yield Item("activations", saved, how)
    yield Item("working set", working_bytes(run, shapes), "the largest layer's weights or gradients in flight")
    rows = min(LOSS_CHUNK_TOKENS, micro_batch_tokens(run))
    how = f"{rows:,} target tokens × {shapes.vocabulary:,} × {LOGIT_BYTES} B"
    yield Item("logits, one chunk", rows * shapes.vocabulary * LOGIT_BYTES, how)
    if not isinstance(run.method, LOW_RANK):
        head = shapes.head.weights
        yield Item("gradient of the head, a chunk's and the sum", 2 * 4 * head, f"2 × {head:,} × 4 B")


def _weights(run: Run, shapes: Shapes) -> Iterator[Item]:
    method = run.method
    if not isinstance(method, LOW_RANK):
        yield Item("weights", 4 * shapes.parameters, f"{shapes.parameters:,} parameters × 4 B (fp32, trained)")
        return
    each = COMPUTE_BYTES[run.train.precision]
    if not method.quantized:
        yield Item("weights", each * shapes.parameters, f"{shapes.parameters:,} parameters × {each} B, frozen")
        return
    held = [layer.weights for layer in shapes.linears if layer.fits_nf4]
    size = sum(nf4_bytes(n, method.double_quantization) for n in held)  # type: ignore[union-attr]
    yield Item("weights in NF4", size, f"{sum(held):,} parameters × {8 * size / max(1, sum(held)):.3f} bits")
    rest = shapes.parameters - sum(held)
    yield Item("weights not quantized", each * rest, f"{rest:,} × {each} B: embeddings, norms, head, odd shapes")
