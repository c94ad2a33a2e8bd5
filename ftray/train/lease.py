"""Who is at work in a run's folder: small files there, each renewed as long as its process lives. No torch, no Ray.

    RUN/driver.json     the process that leads the run, from run.yaml on
    RUN/running.json    the worker, or the holder of a base, that writes commits and metrics

A run has one driver at a time. One that was killed leaves its lease and, for some seconds, workers behind: whoever
comes next sees that it is gone, waits until they have ended, and goes on. `ftray doctor` touches nothing that is being
written.

Of a process of this machine it is known whether it lives. Another machine's is taken to live as long as its lease is
renewed. Two drivers that begin within the same moment are not told apart.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from ftray.errors import FtrayError, RunError, RunStopped
from ftray.manifest import filesystem, is_local, join, read_text, write_text
from ftray.train.pulse import SILENT_SECONDS, birth, lives

DRIVER = "driver.json"
LEASE = "running.json"
BEAT_SECONDS = 20.0
_FRESH_SECONDS = 90.0
"""Of another machine's lease: not renewed for so long, its process is taken for dead."""
_CLOCKS_DIFFER_SECONDS = 3600.0
"""A lease from the future by less than this is that of a clock that goes ahead."""
_ORPHAN_SECONDS = SILENT_SECONDS + _FRESH_SECONDS
"""How long workers may seem to write whose driver is gone: they end once they miss it, and their lease grows old."""
_LOOK_SECONDS = 0.5
_QUIET_SECONDS = 2.0
"""What those who are just ending may take before a word is said about it."""


@dataclass(frozen=True)
class Holder:
    """A process, as its lease names it."""

    name: str
    """DRIVER or LEASE."""
    who: str
    alive: bool
    """Of another machine: whether its lease is fresh by this machine's clock."""
    here: bool = False
    """It is one of this machine's processes."""
    commanded: bool = False
    """It leads the run because somebody gave a command, and does not end by itself before that is done."""
    beat: float = 0.0
    """When the lease was renewed, by the clock of its machine."""


_held: set[str] = set()
"""Leases that this process keeps."""


@contextmanager
def lease(folder: str, name: str = LEASE, *, commanded: bool = False) -> Iterator[None]:
    """Say in the run's folder that this process is at work there, until the block ends."""
    where, ended, pid = join(folder, name), threading.Event(), os.getpid()
    who = {"host": socket.gethostname(), "pid": pid, "born": birth(pid), "commanded": commanded}
    fs, path = filesystem(where)
    where = path if is_local(where) else where  # the process may change its working directory

    def renew() -> None:
        write_text(where, json.dumps(who | {"beat": time.time()}) + "\n")

    def beat() -> None:
        while not ended.wait(BEAT_SECONDS):
            with suppress(OSError, FtrayError):  # the run's own writes say what is wrong with the store
                renew()

    renew()
    _held.add(path)
    thread = threading.Thread(target=beat, name="ftray-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        _held.discard(path)
        with suppress(OSError, FtrayError):  # a lease that stays grows old
            fs.rm_file(path)


@contextmanager
def driving(folder: str, tell: Callable[[str], None], stop: threading.Event, *, commanded: bool) -> Iterator[None]:
    """Lead the run of this folder, alone, until the block ends; what another driver left is waited for. `commanded`:
    for a user's command, not in an actor of Ray's, which ends with its job. Raises RunError where another leads it,
    RunStopped when `stop` is set."""
    wait_for_others(folder, tell, stop)
    with lease(folder, DRIVER, commanded=commanded):
        yield


def refuse_driver(folder: str) -> None:
    """Raises RunError where a command on this machine leads a run in this folder."""
    for holder in holders(folder):
        if holder.commanded and holder.here and holder.alive:
            raise _taken(folder, holder)


def wait_for_others(folder: str, tell: Callable[[str], None], stop: threading.Event) -> None:
    """Wait until nobody is at work in the folder. Raises RunError where somebody leads a run there, or does not end;
    RunStopped when `stop` is set."""
    began, told, first = time.monotonic(), False, dict[str, float]()
    while True:
        waited = time.monotonic() - began
        others = [holder for holder in holders(folder) if holder.alive]
        for holder in others:
            renewed = first.setdefault(holder.name, holder.beat) != holder.beat
            if holder.commanded and (holder.here or renewed):
                raise _taken(folder, holder)
        if waited >= _FRESH_SECONDS:  # whatever the clocks say
            others = [holder for holder in others if holder.here or first[holder.name] != holder.beat]
        if not others:
            return
        if waited >= _ORPHAN_SECONDS:
            raise RunError(
                f"{others[0].who}, left of a run whose driver is gone, still writes here after {waited:.0f} s",
                where=folder,
                hint="end it there; then the same command goes on",
            )
        if not told and waited >= _QUIET_SECONDS:
            told = True
            tell(
                f"{others[0].who} was at work in {folder} a moment ago: waiting until it has ended, for"
                f" {_ORPHAN_SECONDS:.0f} s at most"
            )
        if stop.wait(_LOOK_SECONDS):
            raise RunStopped("stopped before it began", where=folder, hint="the same command goes on")


def _taken(folder: str, holder: Holder) -> RunError:
    return RunError(
        f"{holder.who} is at work in this folder now",
        where=folder,
        hint="wait for its end, or stop it (Ctrl-C, `kill PID`, `ftray runs stop`): then the same command goes on;"
        "\n    a run beside it needs another `name` or `output`",
    )


def holders(folder: str) -> list[Holder]:
    """Who has a lease in the folder: the driver first. Of this machine's processes it is known whether they live;
    another machine's are judged by the lease's age."""
    found = [_holder(folder, name) for name in (DRIVER, LEASE)]
    return [holder for holder in found if holder]


def _holder(folder: str, name: str) -> Holder | None:
    where = join(folder, name)
    try:
        found = json.loads(read_text(where))
        host, pid, born, beat, commanded = (found[key] for key in ("host", "pid", "born", "beat", "commanded"))
        age = time.time() - beat
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return Holder(name, "somebody whose lease is damaged", alive=False)
    if host == socket.gethostname():
        mine = pid == os.getpid()
        alive = lives(pid, born) and (not mine or filesystem(where)[1] in _held)
        return Holder(name, f"process {pid} of this machine ({host})", alive, True, commanded, beat)
    alive = -_CLOCKS_DIFFER_SECONDS < age < _FRESH_SECONDS
    return Holder(name, f"process {pid} on {host}, last heard {max(age, 0):.0f} s ago", alive, False, commanded, beat)
