"""The application of Ray Serve: `ftray serve SERVE.yaml` runs it, `serve deploy SERVE.yaml` deploys it.

    client ─▶ Ingress (HTTP, keys, limits, tokens) ─▶ Engine (one base, all adapters) × replicas

The ingress is a process of its own, so that HTTP and JSON never hold up a step of the engine.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

from ray import serve

from ftray.errors import ConfigError
from ftray.registry.store import Registry
from ftray.session import THREADS, usable_cpus

from .api import create_api
from .catalog import Catalog
from .config import ServeConfig, parse_args
from .endpoint import Endpoint
from .link import Link, ServeReplicas
from .listener import Listener
from .metrics import Metrics
from .prompts import Prompts
from .replica import EngineReplica
from .router import AdapterRouter
from .tenants import Tenants

log = logging.getLogger("ray.serve")
MARGIN = 64
"""Calls of a replica beyond its requests: events, counts, health."""


def build(args: dict[str, Any]) -> Any:
    """The application for `args` of a SERVE.yaml. Raises ConfigError."""
    config = parse_args(args)
    return application(config)


def application(config: ServeConfig) -> Any:
    engine: Any = serve.deployment(name="Engine", **engine_options(config))(EngineReplica)
    ingress: Any = serve.deployment(name="Ingress", **ingress_options(config))(serve.ingress()(Ingress))
    return ingress.bind(config.dump(), engine.bind(config.dump()))


def engine_options(config: ServeConfig) -> dict[str, Any]:
    """Ray Serve's options of the engine's deployment."""
    replicas, engine = config.replicas, config.engine
    options: dict[str, Any] = {
        "max_ongoing_requests": engine.slots + engine.queue + MARGIN,
        "graceful_shutdown_timeout_s": replicas.drain_seconds,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": 5,
        "ray_actor_options": {
            "num_cpus": replicas.cpus,
            "num_gpus": _gpus(config),
            "runtime_env": {"env_vars": {name: os.environ.get(name, value) for name, value in THREADS.items()}},
        },
        "request_router_config": {
            "request_router_class": AdapterRouter,
            "request_router_kwargs": {"slots": engine.slots},
            "request_routing_stats_period_s": 2.0,
        },
    }
    if replicas.max == replicas.min:
        return {**options, "num_replicas": replicas.min}
    scaling = {
        "min_replicas": replicas.min,
        "max_replicas": replicas.max,
        "target_ongoing_requests": replicas.target_requests or engine.slots,
        "upscale_delay_s": 10,
        "downscale_delay_s": 300,
    }
    return {**options, "autoscaling_config": scaling}


def _gpus(config: ServeConfig) -> float:
    if config.replicas.gpus != "auto":
        return config.replicas.gpus
    import ray

    return 1 if ray.is_initialized() and ray.cluster_resources().get("GPU", 0) >= 1 else 0


def ingress_options(config: ServeConfig) -> dict[str, Any]:
    """Ray Serve's options of the ingress's deployment."""
    return {
        "num_replicas": config.ingress.replicas,
        "max_ongoing_requests": 10_000,  # the engine's queue and the tenants' limits say when it is enough
        "graceful_shutdown_timeout_s": config.replicas.drain_seconds,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": 5,
        "ray_actor_options": {"num_cpus": config.ingress.cpus, "runtime_env": {"env_vars": INGRESS_ENVIRONMENT}},
    }


INGRESS_ENVIRONMENT = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
"""One loop in the ingress: a hop less for every message, and a client who does not read is felt where answers are
made."""


class Ingress:
    """HTTP. `config` is `ServeConfig.dump()`, `engine` a handle to the engine's deployment."""

    def __init__(self, config: dict[str, Any], engine: Any) -> None:
        settings = ServeConfig.model_validate(config)
        sees_clients = os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") != "1"  # it tells nobody for whom it asks
        if settings.tenants is None and not sees_clients:
            raise ConfigError(
                "without keys the endpoint answers this machine alone, and behind HAProxy everybody seems to be on it",
                where="args.tenants",
                hint="set it to a file of tenants and keys, or unset RAY_SERVE_ENABLE_HA_PROXY",
            )
        name = serve.get_replica_context().replica_id.unique_id
        tenants = None
        if settings.tenants:
            tenants = Tenants(settings.tenants, settings.refresh_seconds, settings.ingress.replicas)
        if tenants is None:
            log.warning("no tenants are configured: requests from this machine alone are answered, without a key")
        registry = Registry(settings.registry) if settings.registry else None
        self.endpoint = Endpoint(
            settings,
            prompts=Prompts(settings.model, settings.chat_template),
            catalog=Catalog(
                registry, settings.name_of_base, tenants, settings.refresh_seconds, settings.outage_seconds
            ),
            link=Link(ServeReplicas(engine), name, settings.bounds.unread_bytes),
            metrics=Metrics(name),
            tenants=tenants,
            cores=usable_cpus(),
            sees_clients=sees_clients,
        )
        self._watch = asyncio.get_running_loop().create_task(self.endpoint.watch())
        self._listener: Listener | None = None
        if settings.ingress.listen is not None:
            app = create_api(self.endpoint, echo_ids=True)
            self._listener = Listener(app, settings.ingress.listen, drain_seconds=settings.replicas.drain_seconds)

    def __serve_build_asgi_app__(self) -> Any:
        return create_api(self.endpoint)

    async def __del__(self) -> None:
        """Serve calls it when the replica is to end, and waits for it."""
        if self._listener is not None:
            await self._listener.close()
