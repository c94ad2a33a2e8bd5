"""`ftray export`: what runs left, copied, merged or combined."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ftray.cli.words import facts, json_text, size
from ftray.config import load_run
from ftray.errors import ConfigError


def export_command(
    names: list[str],
    to: str,
    *,
    merge: bool,
    precision: str | None,
    combine: str | None,
    weights: str | None,
    density: float | None,
    rank: int | None,
    seed: int | None,
    as_json: bool,
    verbose: bool,
) -> None:
    if not combine:
        given = {"--weights": weights, "--density": density, "--rank": rank, "--seed": seed}
        for option in (name for name, value in given.items() if value is not None):
            raise ConfigError("it belongs to --combine", where=option)
    runs = [(load_run(name), name) for name in names]
    parsed = parse_weights(weights, len(runs))

    from ftray.train.export import Combination, Exported, export

    artefacts = [Exported.of(run, folder_of(name, run.folder)) for run, name in runs]
    combination = Combination(combine, parsed, density, rank, seed or 0) if combine else None
    with nullcontext() if verbose else quiet():
        written = export(artefacts, to, merge=merge, precision=precision, combination=combination)
    if as_json:
        print(json_text({"to": to, **written}, indent=2, ensure_ascii=False))
    else:
        print(describe(to, written))


@contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' progress bars and warnings."""
    from transformers.utils import logging as bars

    shown, disabled = bars.is_progress_bar_enabled(), logging.root.manager.disable
    bars.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if shown:
            bars.enable_progress_bar()


def folder_of(name: str, folder: str) -> str:
    """A run's folder: where its name points, if that is a folder (it may have been moved), else as its file says."""
    is_folder = not name.endswith((".yaml", ".yml")) and ("://" in name or Path(name).is_dir())
    return name if is_folder else folder


def parse_weights(text: str | None, count: int) -> tuple[float, ...]:
    """`0.7,0.3` → (0.7, 0.3); None: an even share for each of `count`. Raises ConfigError."""
    if text is None:
        return (1 / count,) * count
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{text!r} is no list of numbers", where="--weights", hint="for example 0.7,0.3") from None


def describe(to: str, written: dict[str, Any]) -> str:
    origins = [f"{o['name']}, {o['method']}, step {o['step']:,}, weight {o['weight']:g}" for o in written["origins"]]
    kind = "model" if written["kind"] == "model" else "adapter"
    if "merged" in written:
        kind += f" in {written['merged']['precision']}, adapters merged into it"
    if "combination" in written:
        kind += f", combined by {written['combination']['kind']}"
    total = sum(file["size"] for file in written["files"].values())
    pairs = [("written", to), ("what", kind), ("from", "\n".join(origins)), ("size", size(total))]
    return facts(pairs, indent=0)
