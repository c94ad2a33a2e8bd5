"""A teacher on loopback: a real HTTP server that misbehaves as real ones do, by the number of the call."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

_KINDS = ["brie", "cheddar", "gouda", "feta", "comté", "stilton", "ricotta", "manchego", "roquefort"]
_HOW = ["young", "old", "smoked", "grated", "melted", "salted", "sliced", "frozen", "boiled", "wrapped"]
_WHERE = ["valley", "mountain", "cellar", "kitchen", "market", "shop", "barn", "harbour", "village", "farm"]
_VERBS = ["store", "serve", "cut", "buy", "ripen", "taste", "cook", "send"]


def honest_row(seed: int) -> dict[str, str]:
    """A question in English that shares few pairs of words with those of other seeds."""
    random = np.random.default_rng(seed)
    kind, how, where, verb = (words[random.integers(len(words))] for words in (_KINDS, _HOW, _WHERE, _VERBS))
    other = _KINDS[random.integers(len(_KINDS))]
    ask = f"{verb.title()} {how} {kind} near {where} with {other} number {seed}?"
    return {"instruction": ask, "output": f"Yes, you can {verb} the {how} {kind} there, and it is very good in winter."}


def as_answer(rows: list[dict[str, Any]]) -> str:
    return json.dumps({"rows": rows})


class Teacher:
    """`answer(number, attempt)` gives the text of a call, or an int: a status to refuse it with; a float: seconds of
    silence before the connection breaks, if who asked is still there. `number` is the call's seed, which every call
    sends."""

    def __init__(self, answer: Callable[[int, int], str | int | float], *, finish: str = "stop", delay: float = 0):
        self.answer, self.finish, self.delay = answer, finish, delay
        self.asked: Counter[int] = Counter()
        """Requests by number."""
        self.paid: Counter[int] = Counter()
        """Answers by number."""
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.times: list[float] = []
        self.lock = threading.Lock()
        teacher = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                teacher.serve(self)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self) -> Teacher:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def serve(self, request: BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        number = body["seed"]
        with self.lock:
            self.bodies.append(body)
            self.keys.add(request.headers.get("Authorization"))
            self.times.append(time.monotonic())
            attempt = self.asked[number]
            self.asked[number] += 1
        what = self.answer(number, attempt)
        if isinstance(what, float):
            request.connection.settimeout(what)
            with suppress(OSError):
                request.connection.recv(1)  # nothing comes: it ends when who asked has gone
            request.close_connection = True
            return
        time.sleep(self.delay)
        if isinstance(what, int):
            told = f"refused; key {request.headers.get('Authorization')}"
            self.send(request, what, {"error": {"message": told}})
            return
        usage = {"prompt_tokens": 50, "completion_tokens": 40}
        choice = {"message": {"role": "assistant", "content": what}, "finish_reason": self.finish}
        with self.lock:
            self.paid[number] += 1
        self.send(request, 200, {"model": "teacher-7", "choices": [choice], "usage": usage})

    def send(self, request: BaseHTTPRequestHandler, status: int, value: Any) -> None:
        content = json.dumps(value).encode()
        try:
            request.send_response(status)
            request.send_header("Content-Length", str(len(content)))
            request.send_header("Content-Type", "application/json")
            if status == 429:
                request.send_header("Retry-After", "0.1")
            request.end_headers()
            request.wfile.write(content)
        except OSError:  # who asked has gone
            request.close_connection = True
