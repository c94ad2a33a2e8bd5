"""What may change between the parts of one run, and what may not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ftray.config import Run
from ftray.errors import ConfigError

_FREE = {
    "data": {"cache", "max_rejected"},
    "train": {
        "micro_batch_rows",
        "gradient_checkpointing",
        "evaluate_every",
        "evaluate_rows",
        "commit_every",
        "keep_last",
        "keep_best",
        "early_stopping",
        "max_skipped",
    },
}
"""Keys that change neither which rows are trained nor what a step does to the weights."""


def identity(run: Run, data_digest: str) -> dict[str, Any]:
    """What decides the weights of every step: kept in each commit."""
    whole = run.dump()
    kept: dict[str, Any] = {key: whole[key] for key in ("model", "method", "data", "train", "objective", "seed")}
    for section, free in _FREE.items():
        kept[section] = {key: value for key, value in kept[section].items() if key not in free}
    return {**kept, "data_digest": data_digest}


def refuse_other_run(committed: dict[str, Any], now: dict[str, Any], folder: str) -> None:
    """Raises ConfigError, with every key that differs, when a commit is of another run than `now`."""
    if found := list(differences("", committed, now)):
        raise ConfigError(
            "this folder holds commits of a run with other settings:\n    " + "\n    ".join(found),
            where=folder,
            hint="take the settings back to resume it, or choose another `output` (or `name`) for a new run",
        )


def differences(path: str, a: Any, b: Any) -> Iterator[str]:
    """Each dotted key in which two mappings differ, as a sentence."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            yield from differences(f"{path}.{key}" if path else key, a.get(key), b.get(key))
    elif a != b:
        yield f"{path}: committed with {a!r}, now {b!r}"
