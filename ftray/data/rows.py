"""What a reader hands on, and what is put aside."""

from __future__ import annotations

from typing import Any, NamedTuple

MAX_ROW_BYTES = 4 << 20
"""A row with more text than this is put aside: no context is that long, and tokenizing it would take gigabytes."""

_SAMPLE = 160


class BadRow(Exception):
    """A row that cannot be used. `reason` is one of few, and is counted; `detail` is this row's own."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


class Raw(NamedTuple):
    """One row as read: `value`, or the `problem` with it, or neither (a blank line)."""

    number: int
    """1-based, from the start of the fragment."""
    value: Any
    problem: BadRow | None = None
    sample: Any = None
    """What to show of a row that has a problem."""
    lines: int = 1
    """How far the next row's number is."""

    @property
    def is_blank(self) -> bool:
        return self.value is None and self.problem is None


def shortened(value: Any) -> str:
    """A printable sample of a row: its beginning, undecodable bytes and lone surrogates escaped."""
    if isinstance(value, bytes | bytearray):
        text = bytes(value[: 2 * _SAMPLE]).decode("utf-8", errors="backslashreplace")
    elif isinstance(value, str):
        text = value[: 2 * _SAMPLE]
    elif isinstance(value, dict):
        text = "{" + ", ".join(f"{str(k)[:40]}: {shortened(v)[:60]}" for k, v in list(value.items())[:8]) + "}"
    elif isinstance(value, list):
        text = "[" + ", ".join(shortened(v)[:60] for v in value[:8]) + "]"
    else:
        text = str(value)[: 2 * _SAMPLE]
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text.encode("utf-8", "backslashreplace").decode())
    return text if len(text) <= _SAMPLE else text[: _SAMPLE - 1] + "…"
