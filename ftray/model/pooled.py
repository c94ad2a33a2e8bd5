"""Many adapters on one base in one batch: each linear layer of the base once, and beside it pools of what adapters add.

A token's result equals what its adapter alone gives. For one token x of an adapter with low-rank rows A, B (its scale
is in B), a gain g (DoRA: magnitude over norm), input and output scales (IA3), on a base W, c:

    y = g * (W x + B A x) + c     or with IA3     y = s_out * (W (s_in * x) + c)

Adapters of one rank share a pool, so ranks mix without padding. Tokens of a forward pass come in segments, each of one
adapter or of none. Short segments meet in batched products over the pool's blocks as they lie, so nothing of the size
of an adapter is copied; a long one is a product of its own.

Shapes: T tokens, C blocks of a pool, r rank, n blocks of a product, k tokens of its fullest block.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ftray.model import lowrank
from ftray.model.lowrank import LowRank
from ftray.model.trained import LowRankRows, Span, add_low_rank

Key = Hashable
"""What an adapter is known by: its digest, a lane's number."""

LONG = {"cpu": 64}
"""A segment of this many tokens is a product of its own. Measured: tests/bench/pooled.py."""
LONG_ELSEWHERE = 32
"""The same on any other device: a guess."""
LONG_IN_C = 128
"""The same where `LowRank` multiplies. Measured, as is `faster_in_c`."""
SPARSE = 3
"""Blocks are copied together when the range that they lie in is more than this many times as many. A copy reads and
writes what the product would read."""


@dataclass(frozen=True)
class Delta:
    """What one adapter does at one linear layer. None: nothing of that kind."""

    down: Tensor | None = None
    """[r, in]"""
    up: Tensor | None = None
    """[r, out], times the adapter's scale"""
    gain: Tensor | None = None
    """[out] DoRA: multiplies base and low-rank part, not the bias."""
    scale_in: Tensor | None = None
    """[in] IA3 on feed-forward layers."""
    scale_out: Tensor | None = None
    """[out] IA3 on others."""


@dataclass(frozen=True)
class Bottleneck:
    """What one adapter adds behind a part of a block: up(activation(down(x)))."""

    down: Tensor
    """[r, hidden]"""
    down_bias: Tensor
    """[r]"""
    up: Tensor
    """[r, hidden], times the adapter's scale"""
    up_bias: Tensor
    """[hidden], times the adapter's scale"""
    activation: str


class Pool:
    """A block for each adapter of one kind: tensors [C, …]. Grows by doubling."""

    def __init__(self, like: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> None:
        self.tensors = [torch.zeros(1, *t.shape, dtype=dtype, device=device) for t in like]
        self.taken = [False]

    def take(self) -> int:
        """The lowest free block, which is taken from now on."""
        if all(self.taken):
            self.tensors = [torch.cat([t, torch.zeros_like(t)]) for t in self.tensors]
            self.taken += [False] * len(self.taken)
        block = self.taken.index(False)
        self.taken[block] = True
        return block


class Pools:
    """Pools by kind (a rank, an activation …), and where each adapter lies in them."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.kinds: dict[Any, Pool] = {}
        self.where: dict[Key, tuple[Any, int]] = {}

    def put(self, key: Key, kind: Any, *tensors: Tensor) -> None:
        assert key not in self.where, f"{key} is in this pool already"
        if kind not in self.kinds:
            self.kinds[kind] = Pool(tensors, self.dtype, self.device)
        pool = self.kinds[kind]
        self.where[key] = kind, block = kind, pool.take()
        for blocks, tensor in zip(pool.tensors, tensors, strict=True):
            blocks[block].copy_(tensor, non_blocking=True)

    def drop(self, key: Key) -> None:
        """Free the adapter's block, if it has one here; a pool that nobody is in is given back."""
        if key in self.where:
            kind, block = self.where.pop(key)
            self.kinds[kind].taken[block] = False
            if not any(self.kinds[kind].taken):
                del self.kinds[kind]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for pool in self.kinds.values() for t in pool.tensors)


# ------------------------------------------------------------------------------------------------- which token, whose


@dataclass(frozen=True)
class Group:
    """Short segments of one kind: one batched product."""

    kind: Any
    first: int
    count: int
    """It runs over `count` blocks from `first` on, whoever they belong to …"""
    chosen: Tensor | None
    """… or over copies of these alone, int64 [n]."""
    width: int
    """k"""
    span: tuple[int, int] | None
    """The tokens, if these and no others stand in the order of the blocks. Else:"""
    source: Tensor | None
    """int64 [n · k]: the token at each place; a place that no token takes holds one of the block's own, or of any block
    if none is its own."""
    tokens: Tensor | None
    """int64 [m]: the tokens of the group …"""
    places: Tensor | None
    """… and the place where each one's result stands, int64 [m]."""


@dataclass(frozen=True)
class Entries:
    """Short segments of one rank, for `LowRank.add`."""

    kind: Any
    blocks: Tensor
    starts: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Products:
    """How the tokens of a batch meet the blocks of a layer's pools."""

    groups: tuple[Group, ...]
    entries: tuple[Entries, ...]
    """The same, computed by `LowRank`."""
    long: tuple[tuple[Any, int, int, int], ...]
    """(kind, block, first token, one past the last)"""

    def add(self, pools: Pools, x: Tensor, y: Tensor, product: Callable[..., Tensor], compiled: LowRank | None) -> None:
        """Add to y [T, out] what the adapters make of x [T, in]. `product(x, kind, *tensors)` computes [n, k, in] with
        blocks [n, …], and [k, in] with one block."""
        for g in self.groups:
            tensors = pools.kinds[g.kind].tensors
            if g.chosen is not None:
                blocks = [t.index_select(0, g.chosen) for t in tensors]
            else:
                blocks = [t[g.first : g.first + g.count] for t in tensors]
            own = x[slice(*g.span)] if g.span else x.index_select(0, g.source)  # type: ignore[arg-type]
            added = product(own.unflatten(0, (-1, g.width)), g.kind, *blocks).flatten(0, 1)
            if g.span:
                y[slice(*g.span)] += added
            else:
                y.index_add_(0, g.tokens, added.index_select(0, g.places))  # type: ignore[arg-type]
        for e in self.entries:
            assert compiled is not None
            down, up = pools.kinds[e.kind].tensors
            compiled.add(x.contiguous(), y, down, up, e.blocks, e.starts, e.tokens)
        for kind, block, start, stop in self.long:
            y[start:stop] += product(x[start:stop], kind, *(t[block] for t in pools.kinds[kind].tensors))


@dataclass(frozen=True)
class Rows:
    """Which tokens of a batch have a row in a layer's pool of vectors."""

    tokens: Tensor | None
    """int64 [m]; None: all"""
    blocks: Tensor
    """int64 [m]"""

    def scale(self, pools: Pools, y: Tensor, bias: Tensor | None = None) -> Tensor:
        """y [T, …], the tokens' rows multiplied by theirs, but for the `bias` that is in them; y is left alone."""
        (vectors,) = pools.kinds[None].tensors
        factors = vectors.index_select(0, self.blocks)
        own = y if self.tokens is None else y.index_select(0, self.tokens)
        scaled = own * factors if bias is None else (own - bias) * factors + bias
        return scaled if self.tokens is None else y.index_copy(0, self.tokens, scaled)


Places = tuple[tuple[Any, int] | None, ...]


@dataclass
class Route:
    """Whose each token of a forward pass is. Plans are made once for each way in which layers hold the adapters, and
    serve every step for which the batch stays as it is."""

    segments: tuple[tuple[Key | None, int], ...]
    """(adapter or None, tokens), in the order of the batch"""
    device: torch.device
    compiled: LowRank | None = None
    """What multiplies low ranks, in bf16 on a CPU and where nothing is trained; None: torch."""
    generators: tuple[torch.Generator | None, ...] = ()
    """Of each segment's dropout, while lanes are trained."""
    _products: dict[Places, Products | None] = field(default_factory=dict)
    _compiled: dict[Places, Products | None] = field(default_factory=dict)
    _rows: dict[Places, Rows | None] = field(default_factory=dict)

    def products(self, pools: Pools) -> Products | None:
        """None: no token of this batch has anything in these pools."""
        return self._of(pools, self._products, self._make_products)

    def low_rank(self, pools: Pools) -> Products | None:
        """The same for products that `compiled` may do."""
        if self.compiled is None:
            return self.products(pools)
        return self._of(pools, self._compiled, self._make_compiled)

    def rows(self, pools: Pools) -> Rows | None:
        return self._of(pools, self._rows, self._make_rows)

    def trained(self, rows: Mapping[Key, LowRankRows]) -> list[Span]:
        """The spans of lanes that train something at a layer."""
        spans, start = [], 0
        for i, (key, count) in enumerate(self.segments):
            if key in rows:
                generator = self.generators[i] if self.generators else None
                spans.append(Span(rows[key], start, start + count, generator))
            start += count
        return spans

    def _of(self, pools: Pools, made: dict[Places, Any], make: Callable[[Places], Any]) -> Any:
        where = pools.where
        if not where:
            return None
        at = tuple([where.get(key) for key, _ in self.segments])
        if at not in made:
            made[at] = make(at) if any(at) else None
        return made[at]

    def _spans(self, at: Places) -> Iterator[tuple[Any, int, int, int]]:
        """(kind, block, first token, one past the last) of each segment that has a place."""
        start = 0
        for place, (_, count) in zip(at, self.segments, strict=True):
            if place is not None:
                yield (*place, start, start + count)
            start += count

    def _make_products(self, at: Places, long_from: int | None = None) -> Products:
        short, long = self._divided(at, long_from or LONG.get(self.device.type, LONG_ELSEWHERE))
        return Products(tuple(self._group(kind, blocks) for kind, blocks in short.items()), (), long)

    def _make_compiled(self, at: Places) -> Products:
        short, long = self._divided(at, LONG_IN_C)
        in_c = {kind: faster_in_c([len(tokens) for tokens in blocks.values()]) for kind, blocks in short.items()}
        return Products(
            tuple(self._group(kind, blocks) for kind, blocks in short.items() if not in_c[kind]),
            tuple(_entries(kind, blocks) for kind, blocks in short.items() if in_c[kind]),
            long,
        )

    def _divided(
        self, at: Places, long_from: int
    ) -> tuple[dict[Any, dict[int, list[int]]], tuple[tuple[Any, int, int, int], ...]]:
        """(tokens by kind and block, of short segments; long segments)"""
        long: list[tuple[Any, int, int, int]] = []
        short: dict[Any, dict[int, list[int]]] = {}
        for kind, block, start, stop in self._spans(at):
            if stop - start >= long_from:
                long.append((kind, block, start, stop))
            else:
                short.setdefault(kind, {}).setdefault(block, []).extend(range(start, stop))
        return short, tuple(long)

    def _group(self, kind: Any, tokens_of: dict[int, list[int]]) -> Group:
        blocks = sorted(tokens_of)
        first, count = blocks[0], blocks[-1] - blocks[0] + 1
        width = max(len(tokens) for tokens in tokens_of.values())
        sparse = count > SPARSE * len(blocks)
        at = {block: i if sparse else block - first for i, block in enumerate(blocks)}
        chosen = self._tensor(blocks) if sparse else None
        tokens = [token for block in blocks for token in tokens_of[block]]
        places = [at[block] * width + i for block in blocks for i in range(len(tokens_of[block]))]
        full = (len(blocks) if sparse else count) * width
        if len(tokens) == full and tokens == list(range(tokens[0], tokens[0] + full)):
            return Group(kind, first, count, chosen, width, (tokens[0], tokens[0] + full), None, None, None)
        source = [tokens[0]] * full
        for block in blocks:
            source[at[block] * width : (at[block] + 1) * width] = [tokens_of[block][0]] * width
        for token, place in zip(tokens, places, strict=True):
            source[place] = token
        return Group(
            kind, first, count, chosen, width, None, self._tensor(source), self._tensor(tokens), self._tensor(places)
        )

    def _make_rows(self, at: Places) -> Rows:
        tokens: list[int] = []
        blocks: list[int] = []
        for _, block, start, stop in self._spans(at):
            tokens.extend(range(start, stop))
            blocks.extend([block] * (stop - start))
        whole = len(tokens) == sum(count for _, count in self.segments)
        return Rows(None if whole else self._tensor(tokens), self._tensor(blocks))

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, device=self.device)


def faster_in_c(tokens: Sequence[int]) -> bool:
    """Whether `LowRank` is faster than one batched product for blocks of so many tokens each. It takes its time for
    each token, and a little for each block; the other takes as much as 40 tokens do here, five for each block, and two
    thirds of one for each place, of which all blocks have as many as the fullest. Fitted to tests/bench/pooled.py."""
    return sum(tokens) <= 40 + len(tokens) * (5 + 0.65 * max(tokens))


def _entries(kind: Any, tokens_of: dict[int, list[int]]) -> Entries:
    starts = itertools.accumulate(map(len, tokens_of.values()), initial=0)
    tokens = itertools.chain.from_iterable(tokens_of.values())
    blocks, *rest = (torch.tensor(list(v), dtype=torch.int32) for v in (tokens_of, starts, tokens))
    return Entries(kind, blocks, *rest)


class Router:
    """The route that all pooled layers of a model follow now."""

    route: Route | None = None

    def __init__(self) -> None:
        self.anchor = torch.zeros((), requires_grad=True)
        """What makes lanes' layers a part of the backward pass."""


# ------------------------------------------------------------------------------------------------------------- layers


class PooledLinear(nn.Module):
    """A linear layer of the base (NF4 or not; GPT-2's Conv1D too), frozen, and what adapters do there."""

    def __init__(self, base: nn.Module, router: Router, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.base, self._router = base, router
        self.low = Pools(dtype, device)
        """By rank: down [C, r, in], up [C, r, out]."""
        self.gains, self.scales_in, self.scales_out = (Pools(dtype, device) for _ in range(3))
        """One vector each."""
        self.trained: dict[Key, LowRankRows] = {}
        """What lanes train here."""

    @property
    def inputs(self) -> int:
        """Features that it takes."""
        return self.base.nx if hasattr(self.base, "nx") else self.base.in_features  # type: ignore[return-value]

    @property
    def outputs(self) -> int:
        """Features that it gives."""
        return self.base.nf if hasattr(self.base, "nf") else self.base.out_features  # type: ignore[return-value]

    def put(self, key: Key, delta: Delta) -> None:
        """Raises ValueError for tensors of other shapes than this layer's."""
        rank = 0 if delta.down is None else len(delta.down)
        for name, tensor, shape in (
            ("down", delta.down, (rank, self.inputs)),
            ("up", delta.up, (rank, self.outputs)),
            ("gain", delta.gain, (self.outputs,)),
            ("scale_in", delta.scale_in, (self.inputs,)),
            ("scale_out", delta.scale_out, (self.outputs,)),
        ):
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"{name} is {tuple(tensor.shape)}; this layer takes {shape}")
        if delta.down is not None and delta.up is not None:
            self.low.put(key, len(delta.down), delta.down, delta.up)
        for pools, vector in (
            (self.gains, delta.gain),
            (self.scales_in, delta.scale_in),
            (self.scales_out, delta.scale_out),
        ):
            if vector is not None:
                pools.put(key, None, vector)

    def drop(self, key: Key) -> None:
        self.trained.pop(key, None)
        for pools in self.pools():
            pools.drop(key)

    def pools(self) -> list[Pools]:
        return [self.low, self.gains, self.scales_in, self.scales_out]

    def forward(self, x: Tensor) -> Tensor:
        route = self._router.route
        if route is None:
            return self.base(x)
        if rows := route.rows(self.scales_in):
            x = rows.scale(self.scales_in, x.flatten(0, -2)).view_as(x)
        y = self.base(x)
        out = y.flatten(0, -2)
        if products := route.low_rank(self.low):
            products.add(self.low, x.flatten(0, -2), out, low_rank, route.compiled)
        if rows := route.rows(self.gains):
            out = rows.scale(self.gains, out, getattr(self.base, "bias", None))
        if rows := route.rows(self.scales_out):
            out = rows.scale(self.scales_out, out)
        if self.trained and (spans := route.trained(self.trained)):
            bias = getattr(self.base, "bias", None)
            out = add_low_rank(self._router.anchor, x.flatten(0, -2), out, bias, spans)
        return out.view_as(y)


def low_rank(x: Tensor, _kind: Any, down: Tensor, up: Tensor) -> Tensor:
    return (x @ down.mT) @ up


class PooledBottleneck(nn.Module):
    """Bottleneck adapters behind one part of a block."""

    def __init__(self, router: Router, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self._router = router
        self.own = Pools(dtype, device)
        """By (size, activation): down [C, r, hidden], its bias [C, 1, r], up [C, r, hidden], its bias [C, 1, hidden]"""

    def put(self, key: Key, it: Bottleneck) -> None:
        kind = (len(it.down), it.activation)
        self.own.put(key, kind, it.down, it.down_bias[None], it.up, it.up_bias[None])

    def drop(self, key: Key) -> None:
        self.own.drop(key)

    def pools(self) -> list[Pools]:
        return [self.own]

    def forward(self, x: Tensor) -> Tensor:
        products = self._router.route and self._router.route.products(self.own)
        if not products:
            return x
        y = x.flatten(0, -2).clone()
        products.add(self.own, x.flatten(0, -2), y, _bottleneck, None)
        return y.view_as(x)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
}


def _bottleneck(x: Tensor, kind: Any, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor) -> Tensor:
    return _ACTIVATIONS[kind[1]](x @ down.mT + down_bias) @ up + up_bias


class PooledModel:
    """A base whose linear layers and blocks serve many adapters. The model itself is changed in place."""

    def __init__(self, model: Any) -> None:
        from ftray.model.adapters import linear_layers

        self.model, self.router = model, Router()
        self.dtype, self.device = model.dtype, model.device
        in_c = self.device.type == "cpu" and self.dtype == torch.bfloat16
        self.compiled, self.not_compiled = lowrank.load() if in_c else (None, "")
        """What multiplies low ranks where nothing is trained, and why torch has to, on a CPU in bf16."""
        self.linears: dict[str, PooledLinear] = {}
        self.bottlenecks: dict[str, PooledBottleneck] = {}
        self._order: dict[Key, tuple[str, int]] = {}
        for path in linear_layers(model):
            pooled = PooledLinear(model.get_submodule(path), self.router, self.dtype, self.device)
            model.set_submodule(path, pooled)
            self.linears[path] = pooled

    def put(self, key: Key, deltas: Mapping[str, Delta], bottlenecks: Mapping[str, Bottleneck] | None = None) -> None:
        """Take an adapter in; paths are those of the base's modules. When it raises, `drop` takes back what is in."""
        for path, delta in deltas.items():
            self.linears[path].put(key, delta)
        for path, bottleneck in (bottlenecks or {}).items():
            if path not in self.bottlenecks:
                pooled = PooledBottleneck(self.router, self.dtype, self.device)
                self.model.get_submodule(path).register_forward_hook(_behind(pooled))
                self.bottlenecks[path] = pooled
            self.bottlenecks[path].put(key, bottleneck)
        every = (pools.where for layer in self._layers() for pools in layer.pools())
        kind, block = next((where[key] for where in every if key in where), ("", 0))
        self._order[key] = (str(kind), block)

    def order(self, key: Key | None) -> tuple[str, int]:
        """A key to sort by: tokens in this order meet the blocks of their pools in theirs, and nothing is moved."""
        return self._order.get(key, ("", -1))

    def drop(self, key: Key) -> None:
        """Free the adapter's blocks; unknown keys are ignored."""
        self._order.pop(key, None)
        for layer in self._layers():
            layer.drop(key)

    @contextmanager
    def routed(self, route: Route) -> Iterator[None]:
        """Forward passes inside follow `route`."""
        self.router.route = route
        try:
            yield
        finally:
            self.router.route = None

    @property
    def nbytes(self) -> int:
        """Bytes of all pools, blocks that are free now included."""
        return sum(pools.nbytes for layer in self._layers() for pools in layer.pools())

    def _layers(self) -> list[PooledLinear | PooledBottleneck]:
        return [*self.linears.values(), *self.bottlenecks.values()]


def _behind(pooled: PooledBottleneck) -> Callable[..., Any]:
    def hook(_part: nn.Module, _inputs: Any, output: Any) -> Any:
        return (pooled(output[0]), *output[1:]) if isinstance(output, tuple) else pooled(output)

    return hook
