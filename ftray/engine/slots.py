"""Slots: keys and values of the sequences that are being generated, and the attention that reads them.

The base's forward pass is transformers' own; only its attention goes here. A step's tokens lie in one row: first one
token for each sequence that decodes, then pieces of prompts. Linear layers see the row; attention writes the row's keys
and values to their slots and lets every token see its own slot up to itself.

Shapes: S slots, P places of a slot, T tokens of a step, H heads, K key heads, G = H / K, D a head, n decoding tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ftray.errors import ModelError

IMPLEMENTATION = "ftray_slots"
SPARSE = 3
"""Slots are copied together when the range that decoding ones lie in is more than this many times as many."""


@dataclass(frozen=True)
class Piece:
    """A run of tokens of one sequence in a step."""

    slot: int
    place: int
    """Of its first token: how many tokens of the sequence come before."""
    count: int


@dataclass(frozen=True)
class Step:
    """Where the tokens of a step belong. Tensors are on the slots' device."""

    slots: Tensor
    """int64 [T]"""
    places: Tensor
    """int64 [T]"""
    decoding: int
    """n: the first tokens, one of each sequence; the order of their slots is the batch's own."""
    range: tuple[int, int]
    """Slots that decoding tokens' attention runs over, first and one past the last …"""
    chosen: Tensor | None
    """… or copies of these alone, int64 [n]."""
    row: Tensor | None
    """int64 [n]: the row of that range at which each decoding token stands. None: in order."""
    longest: int
    """Places that the longest decoding sequence takes, its new token included."""
    lengths: Tensor
    """int64 [rows of the range]: the same for each row, at least 1."""
    pieces: tuple[tuple[Piece, int], ...]
    """Pieces of prompts, and the first token of each."""


class Slots:
    """Keys and values [S, K, P, D] of each layer. `attach` makes a model's attention use them."""

    def __init__(self, model: Any, count: int, places: int) -> None:
        config = model.config.get_text_config()
        layers = config.num_hidden_layers
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (count, heads, places, width)
        self.count, self.places, self.device = count, places, model.device
        self.keys = [torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in range(layers)]
        self.values = [torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in range(layers)]
        self.step: Step | None = None
        found = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "scaling")]
        if len(found) != layers:
            family = config.model_type
            raise ModelError(
                f"the attention of family {family!r} does not use transformers' attention interface",
                hint="take a base of Llama's, Mistral's, Qwen's, Gemma 3's, GPT-2's or GPT-NeoX's family",
            )
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
        first, last = (min(slots), max(slots) + 1) if slots else (0, 0)
        sparse = last - first > SPARSE * n
        row = list(range(n)) if sparse else [slot - first for slot in slots]
        lengths = [1] * (n if sparse else last - first)
        for at, place in zip(row, places, strict=True):
            lengths[at] = place + 1
        starts = []
        for piece in prompts:
            starts.append((piece, len(slots)))
            slots += [piece.slot] * piece.count
            places += range(piece.place, piece.place + piece.count)
        return Step(
            self._tensor(slots),
            self._tensor(places),
            n,
            (first, last),
            self._tensor(slots[:n]) if sparse else None,
            None if row == list(range(len(lengths))) else self._tensor(row),
            max(lengths, default=0),
            self._tensor(lengths),
            tuple(starts),
        )

    def copy(self, source: int, target: int, places: int) -> None:
        """The first `places` places of a slot to another."""
        for tensor in [*self.keys, *self.values]:
            tensor[target, :, :places] = tensor[source, :, :places]

    def fill(self, slot: int, prefix: Tensor) -> None:
        """Write `prefix` [layers, 2, K, V, D] to the first V places."""
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            keys[slot, :, : prefix.shape[3]] = prefix[layer, 0].to(keys.device)
            values[slot, :, : prefix.shape[3]] = prefix[layer, 1].to(keys.device)

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)


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
    keys[step.slots, :, step.places] = key[0].transpose(0, 1)
    values[step.slots, :, step.places] = value[0].transpose(0, 1)
    scale = scaling or query.shape[-1] ** -0.5
    tokens = query[0].transpose(0, 1)  # [T, H, D]
    out = []
    if step.decoding:
        out.append(_decode(step, tokens[: step.decoding], keys, values, scale, sliding_window))
    for piece, start in step.pieces:
        out.append(_read(piece, tokens[start : start + piece.count], keys, values, scale, sliding_window))
    return (out[0] if len(out) == 1 else torch.cat(out))[None], None


def _decode(step: Step, query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None) -> Tensor:
    """[n, H, D] → [n, H, D]; the G heads that share keys stand where other kernels have queries."""
    if step.chosen is not None:
        keys, values = (x[:, :, : step.longest].index_select(0, step.chosen) for x in (keys, values))
    else:
        keys, values = (x[slice(*step.range), :, : step.longest] for x in (keys, values))
    n, heads, width = query.shape
    own = query.view(n, keys.shape[1], -1, width)
    if step.row is not None:
        own = own.new_zeros(len(keys), *own.shape[1:]).index_copy_(0, step.row, own)
    place = torch.arange(step.longest, device=query.device)
    hidden = place >= step.lengths[:, None]
    if window is not None:
        hidden |= place < step.lengths[:, None] - window
    scores = (own @ keys.mT) * scale
    scores.masked_fill_(hidden[:, None, None], float("-inf"))
    found = torch.softmax(scores, -1, dtype=torch.float32).to(values.dtype) @ values
    if step.row is not None:
        found = found.index_select(0, step.row)
    return found.reshape(n, heads, width)


def _read(piece: Piece, query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None) -> Tensor:
    """[c, H, D] → [c, H, D]: tokens of a prompt see what is before them in their slot, and themselves."""
    end = piece.place + piece.count
    k, v = keys[piece.slot, :, :end], values[piece.slot, :, :end]  # [K, end, D]
    count, heads, width = query.shape
    own = query.view(count, len(k), -1, width).permute(1, 2, 0, 3).reshape(len(k), -1, width)  # [K, G · c, D]
    place = torch.arange(end, device=query.device)
    now = place[piece.place :, None]
    hidden = place > now
    if window is not None:
        hidden |= place <= now - window
    scores = ((own @ k.mT) * scale).view(len(k), -1, count, end)
    scores.masked_fill_(hidden, float("-inf"))
    found = torch.softmax(scores, -1, dtype=torch.float32).to(v.dtype).view(len(k), -1, end) @ v
    return found.view(heads, count, width).transpose(0, 1)


def register() -> None:
    """Make the implementation known to transformers. It has no mask function there, so transformers builds no mask."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, slot_attention)
