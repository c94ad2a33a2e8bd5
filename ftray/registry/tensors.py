"""A safetensors file of a stranger: its header first, bounded and checked, then its values in small blocks.

The `safetensors` library checks the header (offsets, overlaps, sizes against the file's) and is what loads the file
later; what it would not refuse is refused here before it is asked. No torch.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ftray.errors import ArtefactError

_EXPONENT = {"F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}
"""Floating types: how to see a value's bits, and its exponent. All ones there: infinite, or no number."""
_BLOCK = 1 << 22
"""Bytes looked at together."""
_SHOWN = 3


@dataclass(frozen=True)
class Header:
    shapes: dict[str, tuple[int, ...]]
    """By key, in the order of their bytes."""
    dtypes: dict[str, str]
    """`F32`, `BF16`, …"""
    start: int
    """Where the first tensor's bytes begin."""

    def bytes_of(self, key: str) -> int:
        return math.prod(self.shapes[key]) * item_bytes(self.dtypes[key])


def item_bytes(dtype: str) -> int:
    return int(_EXPONENT[dtype][0][-1])


def read_header(path: Path, most_bytes: int, where: str) -> Header:
    """The header of a safetensors file, which may have `most_bytes`. Raises ArtefactError."""
    from safetensors import SafetensorError, safe_open

    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
    if len(head) < 8:
        raise ArtefactError(f"{size} bytes are no safetensors file", where=where)
    (length,) = struct.unpack("<Q", head)
    if length > size - 8:
        raise ArtefactError(f"truncated: a header of {length:,} bytes in a file of {size:,}", where=where)
    if length > most_bytes:
        raise ArtefactError(f"a header of {length:,} bytes; the limit is {most_bytes:,}", where=where)
    try:
        with safe_open(path, framework="np") as opened:
            keys = opened.offset_keys()
            slices = {key: opened.get_slice(key) for key in keys}
            dtypes = {key: str(slices[key].get_dtype()) for key in keys}
            shapes = {key: tuple(slices[key].get_shape()) for key in keys}
    except SafetensorError as error:
        raise ArtefactError(f"no safetensors file that can be read: {str(error)[:200]}", where=where) from None
    for key, dtype in dtypes.items():
        if dtype not in _EXPONENT:
            hint = f"floating types that can be served: {', '.join(_EXPONENT)}"
            raise ArtefactError(f"{key[:200]} is of type {dtype}", where=where, hint=hint)
    header = Header(shapes, dtypes, 8 + length)
    if header.start + sum(map(header.bytes_of, keys)) != size:
        raise ArtefactError("its tensors do not fill it exactly", where=where)
    return header


def check_shapes(header: Header, expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raises ArtefactError unless keys and shapes are exactly those expected."""
    if odd := [key for key in header.shapes if key not in expected]:
        shown = ", ".join(key[:200] for key in sorted(odd)[:_SHOWN])
        raise ArtefactError(f"{len(odd)} tensors that base and configuration do not imply: {shown}", where=where)
    if missing := [key for key in expected if key not in header.shapes]:
        shown = ", ".join(missing[:_SHOWN])
        raise ArtefactError(f"{len(missing)} tensors are missing: {shown}", where=where)
    for key, shape in header.shapes.items():
        if shape != expected[key]:
            needed = f"base and configuration imply {list(expected[key])}"
            raise ArtefactError(f"{key} has the shape {list(shape)}, and {needed}", where=where)


def check_finite(path: Path, header: Header, where: str) -> None:
    """Raises ArtefactError that names the first tensor with a value that is infinite or no number."""
    import numpy as np

    buffer = bytearray(_BLOCK)
    with open(path, "rb") as file:
        file.seek(header.start)
        for key, dtype in header.dtypes.items():
            bits, exponent = _EXPONENT[dtype]
            left = header.bytes_of(key)
            while left:
                view = memoryview(buffer)[: min(left, _BLOCK)]
                if file.readinto(view) != len(view):
                    raise ArtefactError("it became shorter while it was read", where=where)
                values = np.frombuffer(view, bits)
                if ((values & exponent) == exponent).any():
                    raise ArtefactError(f"{key} holds values that are not finite numbers", where=where)
                left -= len(view)
