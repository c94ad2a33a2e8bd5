"""Ctrl-C and SIGTERM: the first asks the run to commit and stop, the second leaves at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_on_signal(
    say: Callable[[str], None], what: Callable[[], str] = lambda: "stopping after this step, with a commit"
) -> Iterator[threading.Event]:
    """An event that the first signal sets; `what` tells what that comes to by then. Ray sets a SIGTERM handler of its
    own when it is imported, so enter this after the session with Ray was opened; the handlers found are put back at the
    end."""
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            os._exit(128 + number)  # Ray's local processes end with their parent
        stop.set()
        # a signal may come in the middle of a line being written, so the line is written elsewhere
        text = f"{signal.Signals(number).name}: {what()}; once more leaves at once"
        threading.Thread(target=say, args=(text,), daemon=True).start()

    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
