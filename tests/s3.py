"""A real S3 server on the loopback (moto's), in front of which anything may go wrong."""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import boto3
from werkzeug.serving import make_server

BUCKET = "runs"


class Store:
    """The server. `answer` decides what becomes of a request; `fault` sets it for a while."""

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

        self._app = DomainDispatcherApplication(create_backend_app)
        self._answer: Callable[[dict[str, Any]], str | None] = lambda _: None
        self.requests = 0
        self.failed = 0
        self._server = make_server("127.0.0.1", 0, self, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def environment(self) -> dict[str, str]:
        """What a process needs to use it: what botocore reads, and nothing of ours."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": "very-secret-key-of-someone",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self) -> Any:
        return boto3.client("s3", endpoint_url=self.url)

    def names(self, prefix: str = "") -> list[str]:
        found = self.client().list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
        return [item["Key"] for item in found]

    def close(self) -> None:
        self._server.shutdown()

    @contextmanager
    def fault(self, answer: Callable[[dict[str, Any]], str | None]) -> Iterator[Store]:
        """`answer` gets each request (as WSGI has it) and says what becomes of it: None, all is well; "503 SlowDown"
        and the like, a status and an error code; "drop", the connection ends without a word; "cut", in mid-answer."""
        self._answer, self.requests, self.failed = answer, 0, 0
        try:
            yield self
        finally:
            self._answer = lambda _: None

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        self.requests += 1
        what = self._answer(environ)
        if what is None:
            return self._app(environ, start_response)
        self.failed += 1
        connection: socket.socket = environ["werkzeug.socket"]
        if what == "drop":
            connection.shutdown(socket.SHUT_RDWR)
            start_response("500 Dropped", [])
            return []
        if what == "cut":
            return self._cut(connection, self._app(environ, start_response))
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        status, code = what.split(" ", 1)
        text = f"<Error><Code>{code}</Code><Message>{code} as asked</Message></Error>".encode()
        start_response(f"{status} {code}", [("Content-Type", "application/xml"), ("Content-Length", str(len(text)))])
        return [text if environ["REQUEST_METHOD"] != "HEAD" else b""]

    @staticmethod
    def _cut(connection: socket.socket, body: Iterable[bytes]) -> Iterator[bytes]:
        whole = b"".join(body)
        yield whole[: len(whole) // 2]
        connection.shutdown(socket.SHUT_RDWR)


def every_third(*kinds: str) -> Callable[[dict[str, Any]], str | None]:
    """Every third request fails, by these kinds in turn."""
    calls, turns, lock = itertools.count(1), itertools.cycle(kinds), threading.Lock()

    def answer(_: dict[str, Any]) -> str | None:
        with lock:
            return next(turns) if next(calls) % 3 == 0 else None

    return answer


def waiting(until: threading.Event, below: str) -> Callable[[dict[str, Any]], str | None]:
    """What is written to a path that contains `below` takes until then, or half a minute: drivers ask again after a
    whole one."""

    def answer(environ: dict[str, Any]) -> str | None:
        if environ["REQUEST_METHOD"] == "PUT" and below in environ["PATH_INFO"]:
            until.wait(30)
        return None

    return answer


def refusing(
    what: str, below: str, methods: tuple[str, ...] = ("PUT", "POST")
) -> Callable[[dict[str, Any]], str | None]:
    """`what` for these requests on a path that contains `below`."""

    def answer(environ: dict[str, Any]) -> str | None:
        return what if environ["REQUEST_METHOD"] in methods and below in environ["PATH_INFO"] else None

    return answer
