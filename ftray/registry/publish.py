"""Publish: an artefact into a registry, under a name. Checked whole before the name means it."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ftray.config import Model
from ftray.errors import ArtefactError
from ftray.manifest import filesystem, is_local
from ftray.registry.base import BaseFacts, shapes_alone
from ftray.registry.check import Checked, Limits, check, plain_files, refuse_files
from ftray.registry.facts import FACTS, Facts, parse_facts
from ftray.registry.ref import Ref, check_name
from ftray.registry.store import Registry

_REMOVAL_SECONDS = 30.0
"""How long a publisher waits for a removal of the same version to end."""
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Published:
    ref: Ref
    checked: Checked
    uploaded: bool
    """False: this version was there already."""
    moved: bool
    """False: the name meant it already."""
    held: str | None
    """The digest that the name is held on, and so keeps meaning."""


def publish(
    folder: str | os.PathLike[str],
    registry: Registry | str,
    tenant: str,
    name: str,
    base: BaseFacts | None = None,
    limits: Limits | None = None,
) -> Published:
    """Put the artefact in `folder` (a path or fsspec URI) into the registry and let the name mean it.

    `base` is what it must fit; None: the shapes of the base that its `ftray.json` names are enough, and its digest is
    left to the server's check. Any number may publish at once, and any may be killed: a name always means a whole
    version, and what was left half is completed by the next publish. Raises ArtefactError, ConfigError, ModelError.
    """
    registry = Registry(registry) if isinstance(registry, str) else registry
    limits, where = limits or Limits(), os.fspath(folder)
    check_name(tenant, "tenant")
    check_name(name)
    with tempfile.TemporaryDirectory(prefix="ftray-publish-") as temporary:
        stage = Path(temporary)
        _stage(where, stage, limits)
        if base is None:
            origin = parse_facts((stage / FACTS).read_bytes(), f"{where}/{FACTS}").base
            base = shapes_alone(Model(path=origin.path, revision=origin.revision))
        checked = check(stage, base, limits, where=where)
        ref = Ref(tenant, name, checked.digest)
        uploaded, moved = _put(registry, ref, stage, checked.facts)
    return Published(ref, checked, uploaded, moved, registry.held(tenant, name))


def _stage(folder: str, stage: Path, limits: Limits) -> None:
    """Copy the files to where nobody changes them meanwhile; what no adapter has stops here."""
    fs, root = filesystem(folder)
    if is_local(folder):
        sizes = plain_files(Path(root), folder)
    else:
        fs.invalidate_cache()
        found = fs.find(root, detail=True)
        sizes = {path[len(root) :].lstrip("/"): info["size"] for path, info in found.items()}
        if not sizes:
            raise ArtefactError("no such folder", where=folder)
    refuse_files(sizes, limits, folder)
    for name, size in sizes.items():
        source = fs.open(f"{root}/{name}", "rb") if not is_local(folder) else _open_plain(Path(root) / name)
        with source, open(stage / name, "wb") as target:
            left = size + 1  # one that grows meanwhile fails the check, and never fills the disk
            while left and (block := source.read(min(_BLOCK, left))):
                target.write(block)
                left -= len(block)


def _open_plain(path: Path) -> BinaryIO:
    """A local file for reading, if no link has taken its place meanwhile."""
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb")


def _put(registry: Registry, ref: Ref, stage: Path, facts: Facts) -> tuple[bool, bool]:
    """(uploaded, moved); again where somebody removes this very version at the same time."""
    uploaded = moved = False
    deadline = time.monotonic() + _REMOVAL_SECONDS
    while True:
        if not registry.is_being_removed(ref):
            try:
                uploaded |= registry.upload(ref, stage, facts)
                moved |= registry.point(ref)
                if registry.confirm(ref, facts):
                    return uploaded, moved
            except FileNotFoundError:  # its folder was removed under the upload
                pass
        if time.monotonic() > deadline:
            raise ArtefactError(
                f"somebody has been removing this version for {_REMOVAL_SECONDS:.0f} s, or broke off",
                where=str(ref),
                hint=f"to end a removal that broke off: ftray adapters remove {ref.tenant}/{ref.name}@{ref.digest}",
            )
        time.sleep(0.1)
