"""The whole endpoint in one process: real HTTP, the real engine on the embedded base, a registry; all but Ray."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from ftray.config import Model
from ftray.data.tokenizer import chat_template_hash, load_tokenizer
from ftray.engine.engine import Engine
from ftray.engine.request import Event, Request
from ftray.registry.publish import publish
from ftray.registry.store import Registry
from ftray.train.loop import train_worker
from ftray.train.world import World
from serve.api import create_api
from serve.catalog import Catalog
from serve.config import Listen, ServeConfig
from serve.endpoint import Endpoint
from serve.link import Link
from serve.listener import Listener
from serve.metrics import Metrics
from serve.prompts import Prompts
from serve.replica import Bridge, Shelf, make_base
from serve.tenants import Tenants, hash_of
from serve.wire import Reply
from tests.clocks import skip
from tests.toys import MemoryData, Recorder, cheese_rows, toy_run

ADMIN_KEY = "the admin's"
KEYS = {"acme": "acme's key", "other": "other's key", "poor": "poor's key"}
HTTP = httpx.Client(timeout=60, limits=httpx.Limits(max_keepalive_connections=0))
"""For any server, one connection a request."""


def train_adapter(folder: Path, *, steps: int, rate: str = "1e-2", method: str = "{name: lora, rank: 8}") -> Path:
    """A small adapter of the embedded base, trained on the cheese expert's rows; returns its artefact."""
    run = toy_run(folder, f"train.steps={steps}", f"train.learning_rate={rate}", method=method)
    data = MemoryData(cheese_rows(64))
    data.facts["chat_template_hash"] = chat_template_hash(load_tokenizer(Model(path="embedded")))
    train_worker(run, data, World(), Recorder())  # type: ignore[arg-type]
    return folder / "artefact"


@pytest.fixture(scope="session")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`first` and `second`, of different ranks, far from the base and from each other."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        "first": train_adapter(root / "first", steps=20),
        "second": train_adapter(
            root / "second", steps=10, method="{name: lora, rank: 2, targets: [q_proj, down_proj]}"
        ),
    }


@pytest.fixture
def registry(tmp_path: Path, artefacts: dict[str, Path]) -> Registry:
    """acme/cheese, acme/brie, other/cheese (another one), shared/common."""
    store = Registry(str(tmp_path / "registry"))
    publish(artefacts["first"], store, "acme", "cheese")
    publish(artefacts["second"], store, "acme", "brie")
    publish(artefacts["second"], store, "other", "cheese")
    publish(artefacts["first"], store, "shared", "common")
    return store


class InProcess:
    """The engine's deployment, without Ray: what a handle does, straight to the bridge."""

    def __init__(self, bridge: Bridge, shelf: Shelf) -> None:
        self.bridge, self.shelf = bridge, shelf
        self.killed = asyncio.Event()

    async def run(self, request: Request, ingress: str, streams: bool) -> AsyncGenerator[Reply, None]:
        async for item in self._alive(self.bridge.run(request, ingress, streams)):
            yield item

    async def events(self, ingress: str, replica: str) -> AsyncGenerator[list[Event], None]:
        async for batch in self._alive(self.bridge.events(ingress)):
            yield batch

    async def _alive(self, source: Any) -> AsyncGenerator[Any, None]:
        """Items of `source`, and an error when the replica is killed: as a handle raises ActorDiedError."""
        killed, following = asyncio.ensure_future(self.killed.wait()), asyncio.ensure_future(anext(source, None))
        try:
            while True:
                await asyncio.wait({following, killed}, return_when=asyncio.FIRST_COMPLETED)
                if killed.done():
                    raise ConnectionError("the replica was killed")
                if (item := following.result()) is None:
                    return
                following = asyncio.ensure_future(anext(source, None))
                yield item
        finally:
            killed.cancel()
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            await source.aclose()

    async def stats(self) -> list[dict[str, Any]]:
        stats = self.bridge.engine.stats()
        counted = {name: getattr(stats, name) for name in stats.__dataclass_fields__}
        counted |= {"replica": "here", "context": self.bridge.engine.context, "adapters": len(stats.resident)}
        return [counted | self.shelf.counted()]


class Running:
    """An endpoint that answers at `url`."""

    def __init__(self, url: str, endpoint: Endpoint, replicas: InProcess, loop: asyncio.AbstractEventLoop) -> None:
        self.url, self.endpoint, self.replicas, self._loop = url, endpoint, replicas, loop
        self.engine: Engine = replicas.bridge.engine

    def client(self, tenant: str | None = None, **options: Any) -> OpenAI:
        key = KEYS[tenant] if tenant else "none is needed"
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, **{"max_retries": 0, "timeout": 60, **options})

    def call(self, do: Any) -> None:
        """Call `do` in the server's loop."""
        self._loop.call_soon_threadsafe(do)

    def skip(self, seconds: float) -> None:
        """Let so much time pass in the server's loop, at once."""
        self.call(lambda: skip(self._loop, seconds))

    def slow_down(self, seconds: float = 0.01) -> None:
        """Each step of the engine takes so much longer: an answer in the making lasts until it has been looked at."""
        step = self.engine.step

        def slowly() -> list[Event]:
            time.sleep(seconds)
            return step()

        self.engine.step = slowly  # type: ignore[method-assign]


@contextmanager
def serving(config: ServeConfig, engine: tuple[Engine, Shelf]) -> Iterator[Running]:
    tenants = Tenants(config.tenants, config.refresh_seconds, config.ingress.replicas) if config.tenants else None
    registry = Registry(config.registry) if config.registry else None
    bridge = Bridge(lambda: engine[0], "here")
    replicas = InProcess(bridge, engine[1])
    endpoint = Endpoint(
        config,
        prompts=Prompts(config.model, config.chat_template),
        catalog=Catalog(registry, config.name_of_base, tenants, config.refresh_seconds, config.outage_seconds),
        link=Link(replicas, "ingress", config.bounds.unread_bytes),
        metrics=Metrics("ingress"),
        tenants=tenants,
        cores=2,
    )
    loop, began, stop = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    listen = Listen(port=1).model_copy(update={"port": 0})  # the system chooses one
    ports: list[int] = []

    async def main() -> None:
        watching = asyncio.create_task(endpoint.watch())
        while endpoint.context is None:
            await asyncio.sleep(0.01)
        listener = Listener(create_api(endpoint, echo_ids=True), listen, drain_seconds=1)
        ports.append(listener._socket.getsockname()[1])
        began.set()
        await stop.wait()
        await listener.close()
        watching.cancel()

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),), daemon=True)
    thread.start()
    assert began.wait(60)
    try:
        yield Running(f"http://127.0.0.1:{ports[0]}", endpoint, replicas, loop)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(60)
        bridge.close()


def config_of(registry: Registry | None, **more: Any) -> ServeConfig:
    own = {
        "model": {"path": "embedded"},
        "precision": "fp32",
        "quantization": "none",
        "registry": registry.uri if registry else None,
        "engine": {"slots": 4, "queue": 8},
        "replicas": {"threads": 1},
        "refresh_seconds": 0.05,
        "admin_key_sha256": hash_of(ADMIN_KEY),
    }
    return ServeConfig.model_validate(own | more)


def make_engine(config: ServeConfig, base: Any) -> tuple[Engine, Shelf]:
    shelf = Shelf(config, base)
    return Engine(base, shelf.load, config.engine), shelf


@pytest.fixture
def base() -> Any:
    """Each engine has one of its own: its pools are the engine's to fill."""
    return make_base(config_of(None))


@pytest.fixture
def open_endpoint(registry: Registry, base: Any, tmp_path: Path) -> Iterator[Running]:
    """Without keys."""
    config = config_of(registry, cache={"folder": str(tmp_path / "cache")})
    with serving(config, make_engine(config, base)) as running:
        yield running


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    """Without keys and without a registry: for tests that leave nothing behind."""
    config = config_of(None)
    with serving(config, make_engine(config, make_base(config))) as running:
        yield running


TENANTS = """
tenants:
  acme:
    keys: [{{sha256: {acme}}}]
    adapters: [shared/common]
  other:
    keys: [{{sha256: {other}}}]
  poor:
    keys: [{{sha256: {poor}}}]
    limits: {{requests_per_minute: 60, concurrency: 2}}
"""


@pytest.fixture
def tenants_file(tmp_path: Path) -> Path:
    file = tmp_path / "tenants.yaml"
    file.write_text(TENANTS.format(**{name: hash_of(key) for name, key in KEYS.items()}))
    return file


@pytest.fixture
def closed_endpoint(registry: Registry, base: Any, tmp_path: Path, tenants_file: Path) -> Iterator[Running]:
    """With keys: acme, other, poor."""
    config = config_of(registry, cache={"folder": str(tmp_path / "cache")}, tenants=str(tenants_file))
    with serving(config, make_engine(config, base)) as running:
        yield running


def eventually(condition: Callable[[], Any], seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def idle(engine: Engine) -> bool:
    """Whether slots, requests and references to adapters are all given back."""
    stats = engine.stats()
    return not (engine.in_flight() or stats.running or stats.waiting or stats.adapter_users)
