"""Memory of activations: what the forward pass keeps for the backward pass. No torch.

The terms are those of Korthikanti et al. 2022 ("Reducing Activation Recomputation in Large Transformer Models", section
4.1), written down anew for this code: packed rows without padding, attention that keeps no score matrix, norms in fp32
inside, and only those inputs of linear layers that a trained weight needs. Each term was compared with the tensors that
autograd saves for a four-layer model of each family (torch 2.13, transformers 5.23, PEFT 0.21). Only on CPUs short rows
in bf16 keep scores too.

h is the hidden size, f the width of the feed-forward part, q and k the widths of all queries and all keys.
"""

from __future__ import annotations

from collections.abc import Sequence

from ftray.config import (
    IA3,
    LOW_RANK,
    AdaLoRA,
    Bottleneck,
    DoRA,
    Freeze,
    Full,
    Prompt,
    PTuning,
    QDoRA,
    Run,
    VeRA,
)
from ftray.model.shapes import Linear, Shapes
from ftray.model.targets import rank_of

COMPUTE_BYTES = {"bf16": 2, "fp32": 4}
_PLAIN_NORM = ("gpt2", "gpt_neox")
"""Families with torch's LayerNorm, which keeps its input in the compute type."""


def micro_batch_tokens(run: Run) -> int:
    """Tokens that one worker puts through the model at once, if every row were as long as `data.max_length`; virtual
    tokens that go through every layer are among them."""
    rows = min(run.train.micro_batch_rows, -(-run.train.batch_rows // run.workers.least))
    virtual = run.method.tokens if isinstance(run.method, Prompt | PTuning) else 0
    sequences = 2 if run.objective.name == "dpo" else 1  # a pair is one row
    return rows * sequences * (run.data.max_length + virtual)


def layers_with_gradients(run: Run, shapes: Shapes) -> int:
    """Layers that the backward pass goes through: from the lowest one with a trained parameter to the top."""
    method = run.method
    if run.train.optimizer == "mezo":
        return 0
    if isinstance(method, Freeze) and not (method.norms or method.embeddings or method.also):
        return min(method.blocks, shapes.layers)
    return shapes.layers


def saved_bytes(run: Run, shapes: Shapes, targets: Sequence[Linear]) -> tuple[int, str]:
    """(bytes kept for the backward pass, the arithmetic in words)."""
    tokens, compute = micro_batch_tokens(run), COMPUTE_BYTES[run.train.precision]
    layers = layers_with_gradients(run, shapes)
    if run.train.optimizer == "mezo":
        return 0, "no backward pass"
    stream = 4 if isinstance(run.method, Full) else compute  # trained embeddings make an fp32 residual stream
    layer = layer_bytes(run, shapes, targets)
    ends = 2 * (4 + compute) * shapes.hidden  # last norm, hidden states of the targets and their gradient
    if run.train.gradient_checkpointing:
        each = stream * shapes.hidden
        how = f"{tokens:,} tokens × ({layers} block inputs × {each:,.0f} B + one block's {layer:,.0f} B)"
        return int(tokens * (layers * each + layer + ends)), how
    how = f"{tokens:,} tokens × {layers} layers × {layer:,.0f} B"
    return int(tokens * (layers * layer + ends)), how


def layer_bytes(run: Run, shapes: Shapes, targets: Sequence[Linear]) -> float:
    """Bytes that one layer keeps for each token, on average over the layers."""
    compute = COMPUTE_BYTES[run.train.precision]
    h, f = shapes.hidden, shapes.intermediate
    q, k = shapes.heads * shapes.head_dim, shapes.kv_heads * shapes.head_dim
    attention = compute * (2 * q + 2 * k) + 4 * shapes.heads  # q, k, v, output, log-sum-exp
    kept = 3 if shapes.gated else 4 if shapes.family == "gpt2" else 1  # gate, its activation, up; gelu_new's operations
    return attention + compute * kept * f + _norms(run, shapes, h, q, k) + _linear_inputs(run, shapes, targets)


def _norms(run: Run, shapes: Shapes, h: int, q: int, k: int) -> float:
    if shapes.family in _PLAIN_NORM:
        return 2 * h * COMPUTE_BYTES[run.train.precision]
    a_layer = (4 if shapes.family == "gemma2" else 2) * h + (q + k if shapes.family == "qwen3" else 0)
    return a_layer * 4 * (2 if isinstance(run.method, Full) else 1)  # a trained norm keeps its output's direction too


def _linear_inputs(run: Run, shapes: Shapes, targets: Sequence[Linear]) -> float:
    """Inputs of linear layers whose weights (or adapters) are trained, and what adapters keep besides. Layers that read
    the same tensor share it, unless each has a copy of its own: cast down by autocast, or thinned by dropout."""
    method, compute = run.method, COMPUTE_BYTES[run.train.precision]
    if isinstance(method, Full | Freeze):
        own = run.train.precision == "bf16"
        return compute * _input_widths(shapes.linears, own) / shapes.layers
    if isinstance(method, Bottleneck):  # its input, and both sides of the activation
        return compute * (2 if method.placement == "houlsby" else 1) * (shapes.hidden + 2 * method.size)
    if isinstance(method, IA3):  # what a factor multiplies
        return compute * sum(layer.outputs for layer in targets) / shapes.layers
    if isinstance(method, VeRA):  # A x, and B of it, which the two vectors multiply
        return compute * sum(method.rank + layer.outputs for layer in targets) / shapes.layers
    if isinstance(method, AdaLoRA):
        total = _input_widths(targets, own=method.dropout > 0) + 2 * method.rank * len(targets)
        return compute * total / shapes.layers
    if not isinstance(method, LOW_RANK):  # prefixes and prompts train no weight that reads an activation
        return 0.0
    total = compute * _input_widths(targets, own=method.dropout > 0)
    total += compute * sum(rank_of(layer.path, method) for layer in targets)
    if method.dropout:  # the mask: a byte on GPUs, scaled in the compute type on CPUs
        total += (compute if run.workers.gpus == 0 else 1) * sum(layer.inputs for layer in targets)
    if isinstance(method, DoRA | QDoRA):
        total += compute * 2 * sum(layer.outputs for layer in targets)
    return total / shapes.layers


def _input_widths(layers: Sequence[Linear], own: bool) -> int:
    if own:
        return sum(layer.inputs for layer in layers)
    return sum(width for _, width in {(_reads(layer.path), layer.inputs) for layer in layers})


def _reads(path: str) -> str:
    """The tensor that a layer reads, by name: queries, keys and values read one, gate and up another."""
    for shared in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
        if path.endswith(f".{shared}"):
            return path.rsplit(".", 1)[0]
    return path


def working_bytes(run: Run, shapes: Shapes) -> int:
    """What exists for a moment: gradients of one block's activations, or the largest dequantized weight beside them.
    DoRA forms a whole update of one layer, in fp32, for its norm."""
    compute = COMPUTE_BYTES[run.train.precision]
    width = (3 if shapes.gated else 2) * shapes.intermediate + 2 * shapes.hidden
    flight = micro_batch_tokens(run) * compute * width
    largest = max(shapes.linears, key=lambda layer: layer.weights, default=shapes.head)
    if run.method.quantized:
        flight += compute * largest.weights
    if isinstance(run.method, DoRA | QDoRA):
        flight += 4 * (2 * largest.weights + largest.inputs**2)
    return flight
