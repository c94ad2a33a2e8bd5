"""Small layers, and whose their tokens are, for the tests of pooled layers."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ftray.model.pooled import Route

CPU = torch.device("cpu")
IN, OUT = 12, 20

Segments = list[tuple[Hashable | None, int]]


def normal(seed: int, *shape: int, width: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * width


def a_linear(kind: str, inputs: int = IN, outputs: int = OUT) -> nn.Module:
    layer = Conv1D(outputs, inputs) if kind == "conv1d" else nn.Linear(inputs, outputs, bias=kind == "bias")
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters()):
            parameter.copy_(normal(i, *parameter.shape, width=0.3))
    return layer.requires_grad_(False)


def route_of(segments: Segments) -> Route:
    return Route(tuple(segments), CPU)
