"""Which files travel with a command, and what becomes of those that do not.

A name or a URI means the same everywhere. A path of this machine does not: what is there travels along, or is refused,
or lies under a folder that the cluster's hosts are said to share. An absolute path that is not here is one of theirs.
"""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ftray.errors import ConfigError, DataError
from ftray.manifest import is_local

UPLOAD_LIMIT = 100 << 20
"""Bytes that travel with a job at most: Ray keeps them in the memory of the head node."""


@dataclass
class Luggage:
    upload: bool = False
    """Data may travel too."""
    shared: Sequence[str] = ()
    """Folders that the cluster's hosts see at the same path as this machine."""
    files: dict[str, Path] = field(default_factory=dict)
    """What travels: place in the job's working directory → file here."""
    theirs: list[str] = field(default_factory=list)
    """Paths that are taken to be the cluster's."""
    _numbered: int = 0

    def add_file(self, path: str) -> str:
        """A small file that belongs to the command itself: a run file, a chat template. Returns its place."""
        local = os.path.expanduser(path.removeprefix("file://"))
        return self._add(local, [local])

    def add_input(self, path: str, key: str) -> str:
        """Data: a file, a glob, a folder. Returns what the command should call it on the cluster, mostly `path` itself.
        Raises ConfigError when it is here and may not travel, DataError when it is nowhere."""
        local = local_path(path)
        if local is None or self._is_shared(local):
            return path
        found = _files(local)
        if not found and os.path.isabs(local):
            self.theirs.append(path)
            return path
        if not found:
            raise DataError(f"{path}: no file is found here, and a relative path is nowhere on a cluster", where=key)
        if not self.upload:
            raise ConfigError(
                f"{path} is on this machine ({_mib(found)}): the cluster would not find it",
                where=key,
                hint="put it where every host finds it (s3://…, gs://…, NFS) and name that; or ship it with"
                " --upload-data;\n    or say --shared FOLDER, if the hosts have that folder at the same path",
            )
        place = self._add(local, found)
        if sum(map(os.path.getsize, self.files.values())) > UPLOAD_LIMIT:
            raise ConfigError(
                f"{_mib(self.files.values())} would travel with the job, and {UPLOAD_LIMIT >> 20} MiB may",
                where=key,
                hint="put large data where every host finds them: s3://…, gs://…, NFS",
            )
        return place

    def add_if_here(self, path: str, key: str) -> str:
        """As `add_input`, for what may be a name instead: of a model's hub, of a registry."""
        local = local_path(path)
        absolute = local is not None and os.path.isabs(local)
        return self.add_input(path, key) if absolute or (local is not None and os.path.exists(local)) else path

    def check_output(self, path: str, key: str, hint: str) -> None:
        """Raises ConfigError for a relative path: it would lie in the job's own folder, and go with the job."""
        local = local_path(path)
        if local is None:
            return
        if not os.path.isabs(local):
            raise ConfigError(
                f"{path} is relative: on the cluster it would lie in the job's own folder, and be lost with it",
                where=key,
                hint=hint,
            )
        if not self._is_shared(local):
            self.theirs.append(path)

    def lay_out(self, folder: Path) -> None:
        """Copy everything to its place under `folder`."""
        for place, path in self.files.items():
            target = folder / place
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)

    def _add(self, local: str, found: Sequence[str]) -> str:
        """Files that `local` stands for. Below the working directory they keep their places, so that a run's data have
        the same digest as here; others go to a numbered folder. Returns the place of `local` itself."""
        base, root = ".", ""
        if os.path.isabs(local) or os.path.normpath(local).split(os.sep)[0] == "..":
            self._numbered += 1
            base, root = _fixed_part(local), f"uploaded/{self._numbered}"

        def place(path: str) -> str:
            return str(PurePosixPath(root, os.path.relpath(path, base)))

        for path in found:
            self.files[place(path)] = Path(path)
        return place(local)

    def _is_shared(self, local: str) -> bool:
        whole = os.path.abspath(local)
        roots = [os.path.abspath(os.path.expanduser(folder)) for folder in self.shared]
        return any(os.path.commonpath([whole, root]) == root for root in roots)


def local_path(path: str) -> str | None:
    """The path on this machine, `~` filled in; None for a URI and for what ships with ftray."""
    if not is_local(path) or path.split(":")[0] == "embedded":
        return None
    return os.path.expanduser(path.removeprefix("file://"))


def _files(local: str) -> list[str]:
    """The files that a path stands for: itself, all below it, or all that match."""
    if os.path.isfile(local):
        return [local]
    if os.path.isdir(local):
        below = (os.path.join(folder, name) for folder, _, names in os.walk(local) for name in names)
        return sorted(below)
    return sorted(found for found in glob.glob(local, recursive=True) if os.path.isfile(found))


def _fixed_part(local: str) -> str:
    """The folder that holds a path; of a glob the deepest folder that has no wildcard in it."""
    folder = os.path.dirname(local)
    while any(c in folder for c in "*?[") and not os.path.exists(local):
        folder = os.path.dirname(folder)
    return folder


def _mib(files: object) -> str:
    return f"{sum(map(os.path.getsize, files)) / (1 << 20):,.1f} MiB"  # type: ignore[call-overload]
