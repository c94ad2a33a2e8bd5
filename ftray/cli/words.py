"""Numbers, times and tables as text, alike in every command. No dependencies."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any


def json_text(value: Any, **options: Any) -> str:
    """JSON that every program reads: what is no number, such as the loss of a skipped step, is null, as in
    metrics.jsonl."""
    return json.dumps(_finite(value), default=str, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def count(number: int | float) -> str:
    """1234567 → `1,234,567`."""
    return f"{number:,.0f}"


def some(number: int, noun: str, plural: str | None = None) -> str:
    """`1 row`, `1,200 rows`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def percent(share: float) -> str:
    """Three significant digits at most: `0.522 %`, `12.3 %`, `100 %`."""
    return f"{100 * share:.3g} %" if share < 1 else f"{100 * share:,.0f} %"


def duration(seconds: float | None) -> str:
    """`0.4 s`, `42 s`, `3 min 05 s`, `2 h 10 min`, `3 d 4 h`."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def size(amount: float) -> str:
    """Bytes in binary units: `512 B`, `3.4 KiB`, `12.0 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024 or unit == "GiB":
            return f"{amount:,.0f} B" if unit == "B" else f"{amount:,.1f} {unit}"
        amount /= 1024
    raise AssertionError


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]], right: Sequence[int] = ()) -> str:
    """Aligned columns under a rule; those numbered in `right` are aligned to the right."""
    cells = [list(headers), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    lines = ["  ".join(_pad(c, widths[i], i in right) for i, c in enumerate(row)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("─" * w for w in widths), *lines[1:]])


def _pad(cell: str, width: int, right: bool) -> str:
    return cell.rjust(width) if right else cell.ljust(width)


def facts(pairs: Sequence[tuple[str, str]], indent: int = 2) -> str:
    """Name and value in two columns; further lines of a value stand under its first."""
    width = max((len(name) for name, _ in pairs), default=0)
    pad = " " * (indent + width + 2)
    return "\n".join(f"{' ' * indent}{name:<{width}}  {text.replace(chr(10), chr(10) + pad)}" for name, text in pairs)
