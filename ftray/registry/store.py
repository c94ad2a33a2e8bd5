"""A registry: adapters by tenant, name and digest on any fsspec store.

    REGISTRY/TENANT/NAME/DIGEST/ftray.json …    a version; it never changes, and counts once its ftray.json is there
    REGISTRY/TENANT/NAME/current.json           which version the name means, and which it meant before
    REGISTRY/TENANT/NAME/hold.json              which version it means whatever is published (`pin --hold`)
    REGISTRY/TENANT/NAME/pins/DIGEST            this version must not be removed
    REGISTRY/TENANT/NAME/removing/DIGEST        this version is being removed

There is no lock: object stores have none. Each fact is a file of its own that is written whole, so that nobody
overwrites what another says. Who removes a version says so first and looks at who needs it then; who needs it says so
first and looks whether it is being removed then. So at least one of two that meet sees the other.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError

from ftray.config.explain import explain
from ftray.config.strict import Strict
from ftray.errors import ArtefactError, ConfigError, FtrayError, RunError, UnknownAdapter
from ftray.manifest import atomic_write, filesystem, is_local
from ftray.redact import redact
from ftray.registry.facts import FACTS, Facts, Sha256, digest_of_facts, parse_facts, strict_json
from ftray.registry.ref import Ref, check_name, is_digest, is_name
from ftray.storage import explained, make_folder

POINTER = "current.json"
HOLD = "hold.json"
PINS = "pins"
REMOVING = "removing"
_REMEMBERED = 64
"""Versions that a pointer remembers, for rollback."""
_POINTER_BYTES = 1 << 16
_BLOCK = 1 << 20
_Files = dict[str, dict[str, Any]]
"""Path below a folder → what the store says of the file."""
_Kind = TypeVar("_Kind", bound=Strict)


class Pointer(Strict):
    """`current.json`."""

    format: Literal[1] = 1
    digest: Sha256
    before: Annotated[list[Sha256], Field(max_length=_REMEMBERED)] = []
    """What the name meant earlier, the latest first."""
    moved: str
    """When, in ISO 8601, UTC."""


class Hold(Strict):
    """`hold.json`."""

    format: Literal[1] = 1
    digest: Sha256
    since: str


@dataclass(frozen=True)
class Version:
    digest: str
    complete: bool
    """False: the litter of a publish that broke off, or of a removal."""
    size: int
    """Bytes of its files."""
    published: str | None
    """When its last file was written, in ISO 8601, UTC; None where the store does not say."""
    pinned: bool


@dataclass(frozen=True)
class Entry:
    """One name."""

    tenant: str
    name: str
    digest: str | None
    """What the name means now; None: nothing, its pointer is gone."""
    held: bool
    """It means this whatever is published."""
    versions: tuple[Version, ...]
    """The latest first."""
    damaged: str | None = None
    """What is wrong with its pointer or hold, where something is."""

    @property
    def full_name(self) -> str:
        return f"{self.tenant}/{self.name}"


class Registry:
    """The registry at a path or fsspec URI. Cheap to make; safe for threads. All methods raise ConfigError for names
    that are none, and RunError when the store cannot be reached."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.local = is_local(uri)
        try:
            self.fs, root = filesystem(uri)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"no registry can be there: {error}",
                where=redact(uri),
                hint="a folder, or an fsspec URI whose driver is installed, such as ftray[s3] for s3://",
            ) from None
        self.root = root.rstrip("/")

    # ------------------------------------------------------------------------------------------------------- reading

    def resolve(self, tenant: str, name: str, digest: str | None = None) -> Ref:
        """The version that a name means, or the one whose digest begins with `digest`. Raises UnknownAdapter, and
        ArtefactError for a damaged pointer and for a beginning that several versions have."""
        at = self._place(tenant, name)
        if digest is None:
            found = self._read_as(Hold, f"{at}/{HOLD}") or self.pointer(tenant, name)
            if found is None:
                raise UnknownAdapter("no such adapter", where=f"{tenant}/{name}")
            return Ref(tenant, name, found.digest)
        if is_digest(digest) and self.is_complete(Ref(tenant, name, digest)):
            return Ref(tenant, name, digest)
        versions = self.show(tenant, name).versions
        matching = [v.digest for v in versions if v.complete and v.digest.startswith(digest)]
        return Ref(tenant, name, _only_one(matching, digest, f"{tenant}/{name}"))

    def entries(self, tenant: str | None = None) -> list[Entry]:
        """Every name of a tenant, or of all, sorted."""
        if tenant is not None:
            check_name(tenant, "tenant")
        found: dict[tuple[str, str], _Files] = {}
        for path, info in self._find(tenant or "").items():
            parts = ([tenant] if tenant else []) + path.split("/")
            if len(parts) >= 3 and is_name(parts[0]) and is_name(parts[1]):
                found.setdefault((parts[0], parts[1]), {})["/".join(parts[2:])] = info
        wanted = [(names, file) for names, files in found.items() for file in (HOLD, POINTER) if file in files]
        contents = self._read_many([f"{self._place(*names)}/{file}" for names, file in wanted])
        return [self._entry(*names, files, contents) for names, files in sorted(found.items())]

    def show(self, tenant: str, name: str) -> Entry:
        """One name with its versions. Raises UnknownAdapter."""
        at = self._place(tenant, name)
        if not (files := self._find(f"{tenant}/{name}")):
            raise UnknownAdapter("no such adapter", where=f"{tenant}/{name}")
        contents = self._read_many([f"{at}/{file}" for file in (HOLD, POINTER) if file in files])
        return self._entry(tenant, name, files, contents)

    def version(self, tenant: str, name: str, digest: str) -> Ref:
        """The version whose digest begins with `digest`, also one that is litter. Raises UnknownAdapter, and
        ArtefactError where several do."""
        if is_digest(digest):
            return Ref(tenant, name, digest)
        matching = [v.digest for v in self.show(tenant, name).versions if v.digest.startswith(digest)]
        return Ref(tenant, name, _only_one(matching, digest, f"{tenant}/{name}"))

    def _entry(self, tenant: str, name: str, files: _Files, contents: dict[str, bytes]) -> Entry:
        versions: dict[str, _Files] = {}
        for path, info in files.items():
            digest, _, file = path.partition("/")
            if is_digest(digest) and file:
                versions.setdefault(digest, {})[file] = info
        listed = [
            Version(
                digest=digest,
                complete=FACTS in own,
                size=sum(info.get("size") or 0 for info in own.values()),
                published=max(filter(None, (_time_of(info) for info in own.values())), default=None),
                pinned=f"{PINS}/{digest}" in files,
            )
            for digest, own in versions.items()
        ]
        listed.sort(key=lambda version: (version.published or "", version.digest), reverse=True)
        at, meant, held, damaged = self._place(tenant, name), None, False, None
        try:
            if hold := _parse(Hold, contents.get(f"{at}/{HOLD}"), f"{at}/{HOLD}"):
                meant, held = hold.digest, True
            elif pointer := _parse(Pointer, contents.get(f"{at}/{POINTER}"), f"{at}/{POINTER}"):
                meant = pointer.digest
        except ArtefactError as error:
            damaged = str(error)
        return Entry(tenant, name, meant, held, tuple(listed), damaged)

    def facts(self, ref: Ref, most_bytes: int = 4 << 20) -> tuple[Facts, bytes]:
        """A version's `ftray.json`, parsed and as it is. Raises UnknownAdapter, and ArtefactError where it is damaged:
        its SHA-256 is the version's digest."""
        content = self._read(f"{self._place_of(ref)}/{FACTS}", most_bytes)
        if content is None:
            raise UnknownAdapter("no such version", where=str(ref))
        if digest_of_facts(content) != ref.digest:
            raise ArtefactError(f"{FACTS} is damaged in the registry (SHA-256 differs)", where=str(ref), hint=_AGAIN)
        return parse_facts(content, f"{ref}/{FACTS}"), content

    def is_complete(self, ref: Ref) -> bool:
        """Whether the version counts: its `ftray.json`, which is written last, is there."""
        with self._reached():
            self.fs.invalidate_cache()  # some drivers remember listings, and others write to the store too
            return bool(self.fs.isfile(f"{self._place_of(ref)}/{FACTS}"))

    def download(self, ref: Ref, name: str, size: int, to: Path) -> None:
        """One file of a version to the local disk; never more than the `size` bytes that it should have. Raises
        UnknownAdapter, and ArtefactError for another size."""
        with self._reached(str(ref)):
            try:
                with self.fs.open(f"{self._place_of(ref)}/{name}", "rb") as source, open(to, "wb") as target:
                    left = size
                    while left and (block := source.read(min(_BLOCK, left))):
                        target.write(block)
                        left -= len(block)
                    more = bool(source.read(1))
            except FileNotFoundError:
                raise UnknownAdapter(f"{name} is gone from the registry", where=str(ref), hint=_AGAIN) from None
        if left or more:
            raise ArtefactError(
                f"{name} has {'more' if more else 'less'} than the {size:,} bytes that {FACTS} says, in the registry",
                where=str(ref),
                hint=_AGAIN,
            )

    def pointer(self, tenant: str, name: str) -> Pointer | None:
        """`current.json`, None where there is none. Raises ArtefactError for a damaged one."""
        return self._read_as(Pointer, f"{self._place(tenant, name)}/{POINTER}")

    def held(self, tenant: str, name: str) -> str | None:
        """The digest that the name is held on, if it is."""
        hold = self._read_as(Hold, f"{self._place(tenant, name)}/{HOLD}")
        return hold.digest if hold else None

    # ------------------------------------------------------------------------------------------------------- changing

    def point(self, ref: Ref, before: list[str] | None = None) -> bool:
        """Let the name mean this version; False if it does already. `before` is what it meant earlier, if that is not
        simply what the pointer says. Raises nothing for a version that is not there: see `confirm`."""
        at = f"{self._place(ref.tenant, ref.name)}/{POINTER}"
        try:
            old = self.pointer(ref.tenant, ref.name)
        except ArtefactError:
            old = None  # damaged: what follows mends it
        if old and old.digest == ref.digest and before is None:
            return False
        if before is None:
            before = [old.digest, *(d for d in old.before if d != old.digest)] if old else []
        before = [digest for digest in before if digest != ref.digest][:_REMEMBERED]
        self._write(at, _text(Pointer(digest=ref.digest, before=before, moved=now())))
        return True

    def rollback(self, tenant: str, name: str, digest: str | None = None) -> Ref:
        """Let the name mean an older version again: the one whose digest begins with `digest`, or the one before.
        Raises UnknownAdapter, ArtefactError."""
        if digest is None:
            old = self.pointer(tenant, name)
            if old is None:
                raise UnknownAdapter("no such adapter", where=f"{tenant}/{name}")
            there = [d for d in old.before if self.is_complete(Ref(tenant, name, d))]
            if not there:
                raise ArtefactError("there is no version before this one", where=f"{tenant}/{name}")
            ref = Ref(tenant, name, there[0])
        else:
            ref = self.resolve(tenant, name, digest)
            try:
                old = self.pointer(tenant, name)
            except ArtefactError:
                old = None  # damaged: a rollback with a digest mends it
        earlier = old.before if old else []
        if ref.digest in earlier:
            earlier = earlier[earlier.index(ref.digest) + 1 :]
        elif old:
            earlier = [old.digest, *earlier]
        self.point(ref, earlier)
        if not self.confirm(ref):
            if old:
                self.point(Ref(tenant, name, old.digest), list(old.before))
            raise UnknownAdapter("this version was removed at the same time", where=str(ref))
        return ref

    def pin(self, ref: Ref, *, hold: bool = False) -> None:
        """Protect a version from removal; with `hold` the name means it from now on, whatever is published. Raises
        UnknownAdapter."""
        at = self._place(ref.tenant, ref.name)
        self._write(f"{at}/{PINS}/{ref.digest}", f"{now()}\n".encode())
        if not self.confirm(ref):
            self._delete(f"{at}/{PINS}/{ref.digest}")
            raise UnknownAdapter("no such version", where=str(ref))
        if hold:
            self._write(f"{at}/{HOLD}", _text(Hold(digest=ref.digest, since=now())))

    def unpin(self, ref: Ref) -> bool:
        """Take a version's pin away, and the name's hold on it; False if there was neither."""
        at = self._place(ref.tenant, ref.name)
        was_held = self.held(ref.tenant, ref.name) == ref.digest
        if was_held:
            self._delete(f"{at}/{HOLD}")
        return self._delete(f"{at}/{PINS}/{ref.digest}") or was_held

    def remove(self, ref: Ref) -> None:
        """Remove a version, complete or litter. Raises ArtefactError if it is pinned or what its name means,
        UnknownAdapter if there is none."""
        at = self._place(ref.tenant, ref.name)
        if not self._find(f"{ref.tenant}/{ref.name}/{ref.digest}"):
            self._delete(f"{at}/{REMOVING}/{ref.digest}")  # a removal broke off just before its end
            raise UnknownAdapter("no such version", where=str(ref))
        self._write(f"{at}/{REMOVING}/{ref.digest}", f"{now()}\n".encode())
        try:
            if needed := self._needed(ref):
                raise needed
        except BaseException:  # needed or not, it stays: who publishes it must not wait for its removal
            with suppress(RunError):
                self._delete(f"{at}/{REMOVING}/{ref.digest}")
            raise
        self._delete(f"{at}/{ref.digest}/{FACTS}")  # first, so that half a version never counts
        self._delete_folder(f"{at}/{ref.digest}")
        self._delete(f"{at}/{REMOVING}/{ref.digest}")

    def _needed(self, ref: Ref) -> ArtefactError | None:
        """Why a version must stay, if it must."""
        name, where = f"{ref.tenant}/{ref.name}", str(ref)
        if self.held(ref.tenant, ref.name) == ref.digest:
            hint = f"ftray adapters unpin {where}"
            return ArtefactError("the name is held on this version", where=where, hint=hint)
        if self._read(f"{self._place(ref.tenant, ref.name)}/{PINS}/{ref.digest}", _POINTER_BYTES) is not None:
            return ArtefactError("this version is pinned", where=where, hint=f"ftray adapters unpin {where}")
        pointer = self.pointer(ref.tenant, ref.name)
        if pointer and pointer.digest == ref.digest:
            hint = f"publish another or roll back first, or remove the whole name: ftray adapters remove {name} --all"
            return ArtefactError("this is what the name means", where=where, hint=hint)
        return None

    def remove_name(self, tenant: str, name: str) -> list[str]:
        """Remove a name with all its versions; returns their digests. Raises ArtefactError if one is pinned, or was
        published meanwhile; UnknownAdapter."""
        entry, at = self.show(tenant, name), self._place(tenant, name)
        self.held(tenant, name)  # a damaged hold stops it here, before the pointer is gone
        kept = [version.digest for version in entry.versions if version.pinned]
        if entry.held or kept:
            ref = Ref(tenant, name, entry.digest if entry.held and entry.digest else kept[0])
            raise ArtefactError("a version is pinned", where=str(ref), hint=f"ftray adapters unpin {ref}")
        self._delete(f"{at}/{POINTER}")  # first: from now on the name means nothing
        for version in entry.versions:
            self.remove(Ref(tenant, name, version.digest))
        if self.local:
            _remove_empty(at)
        return [version.digest for version in entry.versions]

    def confirm(self, ref: Ref, facts: Facts | None = None) -> bool:
        """After a pointer or pin was set: whether the version is there to stay. Who removes it sees the pointer or pin,
        or else has left its mark. With `facts` each of its files is looked for: what was uploaded while somebody
        removed may be gone but for its last file."""
        if self.is_being_removed(ref):
            return False
        if facts is None:
            return self.is_complete(ref)
        there = self._find(f"{ref.tenant}/{ref.name}/{ref.digest}")
        sizes = {name: info.get("size") for name, info in there.items()}
        return FACTS in sizes and all(sizes.get(name) == file.size for name, file in facts.files.items())

    def is_being_removed(self, ref: Ref) -> bool:
        at = self._place(ref.tenant, ref.name)
        return self._read(f"{at}/{REMOVING}/{ref.digest}", _POINTER_BYTES) is not None

    def upload(self, ref: Ref, folder: Path, facts: Facts) -> bool:
        """Put a checked adapter there, `ftray.json` last; False if it was there whole. What a broken upload left is
        completed, and what was damaged since is replaced."""
        at, there = self._place_of(ref), self._find(f"{ref.tenant}/{ref.name}/{ref.digest}")
        wanted = {name: (file.size, file.sha256) for name, file in sorted(facts.files.items())}
        wanted[FACTS] = ((folder / FACTS).stat().st_size, ref.digest)
        missing = [
            name
            for name, (size, digest) in wanted.items()
            if name not in there or there[name].get("size") != size or self._sha256(f"{at}/{name}") != digest
        ]
        for name in missing:
            self._put(folder / name, f"{at}/{name}")
        return bool(missing)

    # -------------------------------------------------------------------------------------------------------- the store

    def _place(self, tenant: str, name: str) -> str:
        return f"{self.root}/{check_name(tenant, 'tenant')}/{check_name(name)}"

    def _place_of(self, ref: Ref) -> str:
        assert is_digest(ref.digest), ref.digest
        return f"{self._place(ref.tenant, ref.name)}/{ref.digest}"

    @contextmanager
    def _reached(self, what: str = "") -> Iterator[None]:
        """What a store's driver may raise, in our words; FileNotFoundError goes through."""
        try:
            yield
        except (FtrayError, FileNotFoundError):
            raise
        except Exception as error:  # drivers raise errors of their own libraries
            if told := explained(error, what or self.uri):
                raise type(told)(f"the registry cannot be reached: {told.what}", where=told.where) from error
            raise RunError(
                f"the registry cannot be reached: {redact(str(error)[:300]) or type(error).__name__}",
                where=what or redact(self.uri),
            ) from error

    def _find(self, prefix: str) -> _Files:
        """{path below `prefix`: the store's information} of every file there."""
        at = f"{self.root}/{prefix}".rstrip("/")
        with self._reached():
            self.fs.invalidate_cache()
            try:
                found = self.fs.find(at, detail=True)
            except FileNotFoundError:
                return {}
        return {path[len(at) + 1 :]: info for path, info in found.items() if path.startswith(f"{at}/")}

    def _read(self, path: str, most_bytes: int) -> bytes | None:
        """A small file, None where there is none. Raises ArtefactError for one that is larger than `most_bytes`."""
        with self._reached():
            try:
                content = self.fs.cat_file(path, start=0, end=most_bytes + 1)
            except (FileNotFoundError, NotADirectoryError):
                return None
        if len(content) > most_bytes:
            raise ArtefactError(f"more than {most_bytes:,} bytes", where=redact(path))
        return bytes(content)

    def _read_many(self, paths: list[str]) -> dict[str, bytes]:
        """The small files among `paths` that there are, at once where the store can."""
        with self._reached():
            found = self.fs.cat(paths, on_error="return") if paths else {}
            for content in found.values():
                if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
                    raise content
        return {path: content for path, content in found.items() if isinstance(content, bytes)}

    def _read_as(self, kind: type[_Kind], path: str) -> _Kind | None:
        return _parse(kind, self._read(path, _POINTER_BYTES), path)

    def _write(self, path: str, content: bytes) -> None:
        """A small file, whole or not at all: an object store's put is atomic by itself."""
        with self._reached():
            if not self.local:
                make_folder(self.fs, path.rsplit("/", 1)[0])
                self.fs.pipe_file(path, content)
                return
            for left in range(_REMOVALS, -1, -1):
                try:
                    with atomic_write(path) as file:
                        file.write(content)
                    return
                except FileNotFoundError:  # who removes the name took the empty folder away meanwhile
                    if not left:
                        raise

    def _put(self, source: Path, path: str) -> None:
        with self._reached():
            if self.local:
                with open(source, "rb") as content, atomic_write(path) as file:
                    shutil.copyfileobj(content, file, _BLOCK)
            else:
                make_folder(self.fs, path.rsplit("/", 1)[0])
                self.fs.put_file(os.fspath(source), path)

    def _sha256(self, path: str) -> str:
        digest = hashlib.sha256()
        with self._reached(), self.fs.open(path, "rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        return digest.hexdigest()

    def _delete(self, path: str) -> bool:
        """False if there was nothing."""
        with self._reached():
            try:
                self.fs.rm_file(path)
            except FileNotFoundError:
                return False
            return True

    def _delete_folder(self, path: str) -> None:
        """Also while somebody still writes into it, who was told by then that it is being removed."""
        with self._reached():
            for left in range(_REMOVALS, -1, -1):
                try:
                    self.fs.rm(path, recursive=True)
                    return
                except FileNotFoundError:  # the folder, or a file in it that got its name meanwhile
                    self.fs.invalidate_cache()
                    if not self.fs.exists(path):
                        return
                    if not left:
                        raise
                except OSError as error:
                    if error.errno != errno.ENOTEMPTY or not left:
                        raise
                finally:
                    self.fs.invalidate_cache()


_REMOVALS = 20
"""Times that a folder is removed again into which somebody wrote meanwhile, or made again that somebody removed."""
_ANEW = "`ftray adapters rollback NAME@DIGEST` writes a pointer anew, and `pin NAME@DIGEST --hold` a hold"
_AGAIN = "publish it again: what is missing or damaged is put there anew"


def _parse(kind: type[_Kind], content: bytes | None, path: str) -> _Kind | None:
    if content is None:
        return None
    try:
        return kind.model_validate(strict_json(content, redact(path)))
    except ValidationError as error:
        raise ArtefactError("\n  ".join(explain(error, kind)), where=redact(path), hint=_ANEW) from None
    except ArtefactError as error:
        raise ArtefactError(error.what, where=error.where, hint=_ANEW) from None


def _only_one(matching: list[str], digest: str, where: str) -> str:
    if not matching:
        raise UnknownAdapter(f"no version {digest}", where=where)
    if len(matching) > 1:
        raise ArtefactError(f"{len(matching)} versions begin with {digest}", where=where, hint="write more of it")
    return matching[0]


def _remove_empty(folder: str) -> None:
    """A local folder and those in it, as far as nothing is in them."""
    for path, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):
            os.rmdir(path)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _text(value: Strict) -> bytes:
    return (json.dumps(value.model_dump(mode="json")) + "\n").encode()


def _time_of(info: dict[str, Any]) -> str | None:
    """When a file was written, in ISO 8601, UTC; stores call it by different names."""
    for key in ("mtime", "LastModified", "last_modified", "updated", "modified", "created"):
        value = info.get(key)
        if isinstance(value, int | float):
            value = datetime.fromtimestamp(value, UTC)
        elif isinstance(value, str):
            try:
                value = datetime.fromisoformat(value)
            except ValueError:
                continue
        if isinstance(value, datetime):
            return value.astimezone(UTC).isoformat(timespec="milliseconds")
    return None
