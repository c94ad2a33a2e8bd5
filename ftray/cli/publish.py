"""`ftray publish`: what a run left, into a registry."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ftray.cli.words import facts, json_text, size
from ftray.config import Model, load_run
from ftray.errors import ArtefactError, ConfigError
from ftray.manifest import filesystem, join
from ftray.redact import redact

if TYPE_CHECKING:
    from ftray.registry.publish import Published
    from ftray.registry.store import Registry

VARIABLE = "FTRAY_REGISTRY"


def open_registry(uri: str | None) -> Registry:
    """The registry that `--registry` or FTRAY_REGISTRY names. Raises ConfigError without either."""
    from ftray.registry.store import Registry

    uri = uri or os.environ.get(VARIABLE)
    if not uri:
        raise ConfigError(
            "which registry?", hint=f"give --registry FOLDER (or any fsspec URI), or set {VARIABLE} to it"
        )
    return Registry(uri)


def publish_command(run: str, as_name: str, *, registry: str | None, base: str | None, as_json: bool) -> None:
    from ftray.registry.base import facts_of_base
    from ftray.registry.publish import publish
    from ftray.registry.ref import parse_name

    tenant, name, digest = parse_name(as_name)
    if digest:
        raise ConfigError("a version has its digest from its files", where=f"--as {as_name}", hint=f"--as {name}")
    store, folder = open_registry(registry), artefact_folder(run)
    fitting = facts_of_base(Model(path=base)) if base else None
    published = publish(folder, store, tenant, name, fitting)
    if as_json:
        print(json_text(to_json(published, store), indent=2, ensure_ascii=False))
    else:
        print(describe(published, store))


def artefact_folder(name: str) -> str:
    """The artefact that a run's name, file or folder leads to, or that is in this very folder. Raises ArtefactError."""
    from ftray.cli.export import folder_of
    from ftray.registry.facts import FACTS

    def has_facts(folder: str) -> bool:
        fs, path = filesystem(folder)
        return bool(fs.isfile(f"{path}/{FACTS}"))

    if not name.endswith((".yaml", ".yml")) and has_facts(name):
        return name
    folder = folder_of(name, load_run(name).folder)
    artefact = join(folder, "artefact")
    if not has_facts(artefact):
        hint = f"ftray train {folder} goes on"
        raise ArtefactError("no artefact: the run is not finished", where=artefact, hint=hint)
    return artefact


def to_json(published: Published, store: Registry) -> dict[str, Any]:
    ref, found = published.ref, published.checked.facts
    return {
        "registry": redact(store.uri),
        "tenant": ref.tenant,
        "name": ref.name,
        "digest": ref.digest,
        "uploaded": published.uploaded,
        "moved": published.moved,
        "held": published.held,
        "size": published.checked.size,
        "base": found.base.model_dump(),
        "method": found.method.name,
        "step": found.step,
    }


def describe(published: Published, store: Registry) -> str:
    ref, found = published.ref, published.checked.facts
    means = "the name means it" if published.moved else "the name meant it already"
    if published.held and published.held != ref.digest:
        means = (
            f"the name is held on {published.held[:12]} and goes on meaning that;"
            f" ftray adapters unpin {ref.tenant}/{ref.name}"
        )
    step = "" if found.step is None else f", step {found.step:,}"
    pairs = [
        ("published", f"{ref}\n{means}"),
        ("registry", redact(store.uri) + ("" if published.uploaded else "\nthis version was there already")),
        ("what", f"{found.method.name} on {redact(found.base.path)}{step}"),
        ("size", size(published.checked.size)),
    ]
    return facts(pairs, indent=0)
