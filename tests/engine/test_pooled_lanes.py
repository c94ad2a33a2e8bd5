"""What lanes train in pooled layers, against each lane alone by plain autograd."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ftray.model.pooled import PooledLinear, Router
from ftray.model.trained import LowRankRows
from tests.engine.pooling import CPU, IN, OUT, a_linear, normal, route_of


def a_lane(rank: int, dora: bool, dropout: float, seed: int, inputs: int = IN, outputs: int = OUT) -> LowRankRows:
    down, up = normal(seed, rank, inputs), normal(seed + 1, outputs, rank)
    gain = 1 + normal(seed + 2, outputs) / 4 if dora else None
    zeros = None if gain is None else torch.zeros_like(gain)
    return LowRankRows(down, up, torch.zeros_like(down), torch.zeros_like(up), 0.5 + seed % 3, dropout, gain, zeros)


def lane_alone(base: nn.Module, lane: LowRankRows, x: Tensor, seed: int) -> tuple[Tensor, list[Tensor]]:
    """(the layer's output for the lane's own tokens, the leaves of its weights), by plain autograd."""
    leaves = [t.clone().requires_grad_() for t in (lane.down, lane.up, lane.gain) if t is not None]
    torch.manual_seed(seed)
    dropped = nn.functional.dropout(x, lane.dropout)
    low = dropped @ leaves[0].T @ leaves[1].T * lane.scale
    if lane.gain is None:
        return base(x) + low, leaves
    bias = getattr(base, "bias", None)
    bias = torch.zeros(len(lane.gain)) if bias is None else bias
    return (base(x) - bias + low) * leaves[2] + bias, leaves


LANES = st.lists(st.tuples(st.integers(1, 4), st.booleans(), st.sampled_from([0.0, 0.3])), min_size=1, max_size=4)


@given(LANES, st.lists(st.tuples(st.integers(-1, 3), st.integers(1, 70)), min_size=1, max_size=6), st.data())
@settings(max_examples=60)
def test_gradients_of_lanes_are_those_of_each_alone(kinds, segments, data):
    """Segments of lanes, of none (-1) and of lanes that train nothing at this layer, a lane more than once."""
    kind, seed = data.draw(st.sampled_from(["bias", "no bias", "conv1d"])), data.draw(st.integers(0, 1 << 20))
    router = Router()
    pooled = PooledLinear(a_linear(kind).requires_grad_(False), router, torch.float32, CPU)
    lanes = {i: a_lane(rank, dora, dropout, seed + 10 * i) for i, (rank, dora, dropout) in enumerate(kinds)}
    pooled.trained.update(lanes)
    route = route_of([(None if key < 0 else key, count) for key, count in segments])
    route.generators = tuple(torch.Generator().manual_seed(i) for i in range(len(segments)))
    total = sum(count for _, count in segments)
    x, weights = normal(seed, total, IN).requires_grad_(), normal(seed + 1, total, OUT)
    router.route = route
    out = pooled(x)
    (out * weights).sum().backward()
    start, expected = 0, {key: [torch.zeros_like(t) for t in gradients(lane)] for key, lane in lanes.items()}
    for i, (key, count) in enumerate(segments):
        part = slice(start, start + count)
        own = x.detach()[part].clone().requires_grad_()
        alone, leaves = lane_alone(pooled.base, lanes[key], own, i) if key in lanes else (pooled.base(own), [])
        close_gradient(out[part], alone)
        (alone * weights[part]).sum().backward()
        close_gradient(x.grad[part], own.grad)
        for mine, leaf in zip(expected.get(key, []), leaves, strict=True):
            mine += leaf.grad
        start += count
    for key, lane in lanes.items():
        for mine, theirs in zip(gradients(lane), expected[key], strict=True):
            close_gradient(mine, theirs)


def gradients(lane: LowRankRows) -> list[Tensor]:
    return [t for t in (lane.down_grad, lane.up_grad, lane.gain_grad) if t is not None]


def close_gradient(a: Tensor, b: Tensor) -> None:
    """Sums over up to hundreds of tokens."""
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-4)


def test_lanes_are_trained_where_nothing_below_needs_gradients():
    """The first layer of a frozen base: neither its input nor its output would be a part of the backward pass."""
    router = Router()
    pooled = PooledLinear(a_linear("bias").requires_grad_(False), router, torch.float32, CPU)
    pooled.trained["lane"] = lane = a_lane(2, True, 0.0, 1)
    router.route = route_of([("lane", 5)])
    pooled(normal(1, 5, IN)).sum().backward()
    assert all(t.abs().max() > 0 for t in gradients(lane))


def test_lanes_over_nf4_in_bf16():
    """The base's product is a function of bitsandbytes' own; gradients are added up in fp32."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(64, 32, bias=True, quant_type="nf4", compute_dtype=torch.bfloat16)
    layer.load_state_dict(a_linear("bias", 64, 32).state_dict())
    layer = layer.to("cpu").requires_grad_(False)
    router = Router()
    pooled = PooledLinear(layer, router, torch.bfloat16, CPU)
    pooled.trained["lane"] = lane = a_lane(4, False, 0.0, 1, 64, 32)
    router.route = route_of([(None, 3), ("lane", 20)])
    x, weights = normal(1, 23, 64).bfloat16().requires_grad_(), normal(2, 23, 32).bfloat16()
    (pooled(x) * weights).sum().backward()
    own = x.detach()[3:].float().requires_grad_()
    plain = nn.Linear(64, 32).requires_grad_(False)
    plain.weight.copy_(bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float())
    alone, leaves = lane_alone(plain, lane, own, 0)
    (alone * weights[3:].float()).sum().backward()
    assert lane.down_grad.dtype == torch.float32
    for mine, theirs in [(x.grad[3:].float(), own.grad), *zip(gradients(lane), [t.grad for t in leaves], strict=True)]:
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-2


def test_a_lane_that_diverged_spoils_no_others():
    router = Router()
    pooled = PooledLinear(a_linear("bias").requires_grad_(False), router, torch.float32, CPU)
    lanes = {key: a_lane(4, key == 1, 0.0, 10 * key) for key in range(3)}
    lanes[0].up.fill_(torch.nan)
    pooled.trained.update(lanes)
    router.route = route_of([(0, 3), (1, 9), (2, 2), (None, 2)])
    x = normal(1, 16, IN).requires_grad_()
    out = pooled(x)
    out.sum().backward()
    assert out[:3].isnan().all()
    assert out[3:].isfinite().all()
    assert x.grad[3:].isfinite().all()
    for key in (1, 2):
        assert all(t.isfinite().all() for t in gradients(lanes[key]))
