"""metrics.jsonl: a line an event, agreeing with the commits.

A resumed run cuts off what was written after the commit it goes on from, so that each step stands there once.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import orjson

from ftray.manifest import filesystem, is_local, join
from ftray.storage import reached

KEPT = frozenset({"start", "step", "evaluation", "commit", "skip", "warning", "resume", "end"})
"""Kinds of events that are lines of the file; the others are for the console alone."""


class MetricsLog:
    """Appends on a local disk; on an object store it keeps a local copy and uploads it whole at `keep`. `keep` may run
    on another thread than the rest."""

    def __init__(self, folder: str, length: int) -> None:
        """`length`: bytes of the file that count, as the commit says."""
        self.uri = join(folder, "metrics.jsonl")
        fs, path = filesystem(self.uri)
        self._remote = None if is_local(folder) else (fs, path)
        if self._remote:
            self._scratch = tempfile.TemporaryDirectory(prefix="ftray-metrics-")
            local = Path(self._scratch.name) / "metrics.jsonl"
            with reached(self.uri):
                if length and fs.exists(path):
                    fs.get_file(path, str(local))
        else:
            local = Path(path)
            local.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(local, "ab")  # noqa: SIM115 - closed in close()
        self._file.truncate(min(length, os.path.getsize(local)))
        self._file.seek(0, os.SEEK_END)

    def write(self, event: dict[str, Any]) -> None:
        if event["kind"] in KEPT:
            self._file.write(orjson.dumps(event, option=orjson.OPT_APPEND_NEWLINE))
            self._file.flush()  # so that the file can be followed

    def length(self) -> int:
        """Bytes so far."""
        return self._file.tell()

    def keep(self) -> None:
        """Make the lines so far last. Raises RunError."""
        with reached(self.uri):
            if self._remote:
                fs, path = self._remote
                fs.put_file(self._file.name, path)
            else:
                os.fsync(self._file.fileno())

    def close(self) -> None:
        self.keep()
        self._file.close()
        if self._remote:
            self._scratch.cleanup()
