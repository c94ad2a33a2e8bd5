"""What ships with ftray: a tiny base, its tokenizer, and two tenants' rows, so that a first run needs no network.

Importing this package imports nothing heavy.
"""

from __future__ import annotations

from pathlib import Path

from ftray.errors import DataError

_HERE = Path(__file__).parent


def base_path() -> Path:
    """The folder of the embedded base, in Hugging Face format; `model.path: embedded` means this folder."""
    return _HERE / "base"


def data_path(name: str) -> Path:
    """The file of an embedded data set, such as `cheese/train.jsonl`; a run file writes `embedded:cheese/train.jsonl`.

    Raises DataError with the names that ship.
    """
    folder = (_HERE / "data").resolve()
    path = (folder / name).resolve()
    if path.is_file() and path.is_relative_to(folder):
        return path
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    raise DataError("no such embedded data set", where=f"embedded:{name}", hint=f"what ships: {', '.join(names)}")
