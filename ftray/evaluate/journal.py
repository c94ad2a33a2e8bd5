"""The journal of calls to a teacher: what was paid, appended before anybody looks at it.

    {"format": 1, "shape": "…"}                                    what shapes the calls; the first line
    {"call": 7, "answer": "…", "prompt_tokens": 90, …}             answered
    {"call": 8, "lost": "timed out", "tokens": 1590}               a try that may have been paid, and brought nothing
    {"call": 8, "failed": "HTTP 400: …"}                           given up; asked again by the next run

One process at a time holds it. A line that a crash cut off is dropped, and its call asked again.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ftray.errors import ArtefactError, ConfigError

FORMAT = 1


class Journal:
    """`answers` by number of the call, and what all calls so far have cost."""

    def __init__(self, path: Path, file: Any) -> None:
        self.path = path
        self.answers: dict[int, dict[str, Any]] = {}
        self.calls = self.prompt_tokens = self.tokens = self.lost_tokens = 0
        """Requests answered or lost; tokens read and written, those of lost tries at the most they can have cost."""
        self._file = file
        self._lock = threading.Lock()

    @classmethod
    @contextmanager
    def opened(cls, path: Path, shape: str) -> Iterator[Journal]:
        """Raises ConfigError where another process holds it or it is of other calls."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError("another process is making these rows", where=str(path.parent)) from None
            journal = cls(path, file)
            journal._read(shape)
            yield journal

    @property
    def all_tokens(self) -> int:
        return self.prompt_tokens + self.tokens + self.lost_tokens

    def append(self, entry: dict[str, Any]) -> None:
        """On the disk when this returns. Safe for threads."""
        line = json.dumps(entry, ensure_ascii=True).encode() + b"\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._count(entry)

    def _read(self, shape: str) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self._file.truncate(whole)
        lines = content[:whole].splitlines()
        if not lines:
            self.append({"format": FORMAT, "shape": shape})
            return
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise ArtefactError(f"the journal is damaged: {error}", where=f"{self.path}:{number}") from None
            if number == 1 and entry != {"format": FORMAT, "shape": shape}:
                raise ConfigError(
                    "this folder holds answers to other calls: teacher.model, teacher.sampling, teacher.response or"
                    " `ask` have changed",
                    where=str(self.path.parent),
                    hint="set another `output`; filters, rows and budget may be changed here",
                )
            self._count(entry)

    def _count(self, entry: dict[str, Any]) -> None:
        if "answer" in entry:
            self.answers[entry["call"]] = entry
            self.calls += 1
            self.prompt_tokens += entry["prompt_tokens"]
            self.tokens += entry["tokens"]
        elif "lost" in entry:
            self.calls += 1
            self.lost_tokens += entry["tokens"]
