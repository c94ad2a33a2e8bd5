"""Small parts of the endpoint: batches of events, the choice of a replica, answers that hold for a while, options."""

from __future__ import annotations

import asyncio
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID

from ftray.cli import quickstart
from ftray.engine.request import Chunk, Event, Finished, Logprob, Usage
from serve import local
from serve.app import application, engine_options
from serve.catalog import Recent
from serve.config import ServeConfig
from serve.router import AdapterRouter, rank
from serve.wire import merge
from tests.clocks import Hurried

IDS = st.sampled_from(["a", "b", "c"])
CHUNKS = st.builds(
    lambda id, text, tokens: Chunk(id, text, tuple(tokens), tuple(Logprob(t, -1.0) for t in tokens)),
    IDS,
    st.text(max_size=4),
    st.lists(st.integers(0, 9), max_size=3),
)


def whole(events: list[Event], id: str) -> tuple[str, tuple[int, ...], tuple[Logprob, ...], bool]:
    chunks = [e for e in events if isinstance(e, Chunk) and e.id == id]
    return (
        "".join(c.text for c in chunks),
        tuple(t for c in chunks for t in c.tokens),
        tuple(p for c in chunks for p in c.logprobs),
        any(isinstance(e, Finished) and e.id == id for e in events),
    )


@given(st.lists(CHUNKS, max_size=20), st.sets(IDS))
def test_merged_events_say_the_same_with_one_chunk_each(chunks: list[Chunk], ended: set[str]) -> None:
    events: list[Event] = [*chunks, *(Finished(id, "stop", Usage(1, 0, 1)) for id in sorted(ended))]
    merged = merge(events)
    for id in "abc":
        assert whole(merged, id) == whole(events, id)
        own = [event for event in merged if event.id == id]
        assert len([e for e in own if isinstance(e, Chunk)]) <= 1
        assert not own or id not in ended or isinstance(own[-1], Finished), "the end comes last"


def test_a_request_goes_where_its_adapter_lies_while_that_is_not_busy() -> None:
    load, here = {"r1": 3, "r2": 0}, {"r1": {"d"}, "r2": set[str]()}
    assert rank("d", load, here, slots=4) == ["r1", "r2"]
    assert rank("d", {"r1": 4, "r2": 0}, here, slots=4) == ["r2", "r1"], "busy: the other reads it too"
    assert rank("d", {"r1": 9, "r2": 6}, here, slots=4) == ["r2", "r1"], "both busy: the less loaded"
    assert rank(None, load, here, slots=4) == ["r2", "r1"], "the base lies everywhere"


@given(st.sets(st.text("xyz", min_size=1, max_size=3), min_size=2, max_size=8), st.integers(0, 10**6))
def test_who_asks_for_an_adapter_first_does_not_matter(replicas: set[str], seed: int) -> None:
    """Every ingress finds the same order, and a replica that goes moves only its own adapters."""
    load, none = dict.fromkeys(replicas, 0), {name: set[str]() for name in replicas}
    order = rank(f"{seed:x}", load, none, slots=4)
    gone = order[-1]
    rest = {name: 0 for name in replicas if name != gone}
    assert rank(f"{seed:x}", rest, none, slots=4) == order[:-1]


def test_adapters_are_spread_over_replicas() -> None:
    load, none = dict.fromkeys(["r1", "r2", "r3", "r4"], 0), {f"r{i}": set[str]() for i in range(1, 5)}
    first = [rank(f"digest {i}", load, none, slots=4)[0] for i in range(1000)]
    assert all(200 < first.count(name) < 300 for name in load)


def test_a_replica_that_is_slow_to_tell_its_load_is_not_passed_over() -> None:
    """Its adapters lie there."""
    deployment = DeploymentID("Engine")

    class Slow:
        replica_id, max_ongoing_requests = ReplicaID("here", deployment), 8

        async def get_queue_len(self, *, deadline_s: float) -> int:
            await asyncio.sleep(1)
            return 0

    async def chosen(replica: Any) -> Any:
        router = AdapterRouter(deployment, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True)
        router.initialize_state(slots=4)
        router.update_replicas([replica])
        return await router._select_from_candidate_replicas([replica], 0)

    with asyncio.Runner(loop_factory=Hurried) as runner:
        slow = Slow()
        assert runner.run(chosen(slow)) is slow


def test_what_was_asked_lately_is_not_asked_again() -> None:
    async def main() -> None:
        asked = []

        async def fetch(value: str) -> str:
            asked.append(value)
            await asyncio.sleep(0.01)
            if value == "wrong":
                raise ValueError(value)
            return value.upper()

        recent: Recent[str, str] = Recent(seconds=0.2, most=3)
        assert await asyncio.gather(*(recent.get("a", lambda: fetch("a")) for _ in range(5))) == ["A"] * 5
        assert asked == ["a"], "those who wait share one"
        await asyncio.sleep(0.25)
        assert await recent.get("a", lambda: fetch("a")) == "A"
        assert asked == ["a", "a"]
        for _ in range(2):
            with pytest.raises(ValueError, match="wrong"):
                await recent.get("wrong", lambda: fetch("wrong"))
        assert asked.count("wrong") == 2, "errors are not kept"
        for i in range(10):
            await recent.get(f"k{i}", lambda i=i: fetch(f"k{i}"))  # type: ignore[misc]
        assert len(recent._found) == 3

    asyncio.run(main())


def test_one_who_leaves_does_not_take_the_answer_with_him() -> None:
    async def main() -> None:
        async def fetch() -> str:
            await asyncio.sleep(0.05)
            return "A"

        recent: Recent[str, str] = Recent(seconds=1)
        first = asyncio.create_task(recent.get("a", fetch))
        await asyncio.sleep(0.01)
        second = asyncio.create_task(recent.get("a", fetch))
        await asyncio.sleep(0.01)
        first.cancel()
        assert await second == "A"

    asyncio.run(main())


def config(**more: object) -> ServeConfig:
    return ServeConfig.model_validate({"model": {"path": "embedded"}, **more})


def test_ray_takes_the_options_of_fixed_and_of_moving_replicas() -> None:
    fixed = config(replicas={"min": 2, "max": 2})
    assert engine_options(fixed)["num_replicas"] == 2
    moving = config(replicas={"min": 1, "max": 4}, engine={"slots": 16})
    scaling = engine_options(moving)["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"], scaling["target_ongoing_requests"]) == (1, 4, 16)
    for each in (fixed, moving):
        assert application(each)._bound_deployment.name == "Ingress"


def test_this_machine_is_asked_without_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endpoint(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._say(b"ready")

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._say(b'{"choices": [{"message": {"content": " brie "}}]}')

        def _say(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(local, "READY_SECONDS", 3.0)
    with HTTPServer(("127.0.0.1", 0), Endpoint) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        local._await_ready(address, lambda: None)
        assert quickstart._answer(address, "cheese", "Which?") == "brie"
        server.shutdown()
