"""An ingress's own front door: clients talk to the process that answers them.

Ray's proxy costs half a millisecond of CPU a message, twice as much as the rest of HTTP, and it reads for clients who
do not: what they leave unread piles up in the proxy, and nobody knows. Here the socket itself says when a client has
stopped reading, and holds no more than SEND_BYTES until then.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import uvicorn

from ftray.errors import ConfigError

from .config import Listen

SEND_BYTES = 128 << 10
"""What the system keeps of an answer that is not read; without a bound it may be megabytes a connection."""
KEEP_ALIVE_SECONDS = 75


class Listener:
    """Serves an ASGI application at `listen`, in the running event loop. Raises ConfigError when it is taken."""

    def __init__(self, app: Any, listen: Listen, *, drain_seconds: float) -> None:
        self._socket = bound(listen)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # who asks is who is connected
            lifespan="off",
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=max(1, round(drain_seconds)),
            ssl_keyfile=listen.ssl_keyfile,
            ssl_certfile=listen.ssl_certfile,
            root_path=listen.root_path,
        )
        self._server = _Server(config)
        self._task = asyncio.get_running_loop().create_task(self._server.serve([self._socket]))

    async def close(self) -> None:
        """Take no more connections, and wait for the answers in the making."""
        self._server.should_exit = True
        await self._task


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield  # they are Ray's


def bound(listen: Listen) -> socket.socket:
    """A socket that listens. Several ingresses of one machine share the address."""
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a predecessor's connections may linger
        if listen.shared:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)  # connections inherit both
        # asyncio sets this only where a socket was made with its proto: a body would wait 40 ms for its head's ACK
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        found.bind((listen.host, listen.port))
        found.listen(2048)
        found.setblocking(False)
    except OSError as error:
        found.close()
        raise ConfigError(
            f"{listen.host}:{listen.port} cannot be listened on: {error.strerror or error}",
            hint="another endpoint may be running; choose a port with http_options.port=…",
        ) from None
    return found
