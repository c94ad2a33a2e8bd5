"""`ftray serve`: the endpoint on a Ray of its own, its ingress listening itself, or on a cluster."""

from __future__ import annotations

import logging
import os
import ssl
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.error import HTTPError, URLError

from ftray.errors import RunError
from ftray.session import in_a_job, ray_session

from .config import ServeFile, listening, with_absolute_paths

READY_SECONDS = 600.0
_EVERY_ADDRESS = ("0.0.0.0", "::", "")
_UNVERIFIED = ssl.create_default_context()
_UNVERIFIED.check_hostname, _UNVERIFIED.verify_mode = False, ssl.CERT_NONE
"""We ask our own endpoint by its address, and its certificate is for a name."""
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=_UNVERIFIED))
"""Asks this machine itself: HTTP_PROXY is for others."""


@contextmanager
def session(file: ServeFile, *, verbose: bool = False, cpus: int | None = None) -> Iterator[None]:
    """Be connected to Ray, for `running`. Raises ConfigError when the port is taken, ModelError without a base."""
    if not in_a_job():  # what this machine can tell is told before Ray starts
        from ftray.model.source import find_config

        from .listener import bound

        find_config(file.config.model)
        listen = listening(file).ingress.listen
        assert listen is not None
        bound(listen).close()
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "1" if verbose else "0")
    with ray_session(verbose=verbose, cpus=cpus):
        yield


@contextmanager
def running(file: ServeFile, *, verbose: bool = False, wait: Callable[[], None] = lambda: None) -> Iterator[str]:
    """The endpoint of `file` as long as the block lasts; gives its address, once it answers. Where RAY_ADDRESS names a
    cluster, the application is deployed there, and stays. `wait` is called while it starts; what it raises ends that.
    Raises RunError with what stopped it."""
    from ray import serve

    from .app import application

    if not verbose:  # Ray Serve's own lines of its progress
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
    options, local = file.http_options, not in_a_job()
    logs = file.logging_config or {"enable_access_log": verbose}
    if local:
        serve.start(proxy_location="Disabled", logging_config=logs)
    else:
        http = options.with_absolute_paths().model_dump(exclude_none=True)
        serve.start(http_options=http, proxy_location=file.proxy_location, logging_config=logs)
    config = with_absolute_paths(listening(file) if local else file.config)
    try:
        _deploy(application(config), file.application.name, wait)
        address = f"{'https' if options.ssl_certfile else 'http'}://{_shown(options.host)}:{options.port}"
        if local:
            _await_ready(address, wait)
        yield address + options.root_path
    finally:
        if local:
            serve.shutdown()


def _deploy(application: object, name: str, wait: Callable[[], None]) -> None:
    """Start the application and wait until it runs. Raises RunError with what stopped it."""
    from ray import serve

    serve._run(application, name=name, route_prefix="/", _blocking=False)  # type: ignore[arg-type]
    while True:
        wait()
        status = serve.status().applications[name]
        if status.status == "RUNNING":
            return
        if status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            parts = [part.message for part in status.deployments.values() if part.message]
            raise RunError(_cause(" ".join([status.message, *parts])), hint="the whole of it: the same with --verbose")
        time.sleep(0.2)


def _cause(message: str) -> str:
    """The last line of the deepest traceback in what Ray tells of a deployment."""
    lines = [line.strip() for line in message.replace("\\n", "\n").splitlines() if line.strip()]
    errors = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception"))]
    return (errors or lines or ["the endpoint did not start"])[-1][:500]


def _await_ready(address: str, wait: Callable[[], None]) -> None:
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end:
        wait()
        try:
            with direct.open(f"{address}/readyz", timeout=5):
                return
        except (HTTPError, URLError, OSError):
            time.sleep(0.2)
    raise RunError(f"the endpoint was not ready within {READY_SECONDS:g} s")


def _shown(host: str) -> str:
    return "127.0.0.1" if host in _EVERY_ADDRESS else f"[{host}]" if ":" in host else host
