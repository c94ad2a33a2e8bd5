"""A local copy of a remote folder, made once and found again. No torch, no Ray."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftray.manifest import digest_of, filesystem, is_local
from ftray.storage import reached


def cache_folder() -> Path:
    """Where local copies are kept: FTRAY_CACHE, or `ftray` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(os.environ.get("FTRAY_CACHE") or os.path.join(home, "ftray"))


def local_copy(uri: str, wanted: Callable[[str], bool] = lambda name: True) -> str:
    """The local folder of a local URI, or a copy of the remote folder's files whose relative names are `wanted`.

    The copy is found again as long as names, sizes, times and etags of the remote files stay the same. It appears
    under its name only when it is complete. Raises FileNotFoundError where there is no such folder.
    """
    fs, root = filesystem(uri)
    if is_local(uri):
        if not os.path.isdir(root):
            raise FileNotFoundError(uri)
        return root
    with reached(uri):
        return _copied(uri, fs, root, wanted)


def _copied(uri: str, fs: Any, root: str, wanted: Callable[[str], bool]) -> str:
    found = fs.find(root, detail=True)
    files = {path[len(root) :].lstrip("/"): info for path, info in found.items()}
    files = {name: info for name, info in files.items() if wanted(name)}
    if not files:
        raise FileNotFoundError(uri)
    key = digest_of([uri, {name: fingerprint(info) for name, info in files.items()}])
    target = cache_folder() / "copies" / key[:24]
    if target.is_dir():
        return str(target)
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        for name in sorted(files):
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(f"{root}/{name}", str(part / name))
        try:
            os.replace(part, target)
        except OSError:  # another process was first; its copy is the same
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return str(target)


def fingerprint(info: dict) -> list[str]:
    """What tells two versions of a remote file apart: size, and whichever of time and checksum the store gives."""
    keys = (
        "ETag",
        "etag",
        "md5",
        "md5Hash",
        "checksum",
        "content_md5",
        "mtime",
        "last_modified",
        "LastModified",
        "updated",
    )
    return [str(info.get("size")), *(f"{key}={info[key]}" for key in keys if info.get(key) is not None)]
