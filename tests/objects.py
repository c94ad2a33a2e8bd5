"""An object store in memory: a file is there whole or not at all, and whoever reads one reads it alone. fsspec's own
`memory` shows a file while it is written, and all readers of a path share one position."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from fsspec.implementations.memory import MemoryFile, MemoryFileSystem


class Objects(MemoryFileSystem):
    """`objects://`, once it is registered. For files that are put, and read, whole."""

    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    protocol = "objects"

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return super()._strip_protocol(path.removeprefix("objects://"))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """There are no folders."""

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        MemoryFile(self, self._strip_protocol(path), value).commit()

    def put_file(self, lpath: str, rpath: str, *_: Any, **__: Any) -> None:
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def _open(self, path: str, mode: str = "rb", *_: Any, **__: Any) -> io.BytesIO:
        assert mode == "rb", mode
        return io.BytesIO(self.cat_file(path))
