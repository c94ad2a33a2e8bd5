"""Time that passes at once: what a test waits for must not depend on how busy the machine is."""

from __future__ import annotations

import asyncio


def skip(loop: asyncio.AbstractEventLoop, seconds: float) -> None:
    """Let this loop's clock jump ahead: what it was to do by then is due. To be called in the loop."""
    time = loop.time
    loop.time = lambda: time() + seconds  # type: ignore[method-assign]


class Hurried(asyncio.SelectorEventLoop):
    """Its clock stands still while there is something to do, and then jumps to what is due next. For what waits for
    nothing but this loop: no threads, no sockets."""

    _now = 0.0

    def time(self) -> float:
        return self._now

    def _run_once(self) -> None:
        if not self._ready:  # type: ignore[attr-defined]
            due = (handle.when() for handle in self._scheduled if not handle.cancelled())  # type: ignore[attr-defined]
            self._now = max(self._now, min(due, default=self._now))
        super()._run_once()  # type: ignore[misc]
