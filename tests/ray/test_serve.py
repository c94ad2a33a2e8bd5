"""The endpoint on Ray Serve, as a user starts it: `ftray serve`, and Ray's own command with the same file."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from openai import OpenAI, OpenAIError

from ftray.embedded import base_path
from ftray.registry.publish import publish
from ftray.registry.store import Registry
from serve.tenants import hash_of
from tests.ray.runs import wait_for
from tests.serve.conftest import ADMIN_KEY, HTTP, train_adapter

HELLO: list[Any] = [{"role": "user", "content": "What cheese do you have?"}]
GREEDY: dict[str, Any] = {"messages": HELLO, "temperature": 0, "max_tokens": 12}
LONG: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True, "temperature": 0}
SECONDS = 240
"""For processes to start, to end or to be replaced, on a busy machine."""
NF4: dict[str, Any] = {"quantization": "nf4", "precision": "bf16"}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """default/cheese, and default/a … default/h: the same adapter under many names, of other versions."""
    root = tmp_path_factory.mktemp("serve")
    store = Registry(str(root / "registry"))
    artefact = train_adapter(root / "cheese", steps=20)
    publish(artefact, store, "default", "cheese")
    for name in "abcdefgh":
        (artefact / "README.md").write_text(f"# {name}\n")
        reseal(artefact)
        publish(artefact, store, "default", name)
    return store


def reseal(artefact: Path) -> None:
    from ftray.manifest import describe_files

    facts = json.loads((artefact / "ftray.json").read_text())
    (artefact / "ftray.json").unlink()
    (artefact / "ftray.json").write_text(json.dumps(facts | {"files": describe_files(artefact)}))


@dataclass
class Served:
    url: str
    process: psutil.Process

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def replicas(self, deployment: str) -> list[psutil.Process]:
        found = []
        for process in self.process.children(recursive=True):
            try:
                if f"ServeReplica:ftray:{deployment}" in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def stats(self, count: int = 1) -> list[dict[str, Any]] | None:
        """What each of so many replicas counts; None: not all of them have answered in time."""
        found = HTTP.get(f"{self.url}/admin/replicas", headers={"authorization": f"Bearer {ADMIN_KEY}"})
        stats: list[dict[str, Any]] = found.json()["replicas"]
        return stats if len(stats) == count else None


def free_ports() -> Iterator[int]:
    """Outside of those that the system hands out, so that nobody is given one before it is listened on: that may be
    half a minute, in which Ray opens dozens."""
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    ports = [*range(20_000, low), *range(high + 1, 65_536)]
    random.Random(os.getpid()).shuffle(ports)  # others who test here begin elsewhere
    for port in ports:
        with suppress(OSError):
            socket.create_server(("127.0.0.1", port)).close()
            yield port


PORTS = free_ports()


def write_config(folder: Path, registry: Registry, **args: Any) -> tuple[Path, int]:
    """In fp32 an answer is the same, whatever is answered beside it."""
    own: dict[str, Any] = {
        "model": {"path": "embedded"},
        "quantization": "none",
        "precision": "fp32",
        "registry": registry.uri,
        "engine": {"slots": 8},
        "cache": {"folder": str(folder / "cache")},
        "refresh_seconds": 0.2,
        "admin_key_sha256": hash_of(ADMIN_KEY),
        "replicas": {"min": 1, "max": 1, "threads": 1, "drain_seconds": 20},
    }
    port = next(PORTS)
    application = {"name": "ftray", "import_path": "serve.app:build", "args": own | args}
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump({"http_options": {"port": port}, "applications": [application]}))
    return file, port


@contextmanager
def started(command: list[str], url: str, log: Path) -> Iterator[Served]:
    """The endpoint that a command starts, once it answers. Ended with SIGTERM, as a supervisor does."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONPATH": str(Path.cwd())}
    with (
        log.open("w") as out,
        subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        try:

            def ready() -> bool:
                assert process.poll() is None, log.read_text()
                try:
                    return HTTP.get(f"{url}/readyz").status_code == 200
                except httpx.TransportError:
                    return False

            wait_for(ready, SECONDS, every=0.2)
            yield Served(url, psutil.Process(process.pid))
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


@pytest.fixture(scope="module")
def served(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("one")
    file, port = write_config(folder, registry)
    command = [sys.executable, "-m", "ftray.cli.main", "serve", str(file)]
    with started(command, f"http://127.0.0.1:{port}", folder / "log") as running:
        yield running
    log = (folder / "log").read_text()
    assert "ready: open" in log
    assert "no keys are configured" in log
    assert "Traceback" not in log, log


def test_base_and_adapter_answer_and_stream_alike(served: Served) -> None:
    client = served.client()
    texts = set()
    for model in ("base", "cheese"):
        whole = client.chat.completions.create(model=model, **GREEDY).choices[0].message.content
        parts = client.chat.completions.create(model=model, stream=True, **GREEDY)
        assert "".join(part.choices[0].delta.content or "" for part in parts) == whole
        texts.add(whole)
    assert len(texts) == 2
    assert [model.id for model in client.models.list()] == ["embedded", *sorted(["cheese", *"abcdefgh"])]


def test_request_ids_are_echoed_once(served: Served) -> None:
    answer = HTTP.get(f"{served.url}/healthz", headers={"x-request-id": "mine-1"})
    assert answer.headers.get_list("x-request-id") == ["mine-1"]
    assert HTTP.get(f"{served.url}/nowhere").headers["x-request-id"]


def test_the_page_and_metrics_are_there(served: Served) -> None:
    assert "<h1>ftray</h1>" in HTTP.get(f"{served.url}/").text
    for path in ("page.js", "page.css"):
        assert HTTP.get(f"{served.url}/{path}").status_code == 200
    assert wait_for(lambda: "ftray_engine_slots" in HTTP.get(f"{served.url}/metrics").text, SECONDS)


def test_many_streams_at_once_and_clients_that_leave(served: Served) -> None:
    """32 streams over 8 slots; half of them leave in the middle, the others get the same as alone."""
    alone = served.client().completions.create(
        model="cheese", prompt="The cow", max_tokens=60, temperature=0, extra_body={"ignore_eos": True}
    )
    texts: list[str] = []

    def ask(i: int) -> None:
        body = LONG | {"model": "cheese", "prompt": "The cow", "max_tokens": 60, "stream": True}
        with HTTP.stream("POST", f"{served.url}/v1/completions", json=body, timeout=120) as answer:
            text = ""
            for line in answer.iter_lines():
                if i % 2 and len(text) > 10:
                    return
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
            assert line == "" or line == "data: [DONE]"
            texts.append(text)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert texts == [alone.choices[0].text] * 16

    def idle() -> bool:
        found = served.stats()
        return found is not None and not any(found[0][what] for what in ("running", "waiting", "adapter_users"))

    assert wait_for(idle, SECONDS)


def test_a_new_version_is_taken_up_while_it_runs(served: Served, registry: Registry) -> None:
    client = served.client()
    before = registry.resolve("default", "a")
    assert client.chat.completions.create(model="a", **GREEDY).choices
    artefact = Path(registry.uri) / "default" / "b" / registry.resolve("default", "b").digest
    new = publish(artefact, registry, "default", "a").ref
    assert new.digest != before.digest

    def taken_up() -> bool:
        client.chat.completions.create(model="a", **GREEDY)
        return any(adapter["digest"] == new.digest for one in served.stats() or () for adapter in one["resident"])

    assert wait_for(taken_up, SECONDS)


def test_a_killed_replica_is_told_and_replaced(served: Served) -> None:
    [victim] = served.replicas("Engine")
    events: list[str] = []
    body = LONG | {"model": "cheese", "stream": True}
    with HTTP.stream("POST", f"{served.url}/v1/completions", json=body, timeout=120) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                events.append(line[6:])
                if len(events) == 5:
                    victim.kill()
    assert len(events) > 5
    assert "[DONE]" not in events
    assert json.loads(events[-1])["error"]["code"] == "replica_lost"

    def answers() -> bool:
        body = {"model": "cheese", "prompt": "x", "max_tokens": 2}
        try:
            answer = HTTP.post(f"{served.url}/v1/completions", json=body)
        except httpx.TransportError:  # it waits for a replica
            return False
        assert answer.status_code in (200, 503), answer.text
        return answer.status_code == 200

    assert wait_for(answers, SECONDS, every=0.2)
    assert served.replicas("Engine")[0].pid != victim.pid


def test_a_killed_ingress_comes_back_at_the_same_address(served: Served) -> None:
    [victim] = served.replicas("Ingress")
    victim.kill()

    def answers() -> bool:
        try:
            return bool(served.client().chat.completions.create(model="cheese", **GREEDY).choices)
        except OpenAIError:
            return False

    assert wait_for(answers, SECONDS, every=0.3)


# ------------------------------------------------------------------------------------------------------- two replicas


@pytest.fixture(scope="module")
def two(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("two")
    replicas = {"min": 2, "max": 2, "cpus": 0, "threads": 1, "drain_seconds": 20}
    file, port = write_config(folder, registry, replicas=replicas, engine={"slots": 4}, **NF4)
    command = [sys.executable, "-m", "ftray.cli.main", "serve", str(file)]
    with started(command, f"http://127.0.0.1:{port}", folder / "log") as running:
        yield running


def resident(served: Served) -> list[set[str]]:
    """Names of adapters in each replica's memory."""
    stats = wait_for(lambda: served.stats(2), SECONDS)
    return [{a["adapter"].split("/")[1].split("@")[0] for a in one["resident"]} for one in stats]


def test_requests_go_to_the_replica_that_has_the_adapter_and_spill_over(two: Served) -> None:
    assert wait_for(lambda: two.stats(2), SECONDS)
    client = two.client()
    for _ in range(4):
        for name in "cdefgh":
            client.chat.completions.create(model=name, **GREEDY)
    first, second = resident(two)
    assert first | second == set("cdefgh")
    assert not first & second, "each adapter was read by one replica"

    def ask() -> None:
        client.completions.create(model="c", prompt="x", max_tokens=300, extra_body={"ignore_eos": True})

    threads = [threading.Thread(target=ask) for _ in range(12)]  # three times a replica's slots
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert all("c" in names for names in resident(two)), "its own replica was busy, and the other read it too"


def test_one_replica_dies_and_the_other_goes_on(two: Served) -> None:
    wait_for(lambda: len(two.replicas("Engine")) == 2, SECONDS)
    killed = threading.Event()

    def ask(name: str) -> list[str]:
        """How its answers end: one after the other, so that both have work until one is killed."""
        body, ends = LONG | {"model": name, "stream": True, "max_tokens": 800}, []
        while not killed.is_set():
            with HTTP.stream("POST", f"{two.url}/v1/completions", json=body, timeout=120) as answer:
                *_, end = (line for line in answer.iter_lines() if line)
            ends.append(end.removeprefix("data: "))  # no event where it was refused before it began
        return ends

    def both_at_work() -> bool:
        found = two.stats(2)
        return found is not None and all(one["running"] for one in found)

    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(ask, name) for name in "cdefgh"]  # more than one replica has slots
        try:
            assert wait_for(both_at_work, SECONDS)
        finally:
            killed.set()
        two.replicas("Engine")[0].kill()
    ends = [end for one in asked for end in one.result()]
    lost = [end for end in ends if end != "[DONE]"]
    assert all(json.loads(end)["error"]["code"] == "replica_lost" for end in lost)
    assert 0 < len(lost) < len(ends)
    assert wait_for(lambda: two.stats(2), SECONDS)


# --------------------------------------------------------------------------------------------------- the same file


def test_answers_in_the_making_come_before_the_end(registry: Registry, tmp_path: Path) -> None:
    """SIGTERM: no new connection, the stream goes on to its [DONE], and the command leaves with 0."""
    file, port = write_config(tmp_path, registry, replicas={"threads": 1, "drain_seconds": 120})
    command = [sys.executable, "-m", "ftray.cli.main", "serve", str(file)]
    events: list[str] = []
    with started(command, f"http://127.0.0.1:{port}", tmp_path / "log") as running:
        body = LONG | {"model": "cheese", "stream": True, "max_tokens": 600}
        with HTTP.stream("POST", f"{running.url}/v1/completions", json=body, timeout=120) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    events.append(line[6:])
                    if len(events) == 3:
                        running.process.send_signal(signal.SIGTERM)
        assert events[-1] == "[DONE]"
        assert running.process.wait(SECONDS) == 0
    assert "stopping" in (tmp_path / "log").read_text()


def test_rays_own_command_takes_the_same_file(registry: Registry, tmp_path: Path) -> None:
    file, port = write_config(tmp_path, registry)
    command = [str(Path(sys.executable).with_name("serve")), "run", str(file)]
    with started(command, f"http://127.0.0.1:{port}", tmp_path / "log") as running:
        client = running.client()
        whole = client.chat.completions.create(model="cheese", **GREEDY).choices[0].message.content
        parts = list(client.chat.completions.create(model="cheese", stream=True, **GREEDY))
        assert "".join(part.choices[0].delta.content or "" for part in parts) == whole
        foreign = HTTP.post(f"{running.url}/v1/completions", json={}, headers={"host": "elsewhere.example"})
        assert foreign.status_code == 403


def test_a_wrong_file_is_refused_before_anything_starts(registry: Registry, tmp_path: Path) -> None:
    file, _ = write_config(tmp_path, registry)
    command = [sys.executable, "-m", "ftray.cli.main", "serve", str(file), "engine.slot=3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 2
    assert "did you mean 'slots'?" in done.stderr


def test_what_stops_it_is_told_in_a_line(registry: Registry, tmp_path: Path) -> None:
    file, _ = write_config(tmp_path, registry, model={"path": str(tmp_path / "no-such-base")})
    command = [sys.executable, "-m", "ftray.cli.main", "serve", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 2
    assert "no such folder" in done.stderr
    damaged = tmp_path / "damaged"
    shutil.copytree(base_path(), damaged)
    (damaged / "model.safetensors").write_bytes(b"nothing")
    file, _ = write_config(tmp_path, registry, model={"path": str(damaged)})
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 3, done.stderr
    assert "header" in done.stderr
    assert "Traceback" not in done.stderr
