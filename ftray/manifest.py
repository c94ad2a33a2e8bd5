"""What is whole: folders that count only once their manifest is there. No torch, no Ray.

A folder (a commit, an artefact, prepared data) is written file by file; last comes its manifest, in one atomic step,
with size and SHA-256 of every other file. A folder without a manifest is litter from a crash; a folder whose files do
not agree with it is damaged. Paths are any fsspec URI or plain paths.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ftray.errors import ArtefactError
from ftray.storage import make_folder, reached

MANIFEST = "manifest.json"
_BLOCK = 1 << 20


def filesystem(uri: str | Path) -> tuple[Any, str]:
    """(fsspec filesystem, path on it) of a URI or a plain path; local paths become absolute. Raises ConfigError where
    no driver of such a URI is installed."""
    text = os.fspath(uri)
    if is_local(text):
        from fsspec.implementations.local import LocalFileSystem

        return LocalFileSystem(auto_mkdir=False), os.path.abspath(text.removeprefix("file://"))
    import fsspec

    with reached(text):
        return fsspec.core.url_to_fs(text, use_listings_cache=False)  # others write to the store too


def is_local(uri: str | Path) -> bool:
    text = os.fspath(uri)
    return "://" not in text or text.startswith("file://")


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *parts])


def sha256(path: str | Path) -> str:
    """SHA-256 of a local file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Any]:
    """A binary file on the local disk that appears whole, under its name, or not at all. Raises FileNotFoundError where
    somebody removes its folder meanwhile."""
    path = Path(path)
    with suppress(FileExistsError):  # it was there, and somebody removes it at this moment
        path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(uri: str | Path, text: str) -> None:
    """Write a small file whole: atomically on a local disk; an object store's put is atomic by itself."""
    fs, path = filesystem(uri)
    with reached(uri):
        if is_local(uri):
            with atomic_write(path) as file:
                file.write(text.encode("utf-8"))
        else:
            make_folder(fs, path.rsplit("/", 1)[0])
            fs.pipe_file(path, text.encode("utf-8"))


def read_text(uri: str | Path) -> str:
    """Raises FileNotFoundError."""
    fs, path = filesystem(uri)
    with reached(uri):
        return bytes(fs.cat_file(path)).decode("utf-8")


def describe_files(folder: str | Path) -> dict[str, dict[str, Any]]:
    """{relative path: {"size": bytes, "sha256": hex}} of every file in a local folder but manifests and parts."""
    root = Path(folder)
    files = sorted(p for p in root.rglob("*") if p.is_file() and p.name != MANIFEST and not p.name.endswith(".part"))
    return {p.relative_to(root).as_posix(): {"size": p.stat().st_size, "sha256": sha256(p)} for p in files}


def seal(folder: str | Path, facts: dict[str, Any], files: dict[str, dict[str, Any]] | None = None) -> dict[str, Any]:
    """Write the manifest: from now on the folder counts. `facts` is kept under "facts". Returns the manifest.

    `files` (as of `describe_files`) may be given when the folder is remote and its files were hashed before upload.
    """
    manifest = {"format": 1, "files": describe_files(folder) if files is None else files, "facts": facts}
    write_text(join(os.fspath(folder), MANIFEST), json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return manifest


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """The manifest, or None where there is none. Raises ArtefactError for one that cannot be read."""
    where = join(os.fspath(folder), MANIFEST)
    try:
        manifest = json.loads(read_text(where))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtefactError(f"the manifest is damaged: {error}", where=where) from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ArtefactError("the manifest is damaged: it lists no files", where=where)
    return manifest


def verify(folder: str | Path) -> dict[str, Any]:
    """Check every file against the manifest and return it. Raises ArtefactError that names the first wrong file."""
    where = os.fspath(folder)
    manifest = read_manifest(where)
    if manifest is None:
        raise ArtefactError("no manifest: it was never completed", where=where)
    for what in wrong_files(where, manifest["files"]):
        raise ArtefactError(what, where=where)
    return manifest


def wrong_files(where: str, files: dict[str, dict[str, Any]]) -> Iterator[str]:
    """A sentence about each of `files` (as of `describe_files`) that is missing below `where`, or has other content."""
    fs, root = filesystem(where)
    for name, expected in files.items():
        if name.startswith("/") or ".." in name.split("/"):
            yield f"the manifest names a file outside its folder: {name!r}"
            continue
        with reached(where):
            try:
                size = fs.size(f"{root}/{name}")
            except FileNotFoundError:
                yield f"{name} is missing"
                continue
            if size != expected["size"]:
                yield f"{name} has {size:,} bytes, the manifest says {expected['size']:,}"
            elif _sha256_on(fs, f"{root}/{name}") != expected["sha256"]:
                yield f"{name} has other content than the manifest says (SHA-256 differs)"


def _sha256_on(fs: Any, path: str) -> str:
    digest = hashlib.sha256()
    with fs.open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
