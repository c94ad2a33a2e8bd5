"""What a batch generation is: which rows are asked of which adapters, and where a row's answer goes.

Rows are cut into parts of one length, in their order. A part is done as a whole or not at all; what is in it depends on
the prompts and on what was asked for, never on the workers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ftray.config import Decoding, Model, Source
from ftray.data.fragments import Fragment
from ftray.data.readers import read
from ftray.data.sources import describe_sources, files_of, fragments_of
from ftray.data.tokenizer import local_model_folder
from ftray.errors import ConfigError, DataError, UserError
from ftray.evaluate.answers import seed_of
from ftray.evaluate.questions import ask_only
from ftray.evaluate.systems import BaseKey, System, resolved
from ftray.manifest import digest_of, filesystem, is_local

FORMAT = 1
"""Version of what is written; part of a generation's digest."""


@dataclass(frozen=True)
class Asking:
    """What the user wants."""

    source: Source
    """Where the prompts are, and how a row becomes one."""
    out: str
    """The file of the answers, JSONL; a path or any fsspec URI."""
    decoding: Decoding
    adapter: str | None = None
    """Answers rows that name none; None: the base does."""
    adapter_column: str | None = None
    """The column that names a row's adapter."""
    base: str | None = None
    """None: that of the first adapter."""
    quantized: bool | None = None
    """In NF4; None: as the first adapter was trained."""
    chat_template: str | None = None
    """File of a Jinja template for all rows; None: that of each adapter's run, or the base's own."""
    registry: str | None = None
    part_rows: int = 256
    slots: int | None = None
    """Answers that a worker writes at once; None: as many as there is room for, fewer with a long context."""
    context: int | None = None
    """Tokens of prompt and answer together; None: what the base allows, at most 4,096."""
    workers: int | None = None
    """Each holds a base; None: one for each GPU, or without any one for each machine."""
    overwrite: bool = False


@dataclass(frozen=True)
class Placed:
    """An adapter of this generation."""

    where: str
    """A name that leads to it on every machine."""
    digest: str
    chat_template: str | None


@dataclass(frozen=True)
class Part:
    """Consecutive rows of one fragment."""

    number: int
    fragment: int
    skip: int
    """Rows of the fragment before it."""
    first: int
    """Number of its first row, from 1."""
    rows: int


@dataclass(frozen=True)
class Generation:
    """Everything that a worker needs to know."""

    asking: Asking
    base: BaseKey
    adapters: dict[str, Placed]
    """By the name that rows have for it."""
    refused: dict[str, str]
    """Why a name leads to no adapter that could be used here."""
    fragments: tuple[Fragment, ...]
    parts: tuple[Part, ...]
    rows_by_adapter: dict[str, int]
    """Rows that ask it; the base's are under the empty name."""
    digest: str
    """Of everything that shapes the answers."""

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)

    @property
    def folder(self) -> str:
        """Where parts are kept until the whole is there."""
        return f"{self.asking.out}.parts"

    @property
    def manifest(self) -> str:
        return f"{self.asking.out}.manifest.json"

    def seed_of(self, row: int) -> int:
        """Of the draws of one row's answer."""
        return seed_of(self.asking.decoding.seed, row)


def plan(asking: Asking) -> Generation:
    """Read the prompts once, find the adapters that they name. Raises DataError, ConfigError; RunError when a registry
    cannot be reached."""
    if asking.decoding.beams > 1 or asking.decoding.no_repeat_ngram:
        raise ConfigError("the engine has no beam search, nor no_repeat_ngram", hint="ftray evaluate has both")
    ask_only(asking.source.format)  # a template that is none is refused before anything is read
    asking = _absolute(asking)
    files = files_of(asking.source)
    fragments = [_with_adapter(f, asking) for f in fragments_of(asking.source, files, 0, "held_out")]
    parts, counts = _parts(fragments, asking)
    if not parts:
        raise DataError("there is no row", where=asking.source.path)
    base, adapters, refused = _find(asking, [name for name in counts if name])
    decoding = asking.decoding.model_dump(mode="json")
    known = {name: placed.digest for name, placed in adapters.items()} | dict.fromkeys(refused)
    shaping = {
        "format": FORMAT,
        "prompts": describe_sources([asking.source], [files]),
        "base": [base.model.model_dump(mode="json"), base.quantized, base.precision, base.double_quantization],
        "adapters": known,
        "asked": [asking.adapter, asking.adapter_column, asking.chat_template, asking.context, asking.part_rows],
        "decoding": decoding,
    }
    return Generation(asking, base, adapters, refused, tuple(fragments), tuple(parts), dict(counts), digest_of(shaping))


def _absolute(asking: Asking) -> Asking:
    """With paths that mean the same in a worker, wherever that runs."""

    def whole(path: str) -> str:
        return filesystem(path)[1] if is_local(path) else path

    return replace(
        asking,
        out=whole(asking.out),
        registry=whole(asking.registry) if asking.registry else None,
        chat_template=whole(asking.chat_template) if asking.chat_template else None,
    )


def _with_adapter(fragment: Fragment, asking: Asking) -> Fragment:
    if "columns" not in fragment.extra or asking.adapter_column is None:
        return fragment
    columns = list(dict.fromkeys([*fragment.extra["columns"], asking.adapter_column]))
    return replace(fragment, extra=fragment.extra | {"columns": columns})


def _parts(fragments: Sequence[Fragment], asking: Asking) -> tuple[list[Part], Counter[str]]:
    parts: list[Part] = []
    counts: Counter[str] = Counter()
    before = 0
    for number, fragment in enumerate(fragments):
        rows = 0
        for raw in read(fragment):
            if not raw.is_blank:
                rows += 1
                name = adapter_of(raw.value, asking) if isinstance(raw.value, dict) else None
                counts[name or ""] += 1
        for skip in range(0, rows, asking.part_rows):
            length = min(asking.part_rows, rows - skip)
            parts.append(Part(len(parts), number, skip, before + skip + 1, length))
        before += rows
    return parts, counts


def adapter_of(row: dict[str, Any], asking: Asking) -> str | None:
    """The name of the adapter that is to answer this row; None: the base."""
    name = row.get(asking.adapter_column) if asking.adapter_column is not None else None
    if name is None or name == "":
        return asking.adapter
    return name if isinstance(name, str) else json.dumps(name, default=str)


# ------------------------------------------------------------------------------------------------------------ adapters


def _find(asking: Asking, names: Sequence[str]) -> tuple[BaseKey, dict[str, Placed], dict[str, str]]:
    """(the base of all, adapters on it, why others cannot be used)."""
    found: dict[str, System] = {}
    where: dict[str, str] = {}
    refused: dict[str, str] = {}
    for name in sorted(names):
        where[name] = _everywhere(name)
        try:
            with resolved([where[name]], asking.registry) as [system]:
                found[name] = system
        except UserError as error:
            refused[name] = str(error).replace("\n", " ")
            continue
        if system.kind != "adapter":
            refused[name] = f"{name}: it is {_article(system.kind)}, not an adapter"
            del found[name]
    base = _base(asking, list(found.values()))
    adapters = {}
    for name, system in found.items():
        assert system.base is not None
        assert system.key is not None
        if not _same(system.base.model, base.model):
            refused[name] = f"{name}: it is an adapter of {system.base.model.path}, and the base is {base.model.path}"
            continue
        pinned = where[name]
        if system.folder is not None and not _is_path(pinned) and "@" not in pinned:
            pinned = f"{pinned}@{system.key}"
        adapters[name] = Placed(pinned, system.key, asking.chat_template or system.chat_template)
    return base, adapters, refused


def _everywhere(name: str) -> str:
    """The name from any working directory."""
    return filesystem(name)[1] if is_local(name) and _is_path(name) else name


def _is_path(name: str) -> bool:
    fs, path = filesystem(name)
    return bool(fs.exists(path))


def _article(kind: str) -> str:
    return {"model": "a model of its own", "endpoint": "an endpoint"}.get(kind, f"a {kind}")


def _base(asking: Asking, adapters: Sequence[System]) -> BaseKey:
    if asking.base is not None:
        key = _named_base(asking.base, asking.registry)
    elif adapters:
        key = adapters[0].base  # type: ignore[assignment]
    else:
        raise ConfigError("which base?", where="--base", hint="no row names an adapter, whose base would be taken")
    return key if asking.quantized is None else replace(key, quantized=asking.quantized)


def _named_base(name: str, registry: str | None) -> BaseKey:
    if name != "embedded" and not _is_path(name):
        return BaseKey(Model(path=name), False, "bf16")
    with resolved([_everywhere(name)], registry) as [system]:
        if system.base is None:
            raise ConfigError("this is no base", where=f"--base {name}")
        return system.base


def _same(one: Model, other: Model) -> bool:
    if (one.path, one.revision) == (other.path, other.revision):
        return True
    try:
        return local_model_folder(one, weights=False) == local_model_folder(other, weights=False)
    except UserError:
        return False
