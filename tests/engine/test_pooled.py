"""The pooled layers against a loop that takes one token at a time, in fp32."""

from __future__ import annotations

import copy
import random
from collections.abc import Hashable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from ftray.model import lowrank
from ftray.model import pooled as module
from ftray.model.pooled import (
    SPARSE,
    Bottleneck,
    Delta,
    PooledBottleneck,
    PooledLinear,
    PooledModel,
    Route,
    Router,
    faster_in_c,
)
from tests.engine.pooling import CPU, IN, OUT, Segments, a_linear, normal, route_of

LONG = 6
TOLERANCE = 1e-5
ACTIVATIONS = {"relu": nn.functional.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu}


@pytest.fixture(autouse=True, scope="module")
def _long():
    """Segments of 6 tokens count as long, so that short rows have both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(module.LONG, "cpu", LONG)
        yield


# ------------------------------------------------------------------------------------------------- what is drawn


def a_delta(kind: str, rank: int, seed: int, inputs: int = IN, outputs: int = OUT) -> Delta:
    down, up = normal(seed, rank, inputs, width=0.3), normal(seed + 1, rank, outputs, width=0.3)
    factors = 1 + normal(seed + 2, outputs, width=0.3)
    return {
        "low rank": Delta(down, up),
        "dora": Delta(down, up, gain=factors),
        "scale in": Delta(scale_in=1 + normal(seed + 2, inputs, width=0.3)),
        "scale out": Delta(scale_out=factors),
    }[kind]


def a_bottleneck(size: int, seed: int, activation: str, hidden: int = IN) -> Bottleneck:
    shapes = [(size, hidden), (size,), (size, hidden), (hidden,)]
    return Bottleneck(*(normal(seed + i, *shape, width=0.3) for i, shape in enumerate(shapes)), activation)


KINDS = st.tuples(st.sampled_from(["low rank", "dora", "scale in", "scale out"]), st.sampled_from([1, 2, 3, 8]))
LENGTHS = st.one_of(st.integers(1, LONG - 1), st.integers(LONG, 40), st.just(1))


def segments_of(keys: list[Any]) -> st.SearchStrategy[Segments]:
    """A batch: several segments may be of one adapter, some of none."""
    return st.lists(st.tuples(st.sampled_from([None, *keys]), LENGTHS), min_size=1, max_size=12)


# ------------------------------------------------------------------------------------------------------- the oracle


def one_token(layer: nn.Module, delta: Delta | None, x: Tensor) -> Tensor:
    """What the adapter alone makes of one token [in], by the formulas of the methods' papers."""
    if delta is None:
        return layer(x)
    bias = getattr(layer, "bias", None)
    weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
    if delta.scale_in is not None:
        x = delta.scale_in * x
    y = weight @ x
    if delta.down is not None:
        y = y + delta.up.T @ (delta.down @ x)
    if delta.gain is not None:
        y = delta.gain * y
    if bias is not None:
        y = y + bias
    return y if delta.scale_out is None else delta.scale_out * y


def one_behind(it: Bottleneck | None, x: Tensor) -> Tensor:
    if it is None:
        return x
    return x + it.up.T @ ACTIVATIONS[it.activation](it.down @ x + it.down_bias) + it.up_bias


def owners(segments: Segments) -> list[Hashable | None]:
    return [key for key, count in segments for _ in range(count)]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)


def check_linear(pooled: PooledLinear, router: Router, deltas: dict[Any, Delta], segments: Segments, seed: int) -> None:
    x = normal(seed, len(owners(segments)), IN)
    router.route = route_of(segments)
    out, again, row = pooled(x), pooled(x), pooled(x[None])
    assert torch.equal(out, again)
    assert torch.equal(out, row[0])
    expected = [one_token(pooled.base, deltas.get(k), t) for k, t in zip(owners(segments), x, strict=True)]
    close(out, torch.stack(expected))
    plain = [i for i, key in enumerate(owners(segments)) if key is None]
    assert torch.equal(out[plain], pooled.base(x)[plain])


# ------------------------------------------------------------------------------------------------------ linear layers


@given(st.data(), st.sampled_from(["bias", "no bias", "conv1d"]), st.integers(0, 1 << 20))
@settings(max_examples=150)
def test_a_linear_layer_gives_each_token_what_its_adapter_alone_gives(data, kind, seed):
    router = Router()
    pooled = PooledLinear(a_linear(kind), router, torch.float32, CPU)
    deltas = {i: a_delta(*k, seed + 10 * i) for i, k in enumerate(data.draw(st.lists(KINDS, max_size=10)))}
    for key, delta in deltas.items():
        pooled.put(key, delta)
    check_linear(pooled, router, deltas, data.draw(segments_of(list(deltas))), seed)


@given(st.data(), st.integers(0, 1 << 20))
@settings(max_examples=60)
def test_adapters_come_and_go_between_forward_passes(data, seed):
    """Blocks are freed, taken again and more are added, while routes of earlier batches stay in use."""
    router, deltas, batches = Router(), {}, []
    pooled = PooledLinear(a_linear("bias"), router, torch.float32, CPU)
    for i in range(data.draw(st.integers(2, 14))):
        if deltas and data.draw(st.booleans()):
            gone = data.draw(st.sampled_from(sorted(deltas)))
            pooled.drop(gone)
            del deltas[gone]
        for _ in range(data.draw(st.integers(0, 3))):
            key = data.draw(st.integers(0, 9))
            if key not in deltas:
                deltas[key] = a_delta(*data.draw(KINDS), seed + 50 * i + key)
                pooled.put(key, deltas[key])
        segments = data.draw(segments_of(sorted(deltas)))
        batches.append(route_of(segments))
        check_linear(pooled, router, deltas, segments, seed + i)
        old = data.draw(st.sampled_from(batches))  # its plans were made when other adapters lay in other blocks
        if all(key is None or key in deltas for key, _ in old.segments):
            router.route = old
            whose = owners(list(old.segments))
            x = normal(seed, len(whose), IN)
            expected = [one_token(pooled.base, deltas.get(k), t) for k, t in zip(whose, x, strict=True)]
            close(pooled(x), torch.stack(expected))


@torch.no_grad()
@pytest.mark.parametrize("used", [[0], [15], [0, 15], [1, 5, 9], [3, 4, 5], list(range(16)), [15, 0, 7, 7, 0]])
@pytest.mark.parametrize("tokens", [1, 2, LONG - 1, LONG])
def test_blocks_that_lie_apart(used, tokens):
    router = Router()
    pooled = PooledLinear(a_linear("bias"), router, torch.float32, CPU)
    deltas = {i: a_delta("dora", 4, 10 * i) for i in range(16)}
    for key, delta in deltas.items():
        pooled.put(key, delta)
    check_linear(pooled, router, deltas, [(key, tokens) for key in used], 1)
    products = router.route.products(pooled.low)
    count = max(used) - min(used) + 1
    if tokens < LONG:
        (group,) = products.groups
        sparse, sorted_once = count > SPARSE * len(set(used)), used == sorted(set(used))
        assert (group.chosen is not None) == sparse
        assert (group.span is not None) == (sorted_once and (sparse or count == len(used)))
    else:
        assert not products.groups


def test_a_pool_grows_by_doubling_and_is_given_back():
    pooled = PooledLinear(a_linear("bias"), Router(), torch.float32, CPU)
    delta = a_delta("dora", 4, 0)
    block = sum(t.nbytes for t in (delta.down, delta.up, delta.gain))
    sizes = []
    for key in range(9):
        pooled.put(key, delta)
        sizes.append(sum(pools.nbytes for pools in pooled.pools()) // block)
    assert sizes == [1, 2, 4, 4, 8, 8, 8, 8, 16]
    pooled.drop("unknown")
    for key in range(4):
        pooled.drop(key)
    pooled.put("new", delta)
    assert pooled.low.where["new"] == (4, 0), "the lowest free block"
    for key in [*range(4, 9), "new"]:
        pooled.drop(key)
    assert sum(pools.nbytes for pools in pooled.pools()) == 0


def test_without_a_route_or_adapters_the_base_answers():
    router = Router()
    pooled = PooledLinear(a_linear("conv1d"), router, torch.float32, CPU)
    x = normal(0, 5, IN)
    assert torch.equal(pooled(x), pooled.base(x))
    router.route = route_of([(None, 5)])
    assert torch.equal(pooled(x), pooled.base(x))
    pooled.put("a", a_delta("dora", 2, 0))
    assert torch.equal(pooled(x), pooled.base(x))
    router.route = None
    assert torch.equal(pooled(x), pooled.base(x))


# --------------------------------------------------------------------------------------------------------------- in C


@pytest.fixture(scope="module")
def compiled() -> lowrank.LowRank:
    function, why = lowrank.load()
    if function is None:
        pytest.skip(why)
    return function


@torch.no_grad()
@given(st.data(), st.sampled_from([(12, 20), (32, 64), (100, 33), (7, 1)]), st.integers(0, 1 << 20))
@settings(max_examples=100)
def test_low_ranks_in_c(compiled, data, shape, seed):
    """bf16: what the C function gives is near what fp32 makes of the same numbers, for tokens of one adapter alone."""
    router = Router()
    layer = a_linear("bias", *shape).to(torch.bfloat16)
    pooled = PooledLinear(layer, router, torch.bfloat16, CPU)
    deltas = {}
    ranks = data.draw(st.lists(st.sampled_from([1, 2, 3, 8, 16, 19, 33]), max_size=8))
    for key, rank in enumerate(ranks):
        delta = a_delta("low rank", rank, seed + 10 * key, *shape)
        deltas[key] = Delta(delta.down.bfloat16(), delta.up.bfloat16())
        pooled.put(key, deltas[key])
    for key in data.draw(st.sets(st.sampled_from(sorted(deltas)))) if deltas else ():
        pooled.drop(key)  # its block keeps what was in it
        del deltas[key]
    segments = data.draw(segments_of(list(deltas)))
    x = normal(seed, shape[0], len(owners(segments))).bfloat16().T  # not contiguous
    router.route = Route(tuple(segments), CPU, compiled)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "faster_in_c", lambda tokens: True)  # also where it is not
        out = pooled(x)
    plain = pooled.base(x)
    for token, key in enumerate(owners(segments)):
        if key is None:
            assert torch.equal(out[token], plain[token])
        else:
            added = (x[token].float() @ deltas[key].down.float().T) @ deltas[key].up.float()
            torch.testing.assert_close(out[token].float(), plain[token].float() + added, rtol=2**-7, atol=2**-7)


@torch.no_grad()
def test_nan_in_c_stays_with_its_own(compiled):
    router = Router()
    pooled = PooledLinear(a_linear("bias").bfloat16(), router, torch.bfloat16, CPU)
    for key in range(3):
        delta = a_delta("low rank", 4, 10 * key)
        pooled.put(key, Delta(*(t.bfloat16() * (torch.nan if key == 1 else 1) for t in (delta.down, delta.up))))
    router.route = Route(((0, 2), (1, 3), (2, 1), (None, 1)), CPU, compiled)
    out = pooled(normal(1, 7, IN).bfloat16())
    assert out.isfinite().all(1).tolist() == [True, True, False, False, False, True, True]


@pytest.mark.parametrize(
    ("adapters", "tokens", "in_c"),
    [
        (1, 1, True),
        (8, 1, True),
        (32, 1, True),
        (8, 8, True),
        (32, 4, True),
        (1, 64, True),
        (8, 16, True),
        (32, 8, True),
        (8, 64, False),
        (1, 256, False),
    ],
)
def test_who_multiplies_is_the_faster_one_of_the_benchmark(adapters, tokens, in_c):
    """The rows of tests/bench/RESULTS.md."""
    assert faster_in_c([tokens] * adapters) == in_c


def test_many_tokens_of_one_beside_single_ones_stay_in_c():
    """Batched, every block would have as many places as the fullest."""
    assert faster_in_c([1] * 31 + [41])
    assert faster_in_c([1] * 24 + [31] * 8)


@torch.no_grad()
def test_one_batch_may_have_both():
    router = Router()
    pooled = PooledLinear(a_linear("bias"), router, torch.float32, CPU)
    deltas = {key: a_delta("low rank", 2 if key < 8 else 3, 10 * key) for key in range(10)}
    for key, delta in deltas.items():
        pooled.put(key, delta)
    segments = [*((key, 32) for key in range(8)), (8, 2), (9, 1)]
    calls = []

    class InTorch:
        def add(self, x, y, down, up, blocks, starts, tokens):
            calls.append(len(tokens))
            for i, block in enumerate(blocks.tolist()):
                own = tokens[starts[i] : starts[i + 1]].long()
                y[own] += (x[own] @ down[block].T) @ up[block]

    router.route = Route(tuple(segments), CPU, InTorch())
    x = normal(3, 259, IN)
    expected = [one_token(pooled.base, deltas[k], t) for k, t in zip(owners(segments), x, strict=True)]
    close(pooled(x), torch.stack(expected))
    assert calls == [3], "of the rank with few tokens"


def test_a_device_of_another_kind_has_a_threshold_too():
    pools = module.Pools(torch.float32, torch.device("meta"))
    pools.put("a", 2, torch.empty(2, 4), torch.empty(2, 4))
    route = Route((("a", 3), ("a", module.LONG_ELSEWHERE)), torch.device("meta"))
    products = route.products(pools)
    assert len(products.groups) == len(products.long) == 1


# -------------------------------------------------------------------------------------------------------- bottlenecks


@given(st.data(), st.integers(0, 1 << 20))
@settings(max_examples=60)
def test_bottlenecks(data, seed):
    kinds = st.lists(st.tuples(st.sampled_from([1, 3, 8]), st.sampled_from(sorted(ACTIVATIONS))), max_size=8)
    router = Router()
    pooled = PooledBottleneck(router, torch.float32, CPU)
    parts = {i: a_bottleneck(size, seed + 10 * i, name) for i, (size, name) in enumerate(data.draw(kinds))}
    for key, part in parts.items():
        pooled.put(key, part)
    segments = data.draw(segments_of(list(parts)))
    x = normal(seed, len(owners(segments)), IN)
    before = x.clone()
    router.route = route_of(segments)
    out = pooled(x)
    assert torch.equal(x, before), "what comes in is left alone"
    close(out, torch.stack([one_behind(parts.get(k), t) for k, t in zip(owners(segments), x, strict=True)]))
    plain = [i for i, key in enumerate(owners(segments)) if key is None]
    assert torch.equal(out[plain], x[plain])


# ---------------------------------------------------------------------------------------------------- what is damaged


@pytest.mark.parametrize("segments", [
    [(0, 1), (1, 3), (2, 1), (None, 2)],
    [(2, 2), (0, 1), (None, 1)],  # the damaged one is between them, and in no segment
    [(0, 7), (1, 7), (2, 1), (None, 1)],
])  # fmt: skip
@pytest.mark.parametrize("kind", ["dora", "scale in", "scale out"])
@torch.no_grad()
def test_nan_stays_with_its_own_tokens(kind, segments):
    """Adapter 1 is full of NaN: tokens of others are what they are without it."""
    results = []
    for damaged in (False, True):
        router = Router()
        pooled = PooledLinear(a_linear("bias"), router, torch.float32, CPU)
        for key in range(3):
            delta = a_delta(kind, 4, 10 * key)
            if damaged and key == 1:
                delta = Delta(**{n: t if t is None else torch.full_like(t, torch.nan) for n, t in vars(delta).items()})
            pooled.put(key, delta)
        whose = owners(segments)
        others = [i for i, key in enumerate(whose) if key != 1]
        router.route = route_of(segments)
        results.append(pooled(normal(1, len(whose), IN))[others])
    close(*results)


# ---------------------------------------------------------------------------------------------------------- the model


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2, intermediate_size=24,
        vocab_size=32, initializer_range=0.2, attention_bias=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def alone(llama: LlamaForCausalLM, deltas: dict[str, Delta], parts: dict[str, Bottleneck], ids: Tensor) -> Tensor:
    """Logits of one sequence by a copy of the model with one adapter in its weights."""
    model = copy.deepcopy(llama)
    for path, delta in deltas.items():
        layer = model.get_submodule(path)
        if delta.down is not None:
            layer.weight += delta.up.T @ delta.down
        if delta.gain is not None:
            layer.weight *= delta.gain[:, None]
        if delta.scale_in is not None:
            layer.weight *= delta.scale_in
        if delta.scale_out is not None:
            layer.weight *= delta.scale_out[:, None]
            if layer.bias is not None:
                layer.bias *= delta.scale_out
    for path, it in parts.items():

        def behind(_module: Any, _inputs: Any, output: Any, it: Bottleneck = it) -> Any:
            x = output[0] if isinstance(output, tuple) else output
            y = x + ACTIVATIONS[it.activation](x @ it.down.T + it.down_bias) @ it.up + it.up_bias
            return (y, *output[1:]) if isinstance(output, tuple) else y

        model.get_submodule(path).register_forward_hook(behind)
    return model(ids[None]).logits[0]


@torch.no_grad()
def test_a_model_with_many_adapters_of_every_kind(llama):
    """Put, dropped and put again, each sequence of a row answers as its adapter in the weights of a copy does."""
    choose = random.Random(3)
    pooled = PooledModel(copy.deepcopy(llama))
    paths = list(pooled.linears)
    shapes = {path: (layer.base.in_features, layer.base.out_features) for path, layer in pooled.linears.items()}
    adapters: dict[int, tuple[dict[str, Delta], dict[str, Bottleneck]]] = {}
    for turn in range(12):
        for key in range(8):
            if key in adapters and choose.random() < 0.4:
                pooled.drop(key)
                del adapters[key]
            elif key not in adapters and choose.random() < 0.7:
                kind = choose.choice(["low rank", "dora", "scale in", "scale out", "bottleneck"])
                seed, deltas, parts = 1000 * turn + 100 * key, {}, {}
                if kind == "bottleneck":
                    for part in choose.sample(["model.layers.0.self_attn", "model.layers.1.mlp"], 1 + key % 2):
                        parts[part] = a_bottleneck(1 + key % 3, seed, "silu", 16)
                else:
                    for i, path in enumerate(choose.sample(paths, choose.randint(1, len(paths)))):
                        deltas[path] = a_delta(kind, choose.choice([1, 4, 8]), seed + 3 * i, *shapes[path])
                adapters[key] = deltas, parts
                pooled.put(key, deltas, parts)
        segments: Segments = [
            (choose.choice([None, *adapters]), choose.choice([1, 1, 3, 20])) for _ in range(choose.randint(1, 9))
        ]
        segments.sort(key=lambda segment: pooled.order(segment[0]))
        ids = [torch.tensor([choose.randrange(32) for _ in range(count)]) for _, count in segments]
        positions = torch.cat([torch.arange(count) for _, count in segments])
        with pooled.routed(route_of(segments)):
            logits = pooled.model(torch.cat(ids)[None], position_ids=positions[None], use_cache=False).logits[0]
        ours = logits.split([count for _, count in segments])
        for (key, _), tokens, own in zip(segments, ids, ours, strict=True):
            deltas, parts = adapters.get(key, ({}, {}))
            torch.testing.assert_close(own, alone(llama, deltas, parts, tokens), rtol=1e-4, atol=1e-4)
    for key in list(adapters):
        pooled.drop(key)
    assert pooled.nbytes == 0
    assert pooled.router.route is None


@torch.no_grad()
def test_sorted_by_order_no_token_is_moved(llama):
    """One token an adapter, as while decoding: the blocks are met where they lie."""
    pooled = PooledModel(copy.deepcopy(llama))
    shapes = {path: (layer.base.in_features, layer.base.out_features) for path, layer in pooled.linears.items()}
    for key in (3, 1, 2, 0):
        pooled.put(key, {path: a_delta("low rank", 4, key, *shape) for path, shape in shapes.items()})
    keys = sorted([0, 1, 2, 3, None], key=pooled.order)
    assert keys == [None, 3, 1, 2, 0]
    route = route_of([(key, 1) for key in keys])
    for layer in pooled.linears.values():
        (group,) = route.products(layer.low).groups
        assert group.span == (1, 5)
    assert len(route._products) == 1, "all layers share a plan"


def test_a_route_is_left_when_a_forward_pass_fails(llama):
    pooled = PooledModel(copy.deepcopy(llama))
    with pytest.raises(IndexError), pooled.routed(route_of([(None, 1)])):
        pooled.model(torch.tensor([[99]]))
    assert pooled.router.route is None
