"""`ftray adapters …`: look at a registry, and keep it in order."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ftray.cli.publish import open_registry
from ftray.cli.words import facts, json_text, size, some, table
from ftray.errors import ConfigError
from ftray.redact import redact
from ftray.registry.ref import Ref, parse_name

if TYPE_CHECKING:
    from ftray.registry.facts import Facts
    from ftray.registry.store import Entry, Registry, Version

_SHOWN = 12
"""Digits of a digest on a terminal."""


def list_command(tenant: str | None, *, registry: str | None, as_json: bool) -> None:
    store = open_registry(registry)
    entries = store.entries(tenant)
    if as_json:
        _print_json({"registry": redact(store.uri), "adapters": [entry_json(entry) for entry in entries]})
    elif not entries:
        print(f"no adapters{f' of {tenant}' if tenant else ''} in {redact(store.uri)}")
    else:
        rows = [_row(entry) for entry in entries]
        print(table(["name", "means", "published", "versions", "size", ""], rows, right=(3, 4)))


def show_command(name: str, *, registry: str | None, as_json: bool) -> None:
    store = open_registry(registry)
    tenant, short, digest = parse_name(name)
    entry = store.show(tenant, short)
    meant = digest or entry.digest
    ref = store.resolve(tenant, short, meant) if meant else None
    found = store.facts(ref)[0] if ref else None
    if as_json:
        told = found.model_dump(mode="json") if found else None
        _print_json(entry_json(entry) | {"shown": ref.digest if ref else None, "facts": told})
        return
    if ref and found:
        print(facts(_of_version(ref, found), indent=0) + "\n")
    if entry.damaged:
        print(f"{entry.damaged}\n")
    rows = [(v.digest[:_SHOWN], _when(v.published), size(v.size), _state(v, entry)) for v in entry.versions]
    print(table(["version", "published", "size", ""], rows, right=(2,)))


def pin_command(name: str, *, hold: bool, registry: str | None, as_json: bool) -> None:
    store = open_registry(registry)
    ref = _meant(store, name)
    store.pin(ref, hold=hold)
    means = ", and the name means it whatever is published" if hold else ""
    _done(ref, {"pinned": True, "held": hold}, f"{ref} stays{means}", as_json)


def unpin_command(name: str, *, registry: str | None, as_json: bool) -> None:
    store = open_registry(registry)
    ref = _meant(store, name)
    was = store.unpin(ref)
    entry = store.show(ref.tenant, ref.name)
    told = f"{ref} may be removed again" if was else f"{ref} was not pinned"
    if was and entry.digest and entry.digest != ref.digest:
        told += f"; the name means {entry.digest[:_SHOWN]}"
    _done(ref, {"unpinned": was, "means": entry.digest}, told, as_json)


def remove_command(name: str, *, everything: bool, registry: str | None, as_json: bool) -> None:
    store = open_registry(registry)
    tenant, short, digest = parse_name(name)
    if everything == (digest is not None):
        raise ConfigError(
            "a version or the whole name?",
            where=name,
            hint=f"{tenant}/{short}@DIGEST removes one version, {tenant}/{short} --all the name with all of them",
        )
    if digest:
        ref = store.version(tenant, short, digest)
        store.remove(ref)
        _done(ref, {"removed": [ref.digest]}, f"removed {ref}", as_json)
        return
    removed = store.remove_name(tenant, short)
    if as_json:
        _print_json({"tenant": tenant, "name": short, "removed": removed})
    else:
        print(f"removed {tenant}/{short}, {some(len(removed), 'version')}")


def rollback_command(name: str, *, registry: str | None, as_json: bool) -> None:
    store = open_registry(registry)
    tenant, short, digest = parse_name(name)
    ref = store.rollback(tenant, short, digest)
    held = store.held(tenant, short)
    told = f"{tenant}/{short} means {ref.digest[:_SHOWN]}"
    if held and held != ref.digest:
        told = f"{tenant}/{short} is held on {held[:_SHOWN]}; unpinned, it will mean {ref.digest[:_SHOWN]}"
    _done(ref, {"held": held}, told, as_json)


def _meant(store: Registry, name: str) -> Ref:
    tenant, short, digest = parse_name(name)
    return store.resolve(tenant, short, digest)


def _done(ref: Ref, told: dict[str, Any], text: str, as_json: bool) -> None:
    if as_json:
        _print_json(asdict(ref) | told)
    else:
        print(text)


def _print_json(value: Any) -> None:
    print(json_text(value, indent=2, ensure_ascii=False))


def entry_json(entry: Entry) -> dict[str, Any]:
    return asdict(entry)


def _row(entry: Entry) -> tuple[Any, ...]:
    published = next((v.published for v in entry.versions if v.digest == entry.digest), None)
    notes = [
        *(["held"] if entry.held else []),
        *(["pinned"] if any(v.pinned for v in entry.versions) else []),
        *(["DAMAGED"] if entry.damaged else []),
        *(["not whole"] if any(not v.complete for v in entry.versions) else []),
    ]
    total = size(sum(v.size for v in entry.versions))
    meant = entry.digest[:_SHOWN] if entry.digest else "nothing"
    return entry.full_name, meant, _when(published), len(entry.versions), total, ", ".join(notes)


def _when(published: str | None) -> str:
    """`2026-11-21 15:38:51 UTC`"""
    return f"{published[:19].replace('T', ' ')} UTC" if published else "?"


def _state(version: Version, entry: Entry) -> str:
    meant = version.digest == entry.digest
    notes = [
        *(["held" if entry.held else "current"] if meant else []),
        *(["pinned"] if version.pinned else []),
        *(["not whole: a publish or removal broke off"] if not version.complete else []),
    ]
    return ", ".join(notes)


def _of_version(ref: Ref, found: Facts) -> list[tuple[str, str]]:
    step = "" if found.step is None else f", step {found.step:,}"
    pairs = [
        ("name", f"{ref.tenant}/{ref.name}"),
        ("version", ref.digest),
        ("method", f"{found.method.name}{step}"),
        ("base", f"{redact(found.base.path)}\nSHA-256 {found.base.sha256}"),
        ("template", f"SHA-256 {found.chat_template_sha256}" if found.chat_template_sha256 else "none"),
    ]
    losses = {name: value for name, value in found.metrics.items() if name.endswith("loss") and value is not None}
    if losses:
        told = [f"{name.removesuffix('_loss')} {value:.4f}" for name, value in losses.items()]
        pairs.append(("losses", ", ".join(told)))
    run = found.run.get("name") if found.run else None
    if isinstance(run, str):
        pairs.append(("run", run))
    return pairs
