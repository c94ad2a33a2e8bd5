"""Slots: keys and values of the sequences that are being generated, and the attention that reads them.

The base's forward pass is transformers' own; only its attention goes here. A step's tokens lie in one row: first one
token for each sequence that decodes, then pieces of prompts. Linear layers see the row; attention writes the row's keys
and values to their slots and lets every token see its own slot up to itself.

Places are kept page by page, so that what the longest sequence needs is one contiguous block of memory, whatever a slot
could hold: batched products copy any other (measured, 32 slots of 512 places, 16 heads of 64, bf16, 2 cores: at length
200 1.6 ms by pages, 4.1 ms as [slots, heads, places, D]; at 500 3.1 and 12.9).

Shapes: S slots, N pages of PAGE places, T tokens of a step, H heads, K key heads, G = H / K, D a head, n decoding
tokens, R rows of their product.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ftray.engine.memory import PAGE
from ftray.errors import ModelError
from ftray.model.attention import Packed, packed_attention

IMPLEMENTATION = "ftray_slots"
SPARSE = 3
"""Decoding slots are copied together when all slots are more than this many times as many: a copy reads and writes what
the product would read."""


TOGETHER = 1 << 18
"""Scores of a head that several pieces have together, at most: 80 MB for 32 heads."""


@dataclass(frozen=True)
class Piece:
    """A run of tokens of one sequence in a step."""

    slot: int
    place: int
    """Of its first token: how many tokens of the sequence come before."""
    count: int


@dataclass(frozen=True)
class Beginnings:
    """Pieces side by side that begin their sequences: they see nothing but themselves, as rows in training do."""

    count: int
    packed: Packed


@dataclass(frozen=True)
class Together:
    """Pieces that go through one product: they end in the same page, and are of like length. B pieces, c tokens of the
    longest, t tokens in all."""

    slots: Tensor
    """int64 [B]"""
    pages: int
    tokens: Tensor
    """int64 [B, c]: which token of those side by side each query is; behind a piece's last one it stands again."""
    places: Tensor
    """int64 [B, c]: of each in its sequence."""
    own: Tensor
    """int64 [t]: which of the B · c are tokens."""
    rows: Tensor
    """int64 [t]: which of those side by side these are."""


@dataclass(frozen=True)
class Continuations:
    """Pieces side by side that go on with their sequences."""

    count: int
    groups: tuple[Together, ...]


@dataclass(frozen=True)
class Step:
    """Where the tokens of a step belong. Tensors are on the slots' device."""

    positions: Tensor
    """int64 [T]: of each token in its sequence."""
    slots: Tensor
    page: Tensor
    places: Tensor
    """int64 [T]: where in the pages its key and value go."""
    decoding: int
    """n: the first tokens, one of each sequence; the order of their slots is the batch's own."""
    chosen: Tensor | None
    """int64 [R]: the slots that their attention runs over, copied together. None: over all as they lie."""
    rows: Tensor | None
    """int64 [n]: the row of that product at which each decoding token stands. None: in order, one each."""
    lengths: Tensor
    """int64 [R]: places that each row's sequence takes, its new token included; 1 for rows without one."""
    pages: int
    """That the longest of them takes."""
    pieces: tuple[Beginnings | Continuations, ...]
    """The other tokens, in order."""


class Slots:
    """Keys and values [N, S, K, PAGE, D] of each layer, in which a model's attention reads and writes from now on."""

    def __init__(self, model: Any, count: int, places: int) -> None:
        config = model.config.get_text_config()
        layers, heads, width = shape_of(config)
        found = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "scaling")]
        if len(found) != layers:
            raise no_interface(f"family {config.model_type!r}")
        shape = (-(-places // PAGE), count, heads, PAGE, width)
        self.count, self.device = count, model.device
        self.keys = [torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in range(layers)]
        self.values = [torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in range(layers)]
        self.step: Step | None = None
        for module in found:
            module.ftray_slots = self

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in [*self.keys, *self.values])

    def plan(self, decoding: Sequence[Piece], prompts: Sequence[Piece]) -> Step:
        """The step that has one token for each of `decoding` and the pieces of `prompts`, in this order."""
        slots = [piece.slot for piece in decoding]
        places = [piece.place for piece in decoding]
        n = len(slots)
        sparse = self.count > SPARSE * n
        rows = list(range(n)) if sparse else slots[:]
        lengths = [1] * (n if sparse else self.count)
        for row, place in zip(rows, places, strict=True):
            lengths[row] = place + 1
        for piece in prompts:
            slots += [piece.slot] * piece.count
            places += range(piece.place, piece.place + piece.count)
        positions = self._tensor(places)
        return Step(
            positions,
            self._tensor(slots),
            positions // PAGE,
            positions % PAGE,
            n,
            self._tensor(slots[:n]) if sparse else None,
            None if rows == list(range(len(lengths))) else self._tensor(rows),
            self._tensor(lengths),
            -(-max(lengths, default=1) // PAGE),
            tuple(self._pieces(prompts)),
        )

    def _pieces(self, prompts: Sequence[Piece]) -> Iterator[Beginnings | Continuations]:
        for begins, pieces in itertools.groupby(prompts, lambda piece: piece.place == 0):
            own = list(pieces)
            lengths = [piece.count for piece in own]
            if begins:
                yield Beginnings(sum(lengths), Packed.of(torch.tensor(lengths)).to(self.device))
            else:
                starts = itertools.accumulate(lengths, initial=0)
                groups = _alike(list(zip(own, starts, strict=False)))
                yield Continuations(sum(lengths), tuple(self._together(group) for group in groups))

    def _together(self, pieces: Sequence[tuple[Piece, int]]) -> Together:
        """`pieces`: each with the row of its first token."""
        counts = np.array([piece.count for piece, _ in pieces])
        inside = np.arange(counts.max())
        last = np.minimum(inside, counts[:, None] - 1)
        tokens = np.array([start for _, start in pieces])[:, None] + last
        places = np.array([piece.place for piece, _ in pieces])[:, None] + last
        own = np.flatnonzero(inside < counts[:, None])
        return Together(
            self._tensor([piece.slot for piece, _ in pieces]),
            _pages(pieces[0][0]),
            *(torch.from_numpy(x).to(self.device) for x in (tokens, places, own, tokens.reshape(-1)[own])),
        )

    def copy(self, source: int, target: int, places: int) -> None:
        """The first `places` places of a slot to another."""
        pages, rest = divmod(places, PAGE)
        for tensor in [*self.keys, *self.values]:
            tensor[:pages, target] = tensor[:pages, source]
            if rest:
                tensor[pages, target, :, :rest] = tensor[pages, source, :, :rest]

    def clear(self, slot: int, first: int) -> None:
        """Forget the values from place `first` on. A sequence gives no weight to what lies behind its own in the last
        page, but no weight times NaN would be NaN."""
        page, place = divmod(first, PAGE)
        for tensor in self.values:
            tensor[page : page + 1, slot, :, place:] = 0
            tensor[page + 1 :, slot] = 0

    def fill(self, slot: int, prefix: Tensor) -> None:
        """Write `prefix` [layers, 2, K, V, D] to the first V places."""
        for layer, pair in enumerate(zip(self.keys, self.values, strict=True)):
            for tensor, whole in zip(pair, prefix[layer].to(self.device), strict=True):
                for page, part in enumerate(whole.split(PAGE, 1)):
                    tensor[page, slot, :, : part.shape[1]] = part

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)


def _pages(piece: Piece) -> int:
    """That its sequence takes up to its end."""
    return -(-(piece.place + piece.count) // PAGE)


def _alike(pieces: Sequence[tuple[Piece, int]]) -> Iterator[list[tuple[Piece, int]]]:
    """Those that go through one product, so that at most every second query is nobody's, and they take no more memory
    than one long piece would."""
    group: list[tuple[Piece, int]] = []
    tokens = 0
    for piece, start in sorted(pieces, key=lambda each: (_pages(each[0]), each[0].count)):
        queries = (len(group) + 1) * piece.count
        too_many = queries > 2 * (tokens + piece.count) or queries * _pages(piece) * PAGE > TOGETHER
        if group and (too_many or _pages(group[0][0]) != _pages(piece)):
            yield group
            group, tokens = [], 0
        group.append((piece, start))
        tokens += piece.count
    yield group


def shape_of(config: Any) -> tuple[int, int, int]:
    """(layers, key heads, D) of a base's text config. Raises ModelError for one without attention."""
    queries = getattr(config, "num_attention_heads", None)
    if not queries:
        raise no_interface("this base")
    heads = getattr(config, "num_key_value_heads", None) or queries
    width = getattr(config, "head_dim", None) or config.hidden_size // queries
    return config.num_hidden_layers, heads, width


def slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_unused: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, H, T, D] → ([1, T, H, D], None)."""
    slots: Slots = module.ftray_slots  # type: ignore[assignment]
    step, layer = slots.step, module.layer_idx
    assert step is not None, "attention outside of a step of the engine"
    keys, values = slots.keys[layer], slots.values[layer]  # type: ignore[index]
    keys[step.page, step.slots, :, step.places] = key[0].transpose(0, 1)
    values[step.page, step.slots, :, step.places] = value[0].transpose(0, 1)
    scale = scaling or query.shape[-1] ** -0.5
    tokens = query[0].transpose(0, 1)  # [T, H, D]
    out = []
    if step.decoding:
        out.append(_decode(step, tokens[: step.decoding], keys, values, scale, sliding_window))
    start = step.decoding
    for piece in step.pieces:
        end = start + piece.count
        if isinstance(piece, Beginnings):
            q, k, v = (x[:, :, start:end] for x in (query, key, value))
            packed = piece.packed
            found, _ = packed_attention(module, q, k, v, None, scale, packed=packed, sliding_window=sliding_window)
            out.append(found[0])
        else:
            found = torch.empty_like(tokens[start:end])
            for group in piece.groups:
                found[group.rows] = _read(group, tokens[start:end], keys, values, scale, sliding_window)
            out.append(found)
        start = end
    return (out[0] if len(out) == 1 else torch.cat(out))[None], None


def _decode(step: Step, query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None) -> Tensor:
    """[n, H, D] → [n, H, D]; the G heads that share keys stand where other products have queries."""
    keys, values = keys[: step.pages], values[: step.pages]
    if step.chosen is not None:
        keys, values = (x.index_select(1, step.chosen) for x in (keys, values))
    pages, rows, heads = keys.shape[:3]
    own = query.unflatten(1, (heads, -1))  # [n, K, G, D]
    if step.rows is not None:
        own = own.new_zeros(rows, *own.shape[1:]).index_copy_(0, step.rows, own)
    place = torch.arange(pages * PAGE, device=query.device)
    hidden = place >= step.lengths[:, None]
    if window is not None:
        hidden |= place < step.lengths[:, None] - window
    scores = own.expand(pages, *own.shape) @ keys.mT  # [N, R, K, G, PAGE]
    scores = scores.permute(1, 2, 3, 0, 4).flatten(3) * scale
    scores.masked_fill_(hidden[:, None, None], float("-inf"))
    shares = torch.softmax(scores, -1, dtype=torch.float32).to(values.dtype)
    found = (shares.unflatten(3, (pages, PAGE)).permute(3, 0, 1, 2, 4) @ values).sum(0)  # [R, K, G, D]
    if step.rows is not None:
        found = found.index_select(0, step.rows)
    return found.flatten(1, 2)


def _read(group: Together, query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None) -> Tensor:
    """[T, H, D] → [t, H, D]: tokens of prompts see what is before them in their slot, and themselves."""
    pieces, count = group.tokens.shape
    width = query.shape[-1]
    k, v = (  # [B, K, places, D]
        x[: group.pages].permute(1, 2, 0, 3, 4).index_select(0, group.slots).flatten(2, 3) for x in (keys, values)
    )
    own = query[group.tokens].unflatten(2, (k.shape[1], -1))  # [B, c, K, G, D]
    own = own.permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, K, G · c, D]
    place = torch.arange(k.shape[2], device=query.device)
    now = group.places[:, :, None]
    hidden = place > now  # [B, c, places]
    if window is not None:
        hidden |= place <= now - window
    scores = ((own @ k.mT) * scale).unflatten(2, (-1, count))
    scores.masked_fill_(hidden[:, None, None], float("-inf"))
    shares = torch.softmax(scores, -1, dtype=torch.float32).to(v.dtype).flatten(2, 3)
    found = (shares @ v).unflatten(2, (-1, count)).permute(0, 3, 1, 2, 4)  # [B, c, K, G, D]
    return found.reshape(pieces * count, -1, width).index_select(0, group.own)


def no_interface(whose: str) -> ModelError:
    return ModelError(
        f"the attention of {whose} does not use transformers' attention interface",
        hint="take a base of Llama's, Mistral's, Qwen's, Gemma 3's, GPT-2's or GPT-NeoX's family",
    )


def register() -> None:
    """Make the implementation known to transformers. It has no mask function there, so transformers builds no mask."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, slot_attention)
