"""How many parameters a method trains on a base, tensor by tensor, from the base's shapes alone. No torch.

sum(trained_tensors(run, shapes))
"""

from __future__ import annotations

from collections.abc import Iterator

from ftray.config import LOW_RANK, Run
from ftray.config.methods import (
    IA3,
    AdaLoRA,
    Bottleneck,
    DoRA,
    Freeze,
    Full,
    Prefix,
    Prompt,
    PTuning,
    QDoRA,
    VeRA,
)
from ftray.model.shapes import Linear, Shapes
from ftray.model.targets import check_patterns, ends_with, ia3_targets, rank_of, select, unfrozen


def targeted(run: Run, shapes: Shapes) -> list[Linear]:
    """The linear layers that the run's method adapts, none where it adapts none. Raises ModelError."""
    method = run.method
    by_path = {layer.path: layer for layer in shapes.linears}
    if isinstance(method, IA3):
        paths = select(ia3_targets(method, shapes.family, by_path)[0], by_path)
    elif isinstance(method, AdaLoRA | VeRA):
        paths = select(method.targets, by_path)
    elif isinstance(method, LOW_RANK):
        paths = select(method.targets, by_path)
        check_patterns(method, paths)
    else:
        return []
    return [by_path[path] for path in paths]


def trained_tensors(run: Run, shapes: Shapes) -> list[int]:
    """Elements of every trained tensor; in full tuning embeddings and norms count as one tensor each. Raises ModelError
    when the method's targets match nothing in the base."""
    method = run.method
    if isinstance(method, Full):
        layers = [*shapes.linears] if shapes.tied else [*shapes.linears, shapes.head]
        pieces = [n for layer in layers for n in (layer.weights, layer.parameters - layer.weights)]
        return [n for n in (shapes.embeddings, shapes.norms, *pieces) if n]
    if isinstance(method, Freeze):
        sizes = {name: (elements, kind) for name, elements, kind in _parameters(shapes)}
        chosen = unfrozen(method, [(name, kind) for name, (_, kind) in sizes.items()], shapes.layers)
        return [sizes[name][0] for name in chosen]
    if isinstance(method, Prefix | Prompt | PTuning):
        return list(_virtual(method, shapes))
    if isinstance(method, Bottleneck):
        places = shapes.layers * (2 if method.placement == "houlsby" else 1)
        h, size = shapes.hidden, method.size
        return [h * size, size, size * h, h] * places
    return [n for layer in targeted(run, shapes) for n in _of_target(run, shapes, layer)]


def _parameters(shapes: Shapes) -> Iterator[tuple[str, int, str]]:
    """(name, elements, kind) of each of the base's parameters."""
    for part in shapes.parts:
        yield part.path, part.elements, part.kind
    layers = [(layer, "linear") for layer in shapes.linears]
    for layer, kind in layers if shapes.tied else [*layers, (shapes.head, "head")]:
        yield f"{layer.path}.weight", layer.weights, kind
        if layer.bias:
            yield f"{layer.path}.bias", layer.outputs, kind


def _of_target(run: Run, shapes: Shapes, layer: Linear) -> list[int]:
    """A [rank, in] and B [out, rank], with DoRA's magnitude [out] or AdaLoRA's singular values [rank]; VeRA's vectors
    d [rank] and b [out]; IA3's factors of outputs, or of a feed-forward layer's inputs."""
    method = run.method
    if isinstance(method, IA3):
        feedforward = ia3_targets(method, shapes.family, [each.path for each in shapes.linears])[1]
        inner = any(ends_with(layer.path, name) for name in feedforward)
        return [layer.inputs if inner else layer.outputs]
    if isinstance(method, VeRA):
        return [method.rank, layer.outputs]
    if isinstance(method, AdaLoRA):
        return [method.rank * layer.inputs, method.rank, method.rank * layer.outputs]
    assert isinstance(method, LOW_RANK)
    rank = rank_of(layer.path, method)
    magnitude = [layer.outputs] if isinstance(method, DoRA | QDoRA) else []
    return [rank * layer.inputs, rank * layer.outputs, *magnitude]


def _virtual(method: Prefix | Prompt | PTuning, shapes: Shapes) -> Iterator[int]:
    """Embeddings of the virtual tokens (or keys and values of all layers), and the encoder's weights and biases."""
    tokens, h = method.tokens, shapes.hidden
    if isinstance(method, Prompt):
        yield tokens * h
    elif isinstance(method, Prefix):
        width = shapes.kv_heads * shapes.head_dim
        every = shapes.layers * 2 * width
        if not method.projection:
            yield tokens * every
            return
        yield tokens * width
        yield from _dense(width, method.hidden or h)
        yield from _dense(method.hidden or h, every)
    else:
        w = method.hidden
        yield tokens * h
        if method.encoder == "mlp":
            for sizes in ((h, w), (w, w), (w, h)):
                yield from _dense(*sizes)
            return
        for layer in range(method.layers):  # an LSTM in both directions: four gates each, with two biases
            yield from 2 * [4 * w * (h if layer == 0 else 2 * w), 4 * w * w, 4 * w, 4 * w]
        yield from _dense(2 * w, 2 * w)
        yield from _dense(2 * w, h)


def _dense(inputs: int, outputs: int) -> list[int]:
    return [inputs * outputs, outputs]
