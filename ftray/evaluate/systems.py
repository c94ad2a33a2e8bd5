"""Systems: whatever can be evaluated, by whatever name the user has for it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from ftray.config import Method, Model, Run, load_run, parse_run, recipe_names
from ftray.data.remote import cache_folder, local_copy
from ftray.engine.engine import load_base
from ftray.errors import ArtefactError, ConfigError, UserError
from ftray.manifest import digest_of, filesystem
from ftray.model.load import DTYPES
from ftray.model.served import Adapter, Base
from ftray.registry.facts import CONFIG, FACTS
from ftray.registry.ref import parse_name
from ftray.registry.store import Registry
from ftray.train.export import Exported

CACHE_BYTES = 64 << 30
"""Of adapters fetched from registries."""
_METHOD: TypeAdapter[Method] = TypeAdapter(Method)


@dataclass(frozen=True)
class BaseKey:
    """What has to be loaded for a system; systems with the same one share it."""

    model: Model
    quantized: bool
    precision: Literal["bf16", "fp32"]
    double_quantization: bool = True
    """Of a quantized one."""

    @classmethod
    def under(cls, method: Method, model: Model, precision: Literal["bf16", "fp32"]) -> BaseKey:
        """The base as adapters of this method were trained on it."""
        double = method.double_quantization if method.quantized else True  # type: ignore[union-attr]
        return cls(model, method.quantized, precision, double)

    @property
    def held_in(self) -> str:
        """As tables call it."""
        if not self.quantized:
            return self.precision
        return "nf4" if self.double_quantization else "nf4, scales whole"

    def loaded(self, device: str) -> Base:
        """For an engine, on `device`. Raises ModelError."""
        return load_base(
            self.model,
            quantized=self.quantized,
            dtype=DTYPES[self.precision],
            device=device,
            double_quantization=self.double_quantization,
        )


@dataclass(frozen=True)
class System:
    """Something that answers."""

    name: str
    """As tables call it."""
    kind: Literal["base", "adapter", "model", "endpoint"]
    where: str
    """What the user gave."""
    base: BaseKey | None = None
    """None for an endpoint."""
    folder: Path | None = None
    """An adapter's files."""
    key: str | None = None
    """An adapter's digest, by which pools know it."""
    run: Run | None = None
    """What it was trained by, where that is known."""
    run_folder: str | None = None
    examples: int = 0
    """Rows in front of each question."""
    step: int | None = None
    chat_template: str | None = None
    """File of a template in place of the tokenizer's own."""
    base_sha256: str | None = None
    """Digest of the base that an adapter was trained on, where it says so."""


@contextmanager
def resolved(names: Sequence[str], registry: str | None = None) -> Iterator[list[System]]:
    """The systems of these names, until the end of the block (adapters of a registry are held in the local cache so
    long). Raises UserError for a name that leads nowhere."""
    with ExitStack() as stack:
        yield own_names([_resolve(name, registry, stack) for name in names])


def own_names(systems: Sequence[System]) -> list[System]:
    """The second of one name, and those after it, get a number as well."""
    seen: dict[str, int] = {}
    found = []
    for system in systems:
        seen[system.name] = seen.get(system.name, 0) + 1
        number = seen[system.name]
        found.append(system if number == 1 else replace(system, name=f"{system.name} ({number})"))
    return found


def _resolve(name: str, registry: str | None, stack: ExitStack) -> System:
    if name.startswith(("http://", "https://")):
        url, _, model = name.partition("#")
        return System(model or url, "endpoint", name)
    fs, path = filesystem(name)
    is_file = name.endswith((".yaml", ".yml"))
    if not is_file and fs.isdir(path):
        has = {file for file in ("run.yaml", FACTS, CONFIG, "config.json") if fs.isfile(f"{path}/{file}")}
        if "run.yaml" in has:
            return _of_run(name, load_run(name), name)
        if FACTS in has:
            return _of_artefact(name, Path(local_copy(name)))
        if CONFIG in has:
            return _of_peft(name, Path(local_copy(name)))
        if "config.json" in has:
            return System(path.rstrip("/").rsplit("/", 1)[-1], "model", name, BaseKey(Model(path=name), False, "bf16"))
        raise UserError("this folder holds neither a run, nor an adapter, nor a model", where=name)
    if is_file or name in recipe_names():
        run = load_run(name)
        return _of_run(name, run, run.folder)
    if name == "embedded":
        return System("embedded", "model", name, BaseKey(Model(path=name), False, "fp32"))
    return _of_registry(name, registry, stack)


def _of_run(name: str, run: Run, folder: str) -> System:
    found = Exported.of(run, folder)
    return _of_facts(run.name, name, found.folder, found.facts, run, folder)


def _of_artefact(name: str, folder: Path) -> System:
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        run = parse_run(json.dumps(facts["run"]), f"{name}/{FACTS}") if facts.get("run") else None
        return _of_facts(run.name if run else folder.name, name, folder, facts, run, None)
    except (ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{FACTS} is damaged: {error!r}", where=name) from None


def _of_facts(
    shown: str, name: str, folder: Path, facts: dict[str, Any], run: Run | None, run_folder: str | None
) -> System:
    """Of an artefact, verified or taken at its word, with the run that made it."""
    precision = run.train.precision if run else "bf16"
    template = run.data.chat_template if run else None
    if facts["kind"] == "model":
        base = BaseKey(Model(path=str(folder)), False, precision)
        return System(shown, "model", name, base, run=run, run_folder=run_folder, step=facts.get("step"))
    model = run.model if run else Model(path=facts["base"]["path"], revision=facts["base"]["revision"])
    method = run.method if run else _METHOD.validate_python(facts["method"])
    base = BaseKey.under(method, model, precision)
    key = digest_of(facts["files"])
    return System(
        shown,
        "adapter",
        name,
        base,
        folder,
        key,
        run,
        run_folder,
        step=facts.get("step"),
        chat_template=template,
        base_sha256=facts["base"]["sha256"],
    )


def _of_peft(name: str, folder: Path) -> System:
    """An adapter that PEFT wrote, without a word about its run."""
    settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    path = settings.get("base_model_name_or_path")
    if not path:
        raise ArtefactError("it does not say which base it is for", where=f"{name}/{CONFIG}")
    base = BaseKey(Model(path=path, revision=settings.get("revision")), False, "bf16")
    return System(folder.name, "adapter", name, base, folder, digest_of([str(folder)]))


def _of_registry(name: str, registry: str | None, stack: ExitStack) -> System:
    from ftray.registry.base import facts_of_base
    from ftray.registry.cache import Cache

    try:
        tenant, short, digest = parse_name(name)
    except ConfigError:
        raise UserError("no such folder, run file, recipe, adapter or endpoint", where=name) from None
    if registry is None:
        raise UserError(
            "no such folder, run file or recipe; and for the name of an adapter, which registry?",
            where=name,
            hint="give --registry FOLDER (or any fsspec URI), or set FTRAY_REGISTRY to it",
        )
    store = Registry(registry)
    ref = store.resolve(tenant, short, digest)
    facts, _ = store.facts(ref)
    run = parse_run(json.dumps(facts.run), str(ref)) if facts.run else None
    model = run.model if run else Model(path=facts.base.path, revision=facts.base.revision)
    fitting = facts_of_base(model)
    cache = Cache(cache_folder() / "adapters" / digest_of([fitting.digest, ""])[:16], CACHE_BYTES, store, fitting)
    folder = stack.enter_context(cache.get(ref))
    base = BaseKey.under(facts.method, model, run.train.precision if run else "bf16")
    template = run.data.chat_template if run else None
    shown = f"{tenant}/{short}"
    return System(
        shown, "adapter", name, base, folder, ref.digest, run, step=facts.step, chat_template=template
    )  # the cache has compared the base's digest


def read_adapters(base: Base, systems: Sequence[System]) -> dict[str, Adapter]:
    """The adapters among these systems, by key. Raises ArtefactError for one that was trained on another base."""
    found, digest = {}, None
    for system in systems:
        if system.key is None or system.folder is None:
            continue
        digest = digest or base.digest
        if system.base_sha256 not in (None, digest):
            raise ArtefactError(
                f"{base.source.path} is not the base that it was trained on (SHA-256 differs)",
                where=system.where,
                hint="put the base's own files back; on another base its figures would mean nothing",
            )
        found[system.key] = base.read(system.folder)
    return found


def baselines(systems: Sequence[System], counts: Sequence[int]) -> list[System]:
    """The bases that these systems began as, each alone and with so many examples in front. A base that was drawn at
    random is none."""
    keys: list[tuple[BaseKey, Run | None]] = []
    for system in systems:
        if system.kind == "adapter":
            keys.append((system.base, system.run))  # type: ignore[arg-type]
        elif system.kind == "model" and system.run is not None and not system.run.model.random_weights:
            keys.append((BaseKey(system.run.model, False, system.run.train.precision), system.run))
    firsts = dict(reversed(keys))
    found = []
    for key in dict.fromkeys(key for key, _ in keys):
        differs = f" {key.held_in}" if len(firsts) > 1 else ""
        run = firsts[key]
        template = run.data.chat_template if run else None
        for count in counts:
            name = f"base{differs}" + (f", {count}-shot" if count else "")
            found.append(System(name, "base", key.model.path, key, run=run, examples=count, chat_template=template))
    return found
