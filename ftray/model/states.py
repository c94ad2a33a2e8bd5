"""Memory of what a run holds from its first step to its last: weights, gradients, optimizer states. No torch.

T trained parameters, W workers. Where every worker holds the whole model (DDP): frozen weights in `train.precision`,
trained ones 4 T bytes (fp32), gradients 4 T, Adam's states 8 T. DeepSpeed ZeRO adds masters of 4 T, and divides, by
stage, states and masters (1), gradients (2), weights (3) by W.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ftray.config import Run, Strategy, VeRA
from ftray.model.activations import COMPUTE_BYTES
from ftray.model.shapes import Shapes

GIB = 1 << 30
Place = Literal["GPU", "host", "NVMe"]
PLACES: tuple[Place, ...] = ("GPU", "host", "NVMe")
_PLACES: dict[str, Place] = {"none": "GPU", "cpu": "host", "nvme": "NVMe"}

NF4_BLOCK = 64
"""Weights that share one scale (Dettmers et al. 2023, section 3)."""
SCALE_BLOCK = 256
"""Scales that share one scale of theirs in double quantization."""
EIGHT_BIT_BLOCK = 256
"""States of an 8-bit optimizer that share one fp32 scale (Dettmers et al. 2022)."""
EIGHT_BIT_MINIMUM = 4096
"""bitsandbytes keeps smaller tensors' states in fp32 (`min_8bit_size`)."""


NVME_GROUP = 100_000_000
"""Elements of the optimizer that are on their way between NVMe and memory at once."""


@dataclass(frozen=True)
class Item:
    name: str
    bytes: int
    how: str
    """The arithmetic behind it, for the reader."""
    place: Place = "GPU"
    """`GPU` is the workers' device, which may be a CPU."""
    pageable: bool = False
    """The driver may move it to the host's memory when the GPU's is full."""
    stays: bool = False
    """It is there from the first step to the last: weights, gradients, optimizer."""


def states(run: Run, shapes: Shapes, tensors: Sequence[int]) -> Iterator[Item]:
    """What one worker holds; `tensors` are the elements of every trained tensor."""
    strategy = run.strategy if run.strategy and run.strategy.zero else None  # 0 divides nothing
    held = _divided(run, strategy, shapes, sum(tensors)) if strategy else _whole(run, shapes, tensors)
    yield from (replace(item, stays=True) for item in held)


def _whole(run: Run, shapes: Shapes, tensors: Sequence[int]) -> Iterator[Item]:
    trained, each = sum(tensors), COMPUTE_BYTES[run.train.precision]
    mezo = run.train.optimizer == "mezo"
    if run.method.frozen_base:
        yield from _frozen(run, shapes)
        yield Item("adapter weights", 4 * trained, f"{trained:,} parameters × 4 B (fp32)")
        if isinstance(run.method, VeRA):
            widest = max(layer.inputs for layer in shapes.linears) + max(layer.outputs for layer in shapes.linears)
            size = 4 * run.method.rank * widest
            yield Item("shared projections", size, f"rank {run.method.rank} × {widest:,} × 4 B, the widest layers'")
    elif mezo and trained == shapes.parameters:
        yield Item("weights", each * trained, f"{trained:,} parameters × {each} B, moved in place")
    else:
        frozen = shapes.parameters - trained
        yield Item("weights", 4 * trained, f"{trained:,} parameters × 4 B (fp32, trained)")
        yield Item("weights not trained", each * frozen, f"{frozen:,} parameters × {each} B, frozen")
    if mezo:
        return
    yield Item("gradients", 4 * trained, f"{trained:,} × 4 B (fp32)")
    still = run.train.optimizer == "sgd" and run.train.momentum == 0
    size = 0 if still else optimizer_bytes(tensors, run.train.optimizer)
    paged = run.train.optimizer.startswith("paged")
    how = f"{run.train.optimizer}: {size / trained:.2f} B a trained parameter" + (", may move to the host" * paged)
    yield Item("optimizer states", size, how, pageable=paged)


def _frozen(run: Run, shapes: Shapes, workers: int = 1, place: Place = "GPU") -> Iterator[Item]:
    """A frozen base, divided among `workers`, in `place`; one in NF4 is neither divided nor moved."""
    each = COMPUTE_BYTES[run.train.precision]
    if not run.method.quantized:
        size = each * shapes.parameters
        how = f"{shapes.parameters:,} parameters × {each} B{_over(workers)}, frozen"
        yield Item("weights", size // workers, how, place)
        return
    held = [layer.weights for layer in shapes.linears if layer.fits_nf4]
    twice: bool = getattr(run.method, "double_quantization")  # noqa: B009 - of every method that quantizes
    size = sum(nf4_bytes(n, twice) for n in held)
    yield Item("weights in NF4", size, f"{sum(held):,} parameters × {8 * size / max(1, sum(held)):.3f} bits")
    rest = shapes.parameters - sum(held)
    yield Item("weights not quantized", each * rest, f"{rest:,} × {each} B: embeddings, norms, head, odd shapes")


def _divided(run: Run, strategy: Strategy, shapes: Shapes, trained: int) -> Iterator[Item]:
    workers = run.workers.least
    by_1, by_2, by_3 = (workers if strategy.zero >= stage else 1 for stage in (1, 2, 3))
    held, updated = _PLACES[strategy.offload_parameters], _PLACES[strategy.offload_optimizer]
    if run.method.frozen_base:
        yield from _frozen(run, shapes, by_3, held)
        yield Item("adapter weights", 4 * trained // by_3, f"{trained:,} parameters × 4 B{_over(by_3)}", held)
    else:
        each, frozen = COMPUTE_BYTES[run.train.precision], shapes.parameters - trained
        each = 4 if strategy.zero == 3 else each  # all weights in one type
        yield Item("weights", 4 * trained // by_3, f"{trained:,} parameters × 4 B{_over(by_3)}", held)
        yield Item("weights not trained", each * frozen // by_3, f"{frozen:,} × {each} B{_over(by_3)}", held)
    offloaded = updated != "GPU"
    if strategy.zero < 2 or not offloaded:
        yield Item("gradients", 4 * trained // by_2, f"{trained:,} × 4 B (fp32){_over(by_2)}")
    if offloaded:  # measured: what is added up and what is handed to the optimizer lie apart
        each = 4 if updated == "NVMe" else 12 if strategy.zero == 2 else 8
        yield Item(
            "gradients on the host", each * trained // workers, f"{trained:,} × {each} B{_over(workers)}", "host"
        )
    yield Item("fp32 master weights", 4 * trained // by_1, f"{trained:,} × 4 B{_over(by_1)}", updated)
    size = 8 * trained if run.train.optimizer == "adamw" else 4 * trained
    yield Item("optimizer states", size // by_1, f"{trained:,} × {size // trained} B{_over(by_1)}", updated)
    if updated == "NVMe":
        passing = min(NVME_GROUP, trained // by_1)
        yield Item("on their way to and from NVMe", 16 * passing, f"4 buffers of {passing:,} × 4 B", "host")


def _over(workers: int) -> str:
    return f" / {workers} workers" if workers > 1 else ""


def nf4_bytes(weights: int, double_quantization: bool) -> int:
    """Memory of one weight matrix in NF4: 4 bits each, and one scale a block of 64: fp32, or with double quantization
    8 bits and an fp32 scale for 256 of them, which is 0.5 or 0.127 bits a weight."""
    scales = math.ceil(weights / NF4_BLOCK)
    scale_bytes = scales + 4 * math.ceil(scales / SCALE_BLOCK) if double_quantization else 4 * scales
    return math.ceil(weights / 2) + scale_bytes


def optimizer_bytes(tensors: Sequence[int], optimizer: str) -> int:
    """Memory of an optimizer's states for tensors of these sizes: two of Adam, one of SGD with momentum and of Lion,
    all fp32 but the 8-bit ones; Adafactor's rows and columns are left out, which is less than a thousandth."""
    if optimizer in ("sgd", "lion"):
        return 4 * sum(tensors)
    if optimizer in ("adafactor", "mezo"):
        return 0
    if not optimizer.endswith("8bit"):
        return 8 * sum(tensors)
    small = sum(n for n in tensors if n < EIGHT_BIT_MINIMUM)
    large = [n for n in tensors if n >= EIGHT_BIT_MINIMUM]
    return 8 * small + sum(2 * n + 2 * 4 * math.ceil(n / EIGHT_BIT_BLOCK) for n in large)
