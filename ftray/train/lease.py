"""Who writes a run's folder now: a small file there, renewed as long as its process lives. No torch, no Ray.

It keeps nobody from starting: a run that was killed a moment ago starts again at once. It is for those who look at the
folder, and for `ftray doctor`, which touches nothing that is being written.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from ftray.errors import FtrayError
from ftray.manifest import filesystem, join, read_text, write_text

LEASE = "running.json"
BEAT_SECONDS = 20.0
_FRESH_SECONDS = 90.0
"""Of another machine's lease: older, its process is taken for dead."""
_CLOCKS_DIFFER_SECONDS = 3600.0
"""A lease from the future by less than this is that of a clock that goes ahead."""


@contextmanager
def lease(folder: str) -> Iterator[None]:
    """Say in the run's folder that this process writes it, until the block ends."""
    where, ended = join(folder, LEASE), threading.Event()
    who = {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}

    def beat() -> None:
        while not ended.wait(BEAT_SECONDS):
            with suppress(OSError, FtrayError):  # the run's own writes say what is wrong with the store
                write_text(where, json.dumps(who | {"beat": time.time()}) + "\n")

    write_text(where, json.dumps(who | {"beat": time.time()}) + "\n")
    thread = threading.Thread(target=beat, name="ftray-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(OSError, FtrayError):  # a lease that stays grows old
            fs, path = filesystem(where)
            fs.rm_file(path)


def holder(folder: str) -> tuple[str, bool] | None:
    """(who wrote the lease, whether it writes still), or None where there is none. Of this machine's processes it is
    known; of another machine's it is judged by the lease's age."""
    try:
        found = json.loads(read_text(join(folder, LEASE)))
        host, pid, started, beat = (found[key] for key in ("host", "pid", "started", "beat"))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return "somebody whose lease is damaged", False
    if host == socket.gethostname():
        try:
            alive = abs(psutil.Process(pid).create_time() - started) < 1.0
        except psutil.NoSuchProcess:
            alive = False
        return f"process {pid} of this machine", alive
    age = time.time() - beat
    return f"process {pid} on {host}, last heard {age:.0f} s ago", -_CLOCKS_DIFFER_SECONDS < age < _FRESH_SECONDS
