"""Which tensors an adapter holds: keys and shapes, from its `adapter_config.json` and the base's shapes. No torch.

    expected_tensors(json.loads(text), find_shapes(model)[0])

The keys are those of PEFT's files (0.21) and of `bottleneck.save`; tests compare them with artefacts of every method.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ftray.errors import ArtefactError, ModelError
from ftray.model.adapter_config import (
    AdaLoraSettings,
    BottleneckSettings,
    Ia3Settings,
    LoraSettings,
    OnLayers,
    PrefixSettings,
    Settings,
    VeraSettings,
    VirtualTokens,
    read_settings,
)
from ftray.model.shapes import Linear, Shapes
from ftray.model.targets import ATTENTION_PARTS, BOTTLENECK, FEED_FORWARD_PARTS, by_pattern, select

Expected = dict[str, tuple[int, ...]]
_FILE = "adapter_config.json"
_PEFT = "base_model.model."
"""What PEFT puts in front of the base's own paths."""
_IN_BLOCK = re.compile(r"^(.+?)\.(\d+)\.(\w+)\.")


def expected_tensors(adapter_config: dict[str, Any], base: Shapes) -> Expected:
    """{key: shape} of every tensor of the adapter on this base, and of no other. Raises ArtefactError for a
    configuration that is not allowed, or that does not fit the base."""
    return tensors_of(read_settings(adapter_config), base)


def tensors_of(settings: Settings, base: Shapes) -> Expected:
    """`expected_tensors` of a configuration that was read already."""
    if isinstance(settings, BottleneckSettings):
        return dict(_bottleneck(settings, base))
    if isinstance(settings, VirtualTokens):
        return _virtual(settings, base)
    layers = targeted(settings, base)
    if isinstance(settings, AdaLoraSettings):
        return dict(_adalora(settings, layers))
    if isinstance(settings, LoraSettings):
        return dict(_lora(settings, layers))
    if isinstance(settings, VeraSettings):
        return dict(_vera(settings, layers))
    assert isinstance(settings, Ia3Settings)
    return {
        f"{_PEFT}{layer.path}.ia3_l": (1, layer.inputs) if settings.scales_inputs(layer.path) else (layer.outputs, 1)
        for layer in layers
    }


def targeted(settings: OnLayers, base: Shapes) -> list[Linear]:
    """The linear layers that have an adapter, in the model's order. Raises ArtefactError."""
    by_path = {layer.path: layer for layer in base.linears}
    try:
        return [by_path[path] for path in select(settings.target_modules, by_path)]
    except ModelError as error:
        raise ArtefactError(error.what, where=f"{_FILE}: target_modules") from None


def _lora(settings: LoraSettings, layers: list[Linear]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for layer in layers:
        rank = by_pattern(layer.path, settings.rank_pattern, settings.r)
        yield f"{_PEFT}{layer.path}.lora_A.weight", (rank, layer.inputs)
        yield f"{_PEFT}{layer.path}.lora_B.weight", (layer.outputs, rank)
        if settings.use_dora:
            yield f"{_PEFT}{layer.path}.lora_magnitude_vector", (layer.outputs,)


def _adalora(settings: AdaLoraSettings, layers: list[Linear]) -> Iterator[tuple[str, tuple[int, ...]]]:
    left = settings.rank_pattern
    keys = {f"{layer.path}.lora_E" for layer in layers}
    if left is not None and (odd := sorted(keys ^ left.keys())):
        raise ArtefactError(
            f"its keys are not the targets of this base, for example {odd[0][:200]}", where=f"{_FILE}: rank_pattern"
        )
    for layer in layers:
        rank = settings.init_r if left is None else sum(left[f"{layer.path}.lora_E"])
        yield f"{_PEFT}{layer.path}.lora_A", (rank, layer.inputs)
        yield f"{_PEFT}{layer.path}.lora_B", (layer.outputs, rank)
        yield f"{_PEFT}{layer.path}.lora_E", (rank, 1)


def _vera(settings: VeraSettings, layers: list[Linear]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "base_model.vera_A", (settings.r, max(layer.inputs for layer in layers))
    yield "base_model.vera_B", (max(layer.outputs for layer in layers), settings.r)
    for layer in layers:
        yield f"{_PEFT}{layer.path}.vera_lambda_b", (layer.outputs,)
        yield f"{_PEFT}{layer.path}.vera_lambda_d", (settings.r,)


def _virtual(settings: VirtualTokens, base: Shapes) -> Expected:
    is_prefix = isinstance(settings, PrefixSettings)
    needed = {"token_dim": base.hidden, "num_layers": base.layers}
    if is_prefix:
        needed |= {"token_dim": base.kv_heads * base.head_dim, "num_attention_heads": base.kv_heads}
    for name, value in needed.items():
        if getattr(settings, name) != value:
            raise ArtefactError(f"{getattr(settings, name)} here, {value} in this base", where=f"{_FILE}: {name}")
    width = 2 * base.layers * settings.token_dim if is_prefix else settings.token_dim
    return {"prompt_embeddings": (settings.num_virtual_tokens, width)}


def _bottleneck(settings: BottleneckSettings, base: Shapes) -> Iterator[tuple[str, tuple[int, ...]]]:
    for place in bottleneck_places(settings.placement, base):
        adapter = f"{place}.{BOTTLENECK}"
        yield f"{adapter}.down.weight", (settings.size, base.hidden)
        yield f"{adapter}.down.bias", (settings.size,)
        yield f"{adapter}.up.weight", (base.hidden, settings.size)
        yield f"{adapter}.up.bias", (base.hidden,)


def bottleneck_places(placement: str, base: Shapes) -> list[str]:
    """Paths of the parts that adapters stand behind: attention (`houlsby` alone) and feed-forward part of every block.
    Raises ArtefactError for a base whose blocks are not known."""
    blocks: dict[str, dict[int, dict[str, None]]] = {}
    for path in [layer.path for layer in base.linears] + [part.path for part in base.parts]:
        if found := _IN_BLOCK.match(path):
            stack, number, child = found.groups()
            blocks.setdefault(stack, {}).setdefault(int(number), {})[child] = None
    stacks = [stack for stack, numbers in blocks.items() if sorted(numbers) == list(range(base.layers))]
    wanted = (ATTENTION_PARTS, FEED_FORWARD_PARTS) if placement == "houlsby" else (FEED_FORWARD_PARTS,)
    places = []
    for stack in stacks[:1]:
        for number, children in sorted(blocks[stack].items()):
            for names in wanted:
                parts = [child for child in children if child in names]
                if len(parts) != 1:
                    raise _unknown(base, f"a block has {', '.join(children)}")
                places.append(f"{stack}.{number}.{parts[0]}")
    if not places:
        raise _unknown(base, f"no list of {base.layers} blocks was found")
    return places


def _unknown(base: Shapes, why: str) -> ArtefactError:
    return ArtefactError(f"bottleneck adapters do not know where to stand in the family {base.family!r}: {why}")
