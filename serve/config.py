"""What an endpoint is: SERVE.yaml, strict and complete. No torch, no Ray.

    file = load_serve("serve.yaml", overrides=["http_options.port=9000", "replicas.max=2"])

A SERVE.yaml is a Ray Serve config file, so that the same file runs with `ftray serve` and deploys with `serve deploy`.
Ray ignores keys that it does not know; here every key is checked, those of Ray's that an endpoint needs and those under
`args`, which are ours. `build` checks `args` again on the cluster, and sees nothing else of the file: before
`serve deploy` comes `ftray serve --check`.

    http_options: {host: 127.0.0.1, port: 8000}
    applications:
    - name: ftray
      import_path: serve.app:build
      args:
        model: {path: embedded}
        registry: registry

Relative paths under `args` are relative to the working directory. `serve deploy` starts elsewhere: give it absolute
paths or URIs.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from ftray.config import Model
from ftray.config.explain import explain
from ftray.config.reading import override, parse_yaml
from ftray.config.strict import Strict
from ftray.engine.options import EngineOptions
from ftray.errors import ConfigError
from ftray.manifest import filesystem, is_local, read_text

BUILD = "serve.app:build"
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""SHA-256 in hexadecimal."""


class Replicas(Strict):
    """Engine replicas, each with a base and an engine of its own."""

    min: int = Field(1, ge=1)
    max: int = Field(1, ge=1)
    """More replicas are started while requests wait, up to this many."""
    target_requests: float | None = Field(None, gt=0)
    """Requests in flight at a replica that Ray's autoscaler aims at. null: the engine's slots."""
    cpus: float = Field(1, ge=0)
    """CPUs that Ray reserves for a replica."""
    threads: int | None = Field(None, ge=1)
    """Threads that a replica without a GPU computes with. null: the machine's cores, divided among `max` replicas."""
    gpus: Literal["auto"] | Annotated[float, Field(ge=0)] = "auto"
    """GPUs of a replica; `auto`: one if the cluster has any, else none."""
    drain_seconds: float = Field(60.0, ge=0)
    """On redeploy and on scaling down, a replica answers what it has for so long before it ends."""

    @model_validator(mode="after")
    def _in_order(self) -> Replicas:
        if self.max < self.min:
            raise ValueError(f"replicas.max {self.max} is less than replicas.min {self.min}")
        return self


class Cache(Strict):
    """Verified local copies of adapters."""

    folder: str | None = None
    """A local folder, shared by the replicas of a machine. null: `adapters` in ftray's cache folder (FTRAY_CACHE)."""
    max_bytes: int = Field(20 << 30, ge=1 << 20)
    """Copies that nobody uses are removed, the least recently used first, beyond this size."""


class Bounds(Strict):
    """What one request may ask for, and what waits for whom."""

    body_bytes: int = Field(1 << 20, ge=1024)
    """A larger request body is refused with 413."""
    choices: int = Field(16, ge=1, le=1024)
    """Answers to one request: its prompts times `n`."""
    stream_bytes: int = Field(32 << 20, ge=1024)
    """Of one streamed answer, all its choices and `logprobs` together; a longer one ends with an error. Ray's proxies
    take what is written whether or not their client reads: behind them this much may wait for each that does not."""
    unread_bytes: int = Field(256 << 10, ge=1024)
    """Text that waits for a client who does not read; beyond this, the answer is stopped and the connection closed.
    This and `write_seconds` are felt where an ingress listens itself (`ingress.listen`, `ftray serve`)."""
    write_seconds: float = Field(60.0, gt=0)
    """A client that takes nothing for so long is taken to be gone."""
    request_seconds: float = Field(600.0, gt=0)
    """A request that takes longer is cancelled."""
    messages_per_second: int | None = Field(None, ge=1)
    """Streamed messages that an ingress sends, of all streams together; beyond it each message carries more tokens.
    null: 200 for each core of its machine."""


class Certified(Strict):
    """What TLS takes; both or neither."""

    ssl_keyfile: str | None = None
    """The key to the certificate, without a passphrase."""
    ssl_certfile: str | None = None
    """The certificate, and those that lead from it to one that clients know. null: no TLS."""

    @model_validator(mode="after")
    def _both(self) -> Certified:
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            missing = "ssl_keyfile" if self.ssl_keyfile is None else "ssl_certfile"
            raise ValueError(f"TLS takes a certificate and its key, and {missing} is not set")
        return self

    def check(self, where: str) -> None:
        """That both can be read and belong together. Raises ConfigError."""
        if self.ssl_certfile is None:
            return
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            certificate = os.path.expanduser(self.ssl_certfile)
            context.load_cert_chain(certificate, os.path.expanduser(self.ssl_keyfile or ""), password=lambda: "")
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            files = f"{self.ssl_certfile} and {self.ssl_keyfile}"
            raise ConfigError(f"TLS cannot be had with {files}: {error}", where=where) from None

    def with_absolute_paths(self) -> Self:
        return self.model_copy(
            update={"ssl_keyfile": _whole(self.ssl_keyfile), "ssl_certfile": _whole(self.ssl_certfile)}
        )


class Listen(Certified):
    """Where an ingress listens itself, beside Ray's proxies."""

    host: str = "127.0.0.1"
    port: int = Field(ge=1, le=65535)
    root_path: str = ""
    """Path under which a reverse proxy shows the endpoint."""
    shared: bool = False
    """Several ingresses on one machine listen there, and the system divides the connections among them."""


class Ingress(Strict):
    replicas: int = Field(1, ge=1)
    """Processes that take HTTP requests. Each keeps an even share of every tenant's limits."""
    listen: Listen | None = None
    """Each ingress listens on its own machine there: a third of the CPU a message, and clients who do not read are
    stopped sooner. null: only Ray's proxies take requests. `ftray serve` on this machine always sets it, from
    `http_options`."""
    cpus: float = Field(0, ge=0)
    """CPUs that Ray reserves for each; 0: none, it runs beside the engine."""


class ServeConfig(Strict):
    """`args` of the application."""

    model: Model
    """The base, as in run files."""
    registry: str | None = None
    """Where adapters are published: a path or any fsspec URI. null: the base alone."""
    quantization: Literal["nf4", "none"] = "nf4"
    """`nf4`: bitsandbytes' 4-bit weights with double quantization, as QLoRA trained over; `none`: as `precision`."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of everything that is not quantized, and of what is computed."""
    chat_template: str | None = None
    """Path or URI of a Jinja file that replaces the base's chat template. Adapters that were trained with another one
    are refused."""
    tenants: str | None = None
    """File or URI of tenants and their keys; see `serve/tenants.py`. null: no keys, and this machine alone may ask."""
    admin_key_sha256: Digest | None = None
    """SHA-256 of the key for `/admin`; make one with `ftray serve --new-key`. null: no admin calls."""
    base_name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$")
    """What the base is called beside `base`. null: the last part of `model.path`."""
    refresh_seconds: float = Field(2.0, ge=0)
    """A name keeps leading to the same version for so long; then the registry is asked again. Of the tenants' file it
    is how often it is looked at."""
    outage_seconds: float = Field(3600.0, ge=0)
    """While the registry cannot be reached, a name keeps leading to the version that it had last, for so long. An
    adapter that is removed meanwhile lives on until then. 0: every adapter is refused with 503 at once."""
    engine: EngineOptions = EngineOptions()
    replicas: Replicas = Replicas()
    ingress: Ingress = Ingress()
    cache: Cache = Cache()
    bounds: Bounds = Bounds()

    @property
    def name_of_base(self) -> str:
        return self.base_name or self.model.path.rstrip("/").rsplit("/", 1)[-1] or "base"

    def dump(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


class HTTPOptions(Certified):
    """Of Ray Serve's front door; `serve deploy` uses them when Serve is not running yet."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    root_path: str = ""
    """Path under which a reverse proxy shows the endpoint."""
    request_timeout_s: float | None = Field(None, gt=0)
    """Ray's own limit for a request. null: `bounds.request_seconds` is the only one."""
    keep_alive_timeout_s: int | None = Field(None, ge=1)


class Application(Strict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = "ftray"
    import_path: Literal["serve.app:build"]
    route_prefix: Literal["/"] = "/"
    """OpenAI's clients and the page expect the whole of a host; `http_options.root_path` is for reverse proxies."""
    runtime_env: dict[str, Any] = {}
    """Ray's: `env_vars`, `working_dir`, `pip` and so on."""
    args: ServeConfig


class ServeFile(Strict):
    """A whole SERVE.yaml: what an endpoint needs of Ray Serve's config file."""

    applications: list[Application] = Field(min_length=1, max_length=1)
    http_options: HTTPOptions = HTTPOptions()
    proxy_location: Literal["EveryNode", "HeadOnly", "Disabled"] = "EveryNode"
    """Where Ray's proxies run; `ftray serve` on this machine needs none."""
    logging_config: dict[str, Any] | None = None
    """Ray's: `encoding`, `log_level`, `logs_dir`, `enable_access_log`."""

    @field_validator("applications", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        if isinstance(value, list) and len(value) > 1:
            raise ValueError(f"one application is expected, here are {len(value)}; others go into files of their own")
        return value

    @property
    def application(self) -> Application:
        return self.applications[0]

    @property
    def config(self) -> ServeConfig:
        return self.application.args

    def dump(self) -> dict[str, Any]:
        """The resolved file as plain values, which Ray takes too: some of its keys may be absent, but not null."""
        return self.model_dump(mode="json") | {"http_options": self.http_options.model_dump(exclude_none=True)}


LOOPBACK = ("127.0.0.1", "localhost", "::1")


def load_serve(where: str | Path, overrides: Iterable[str] = ()) -> ServeFile:
    """The endpoint of a SERVE.yaml at a path or URI. `overrides` are `dotted.key=value`; keys of `args` stand alone
    (`engine.slots=8`), Ray's in full (`http_options.port=9000`). Raises ConfigError with every problem found."""
    name = str(where)
    try:
        text = read_text(name)
    except FileNotFoundError:
        raise ConfigError("no such file", where=name, hint="`ftray serve --example` prints one to start from") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"this file cannot be read: {error}", where=name) from None
    file = parse_serve(text, name, overrides)
    file.http_options.check(f"{name}: http_options")
    if file.config.ingress.listen is not None:
        file.config.ingress.listen.check(f"{name}: ingress.listen")
    return file


def parse_serve(text: str, name: str, overrides: Iterable[str] = ()) -> ServeFile:
    """`load_serve` for a text already read; `name` is what errors call it."""
    raw = parse_yaml(text, name)
    for item in overrides:
        override(raw, item if item.split(".")[0].split("=")[0] in ServeFile.model_fields else f"{_ARGS}.{item}")
    try:
        file = ServeFile.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n  ".join(explain(error, ServeFile)), where=name) from None
    listen = file.config.ingress.listen
    for key, host in {"http_options": file.http_options.host, "ingress.listen": listen and listen.host}.items():
        if file.config.tenants is None and host not in (None, *LOOPBACK):
            raise ConfigError(
                f"without keys the endpoint answers this machine alone, and {key}.host is {host}",
                where=name,
                hint=f"set args.tenants to a file of tenants and keys, or {key}.host to 127.0.0.1",
            )
    return file


_ARGS = "applications.0.args"


def parse_args(args: Any) -> ServeConfig:
    """`args` as Ray hands them to `build`. Raises ConfigError."""
    try:
        return ServeConfig.model_validate(args)
    except ValidationError as error:
        raise ConfigError("\n  ".join(explain(error, ServeConfig)), where=f"args of {BUILD}") from None


def listening(file: ServeFile) -> ServeConfig:
    """The file's endpoint, its ingress listening itself where `http_options` says."""
    config, options = file.config, file.http_options
    listen = Listen(
        host=options.host,
        port=options.port,
        root_path=options.root_path,
        ssl_keyfile=options.ssl_keyfile,
        ssl_certfile=options.ssl_certfile,
        shared=config.ingress.replicas > 1,
    )
    return config.model_copy(update={"ingress": config.ingress.model_copy(update={"listen": listen})})


def with_absolute_paths(config: ServeConfig) -> ServeConfig:
    """The same with local relative paths made absolute: Ray's processes have working directories of their own."""
    model, listen = config.model, config.ingress.listen
    if os.path.isdir(os.path.expanduser(model.path)):
        model = model.model_copy(update={"path": _whole(model.path)})
    if listen is not None:
        listen = listen.with_absolute_paths()
    return config.model_copy(
        update={
            "model": model,
            "registry": _whole(config.registry),
            "tenants": _whole(config.tenants),
            "chat_template": _whole(config.chat_template),
            "ingress": config.ingress.model_copy(update={"listen": listen}),
            "cache": config.cache.model_copy(update={"folder": _whole(config.cache.folder)}),
            "base_name": config.name_of_base,
        }
    )


def _whole(path: str | None) -> str | None:
    return filesystem(os.path.expanduser(path))[1] if path and is_local(path) else path


EXAMPLE = """\
# An endpoint: `ftray serve serve.yaml` runs it here, `serve deploy serve.yaml` on a Ray cluster; before that,
# `ftray serve --check serve.yaml`, since Ray passes over what it does not know.
http_options:
  host: 127.0.0.1
  port: 8000
applications:
- name: ftray
  import_path: serve.app:build
  args:
    model: {path: embedded}
    registry: registry           # what `ftray publish` filled
    quantization: nf4
    # tenants: tenants.yaml      # keys; without it this machine alone may ask
    # admin_key_sha256: …        # of a key from `ftray serve --new-key`
    engine: {slots: 32}
    replicas: {min: 1, max: 1}
"""
