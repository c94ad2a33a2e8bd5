"""What goes wrong in mid-stream: clients that leave or do not read, adapters that change, a replica that dies."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from ftray.errors import RunError
from ftray.registry.publish import publish
from serve.endpoint import pause_seconds
from tests.serve.conftest import HTTP, Running, config_of, eventually, idle, make_engine, serving

LONG: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True, "stream": True}
HELLO: list[Any] = [{"role": "user", "content": "What cheese do you have?"}]


def events_of(lines: Any) -> Any:
    for line in lines:
        if line.startswith("data: "):
            yield line[6:]


def test_300_streams_cancelled_at_random_give_everything_back(open_endpoint: Running) -> None:
    models = ["base", "acme/cheese", "acme/brie", "other/cheese"]
    url = f"{open_endpoint.url}/v1/completions"

    def leave_early(i: int) -> int:
        chances = random.Random(i)
        body = LONG | {"model": chances.choice(models), "prompt": f"Story {i}", "n": chances.choice([1, 1, 2])}
        while True:
            early = chances.random() < 0.3  # before the first byte, often while it waits
            patience = chances.uniform(0.001, 0.2) if early else 60
            try:
                with HTTP.stream("POST", url, json=body, timeout=patience) as answer:
                    if early:  # it began in time: to read on would be to stay, as long as each part of it is in time
                        return 1
                    if answer.status_code == 429:
                        answer.read()
                        time.sleep(0.1)
                        continue
                    assert answer.status_code == 200
                    for count, _ in enumerate(answer.iter_bytes()):
                        if count >= chances.randrange(6):
                            break
            except httpx.TimeoutException:
                pass
            return 1

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(leave_early, range(300))) == 300
    assert eventually(lambda: idle(open_endpoint.engine))
    bridge, link = open_endpoint.replicas.bridge, open_endpoint.endpoint.link
    assert eventually(lambda: not bridge._running and not link._streaming and not bridge._outboxes)
    assert open_endpoint.endpoint.streams == 0
    assert open_endpoint.endpoint.metrics.in_flight._value.get() == 0
    answer = open_endpoint.client().completions.create(model="acme/cheese", prompt="And", max_tokens=3)
    assert answer.choices[0].finish_reason in ("length", "stop")


def test_an_answer_that_does_not_stream_is_cancelled_too(open_endpoint: Running) -> None:
    open_endpoint.slow_down()
    body = LONG | {"model": "base", "stream": False}
    with pytest.raises(httpx.ReadTimeout):
        HTTP.post(f"{open_endpoint.url}/v1/completions", json=body, timeout=httpx.Timeout(60, read=0.5))
    assert eventually(lambda: idle(open_endpoint.engine))
    assert open_endpoint.engine.stats().written_tokens < 800


def slow_client(running: Running, body: dict[str, Any]) -> socket.socket:
    """Asks, and reads nothing."""
    where = urlsplit(running.url)
    assert where.port is not None
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.connect((where.hostname, where.port))
    content = json.dumps(body).encode()
    head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    client.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n\r\n".encode() + content)
    return client


@pytest.mark.parametrize("write_seconds", [300, 1])
def test_a_client_that_does_not_read_is_stopped_at_a_bound(registry, base, tmp_path, write_seconds: int) -> None:
    """An answer that tells 20 alternatives of every token: more than the sockets' own buffers hold."""
    bounds = {"unread_bytes": 1024, "write_seconds": write_seconds}
    config = config_of(registry, bounds=bounds, cache={"folder": str(tmp_path / "cache")})
    with serving(config, make_engine(config, base)) as running:
        client = slow_client(running, LONG | {"model": "base", "logprobs": 20})
        assert eventually(lambda: running.engine.stats().written_tokens > 0)
        assert eventually(lambda: idle(running.engine))
        assert running.engine.stats().written_tokens < 0.8 * 900, "it was stopped before its end"
        other = running.client().completions.create(model="base", prompt="And", max_tokens=5)
        assert other.choices[0].text
        assert write_seconds == 300 or eventually(lambda: running.endpoint.streams == 0)
        client.settimeout(60)
        received = b""
        while b"client_too_slow" not in received and (more := client.recv(65536)):
            received += more
        assert (b"client_too_slow" in received) == (write_seconds == 300), "told, or the connection is closed"
        assert b"[DONE]" not in received
        client.close()
        assert eventually(lambda: running.endpoint.streams == 0)


def test_a_killed_replica_ends_its_streams_with_an_error_and_no_done(open_endpoint: Running) -> None:
    open_endpoint.slow_down()
    lines: list[str] = []
    started = threading.Event()

    def read() -> None:
        with HTTP.stream("POST", f"{open_endpoint.url}/v1/completions", json=LONG | {"model": "acme/cheese"}) as answer:
            for line in answer.iter_lines():
                lines.append(line)
                if len(lines) > 8:
                    started.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert started.wait(60)
    open_endpoint.call(open_endpoint.replicas.killed.set)
    reader.join(60)
    events = list(events_of(lines))
    assert "[DONE]" not in events
    last = json.loads(events[-1])
    assert last["error"]["code"] == "replica_lost"
    assert all("error" not in json.loads(event) for event in events[:-1])
    with pytest.raises(openai.InternalServerError) as error:
        open_endpoint.client().completions.create(model="base", prompt="And", max_tokens=5)
    assert error.value.status_code == 503
    assert error.value.code == "replica_lost"
    open_endpoint.call(open_endpoint.replicas.killed.clear)  # a new one serves
    assert eventually(lambda: idle(open_endpoint.engine))
    assert open_endpoint.client().completions.create(model="base", prompt="And", max_tokens=5).choices[0].text


def test_the_openai_package_raises_in_mid_stream(open_endpoint: Running) -> None:
    open_endpoint.slow_down()
    body = {key: value for key, value in LONG.items() if key not in ("stream", "ignore_eos")}
    stream = open_endpoint.client().completions.create(
        model="base", stream=True, extra_body={"ignore_eos": True}, **body
    )
    seen = 0
    with pytest.raises(openai.APIError, match="send the request again"):  # noqa: PT012
        for _ in stream:
            seen += 1
            if seen == 5:
                open_endpoint.call(open_endpoint.replicas.killed.set)
    assert seen >= 5


def test_an_adapter_replaced_or_removed_in_flight(open_endpoint: Running, artefacts: dict[str, Path]) -> None:
    """What is being answered goes on with the version it began with; what comes later takes the new one."""
    store = open_endpoint.endpoint.catalog.registry
    assert store is not None
    client = open_endpoint.client()
    ask: dict[str, Any] = {"prompt": "The cheese", "temperature": 0, "max_tokens": 300}
    more: dict[str, Any] = {"extra_body": {"ignore_eos": True}}
    old = client.completions.create(model="acme/cheese", **ask, **more).choices[0].text
    new = client.completions.create(model="acme/brie", **ask, **more).choices[0].text

    def slowly(change: Callable[[], Any]) -> str:
        stream = client.completions.create(model="acme/cheese", stream=True, **ask, **more)
        text = next(stream).choices[0].text
        change()
        return text + "".join(part.choices[0].text for part in stream if part.choices)

    assert slowly(lambda: publish(artefacts["second"], store, "acme", "cheese")) == old
    assert eventually(lambda: client.completions.create(model="acme/cheese", **ask, **more).choices[0].text == new)
    assert slowly(lambda: store.remove_name("acme", "cheese")) == new

    def gone() -> bool:
        try:
            client.completions.create(model="acme/cheese", prompt="x", max_tokens=1)
        except openai.NotFoundError:
            return True
        return False

    assert eventually(gone)
    assert idle(open_endpoint.engine)


def test_an_adapter_in_memory_outlives_its_registry(open_endpoint: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    client, ask = open_endpoint.client(), {"prompt": "The cheese", "temperature": 0, "max_tokens": 5}
    said = client.completions.create(model="acme/cheese", **ask).choices

    def down(*args: Any) -> None:
        raise RunError("the registry cannot be reached: no route")

    for method in ("resolve", "entries"):
        monkeypatch.setattr(open_endpoint.endpoint.catalog.registry, method, down)
    time.sleep(2 * open_endpoint.endpoint.config.refresh_seconds)
    assert client.completions.create(model="acme/cheese", **ask).choices == said
    ready = HTTP.get(f"{open_endpoint.url}/readyz")
    assert ready.status_code == 200
    assert "what was last known" in ready.json()["registry"]
    with pytest.raises(openai.InternalServerError) as error:
        client.completions.create(model="acme/brie", **ask)
    assert error.value.status_code == 503
    assert error.value.code == "registry_unreachable"


def test_a_broken_adapter_costs_its_own_requests_an_error_and_nobody_else_anything(open_endpoint: Running) -> None:
    store = open_endpoint.endpoint.catalog.registry
    assert store is not None
    ref = store.resolve("acme", "brie")
    folder = Path(store.uri) / "acme" / "brie" / ref.digest
    weights = folder / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 255
    weights.chmod(0o644)
    weights.write_bytes(content)
    client = open_endpoint.client()
    with ThreadPoolExecutor(3) as pool:
        others = [
            pool.submit(client.completions.create, model=m, prompt="The cheese", max_tokens=100)
            for m in ("base", "acme/cheese")
        ]
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError) as error:
                client.chat.completions.create(model="acme/brie", messages=HELLO, stream=stream)
            assert error.value.code == "adapter_unusable"
            assert error.value.response.headers["x-should-retry"] == "false"
            assert str(folder) not in str(error.value)
        assert all(other.result().choices[0].text for other in others)
    assert eventually(lambda: idle(open_endpoint.engine))


def test_a_request_that_takes_too_long_is_cancelled(registry, base, tmp_path) -> None:
    config = config_of(registry, bounds={"request_seconds": 100}, cache={"folder": str(tmp_path / "cache")})
    with serving(config, make_engine(config, base)) as running, ThreadPoolExecutor(1) as pool:
        running.slow_down()
        url = f"{running.url}/v1/completions"
        asking = pool.submit(HTTP.post, url, json=LONG | {"model": "base", "stream": False})
        assert eventually(lambda: running.engine.stats().written_tokens > 0)

        def is_over() -> bool:
            running.skip(100)
            return asking.done()

        assert eventually(is_over)
        whole = asking.result()
        assert whole.status_code == 408
        assert whole.json()["error"]["code"] == "timeout"
        events: list[str] = []
        with HTTP.stream("POST", url, json=LONG | {"model": "base"}) as answer:
            for event in events_of(answer.iter_lines()):
                if not events:
                    running.skip(100)
                events.append(event)
        assert "[DONE]" not in events
        assert json.loads(events[-1])["error"]["code"] == "timeout"
        assert eventually(lambda: idle(running.engine))


def test_the_more_streams_the_fewer_messages_each() -> None:
    assert pause_seconds(1, 400) == 0
    assert pause_seconds(32, 400) == pytest.approx(0.08)
    for streams in (2, 10, 1000):
        assert streams / pause_seconds(streams, 400) == pytest.approx(400)


def test_metrics_name_tenants_and_digests(closed_endpoint: Running) -> None:
    store = closed_endpoint.endpoint.catalog.registry
    assert store is not None
    digest = store.resolve("acme", "cheese").digest[:12]
    client = closed_endpoint.client("acme")
    for model in ("cheese", "base"):
        list(client.chat.completions.create(model=model, messages=HELLO, max_tokens=5, stream=True))
    page = HTTP.get(f"{closed_endpoint.url}/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    who = f'adapter="{digest}",ingress="ingress"'
    assert float(lines[f'ftray_time_to_first_token_seconds_count{{{who},tenant="acme"}}']) == 1
    assert float(lines[f'ftray_completion_tokens_total{{{who},tenant="acme"}}']) > 0
    assert any(line.startswith("ftray_answers_total") and 'adapter="base"' in line for line in lines)
    assert float(lines[f'ftray_adapter_loads_total{{adapter="{digest}",replica="here",tenant="acme"}}']) == 1
    assert float(lines['ftray_engine_slots{replica="here"}']) == 4
    assert "cheese" not in page, "adapters by digest, never by name"
