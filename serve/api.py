"""The endpoint's HTTP: routes, OpenAI-shaped errors, request ids, and bounds that hold before anything is parsed."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import asdict
from importlib import resources
from typing import Any, TypeVar

import orjson
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ftray import __version__
from ftray.config.explain import cut, explain
from ftray.errors import ArtefactError, ConfigError, FtrayError, UnknownAdapter
from ftray.registry.ref import Ref

from .catalog import Caller
from .endpoint import Endpoint, Served, SlowClient
from .errors import ApiError, bad_request
from .openai import ChatRequest, Common, CompletionRequest, check_choices, without_defaults
from .tenants import Limits, hash_of

log = logging.getLogger("ray.serve")
B = TypeVar("B", bound=Common)
T = TypeVar("T")
_REQUEST_ID = re.compile(r"^[A-Za-z0-9._-]{1,64}$")
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]


def create_api(endpoint: Endpoint, *, echo_ids: bool = False) -> ASGIApp:
    """The whole of an ingress's HTTP as an ASGI application. With `echo_ids` it tells the request's id in a header, as
    Ray Serve does by itself."""
    api = FastAPI(
        title="ftray",
        version=__version__,
        description="OpenAI-compatible: one base, and every adapter that was published for it.",
        docs_url=None,  # FastAPI's page loads from elsewhere
        redoc_url=None,
    )
    api.openapi = lambda: _description(api)  # type: ignore[method-assign]

    async def told(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        if error.status == 429:
            endpoint.metrics.refused.labels(request.state.tenant, error.code).inc()
        return Answered(error.body, error.status, error.headers)

    api.add_exception_handler(ApiError, told)
    api.add_exception_handler(HTTPException, _told_by_framework)
    api.add_exception_handler(RequestValidationError, _told_of_parameters)
    _add_openai(api, endpoint)
    _add_health(api, endpoint)
    _add_admin(api, endpoint)
    _add_page(api)
    return Gate(api, endpoint, echo_ids)


# ------------------------------------------------------------------------------------------------------------- routes


def _add_openai(api: FastAPI, endpoint: Endpoint) -> None:
    async def admitted(request: Request) -> tuple[Caller, Limits]:
        who, limits = await endpoint.caller(request.headers.get("authorization"))
        request.state.tenant = who.tenant
        endpoint.quotas.admit_request(who.tenant, limits)
        return who, limits

    @api.post("/v1/chat/completions", openapi_extra=_takes(ChatRequest), responses=_ANSWERS)
    async def chat_completions(request: Request) -> Response:
        return await answered(request, ChatRequest)

    @api.post("/v1/completions", openapi_extra=_takes(CompletionRequest), responses=_ANSWERS)
    async def completions(request: Request) -> Response:
        return await answered(request, CompletionRequest)

    async def answered(request: Request, kind: Any) -> Response:
        who, limits = await admitted(request)
        check_json(request.headers.get("content-type", ""))
        body = read_body(await request.body(), kind, endpoint.config.bounds.choices)
        served = await endpoint.begin(request.state.id, who, limits, body, request.state.arrived)
        if body.stream:
            return EventStream(endpoint, served)
        return Answered(await while_connected(request.receive, endpoint.whole(served)))

    @api.get("/v1/models")
    async def models(request: Request) -> Response:
        who, _ = await admitted(request)
        names = await endpoint.catalog.names(who)
        return Answered({"object": "list", "data": [_model(name, endpoint, who) for name in names]})

    @api.get("/v1/models/{model:path}", responses=_REFUSALS)
    async def model(request: Request, model: str) -> Response:
        who, _ = await admitted(request)
        await endpoint.catalog.choose(who, model)
        return Answered(_model(model, endpoint, who))


def _model(name: str, endpoint: Endpoint, caller: Caller) -> dict[str, Any]:
    owner = "base" if name in ("base", endpoint.catalog.base_name) else name.rpartition("/")[0] or caller.tenant
    return {"id": name, "object": "model", "created": 0, "owned_by": owner}


def _add_health(api: FastAPI, endpoint: Endpoint) -> None:
    @api.get("/healthz")
    async def healthz() -> Response:
        """This process answers."""
        return Answered({"status": "ok"})

    @api.get("/readyz", responses={503: {"description": "No engine is ready."}})
    async def readyz() -> Response:
        """Requests can be answered."""
        ready = endpoint.replicas > 0
        found: dict[str, Any] = {
            "status": "ready" if ready else "starting",
            "base": endpoint.catalog.base_name,
            "keys": endpoint.tenants is not None,
        }
        if endpoint.tenants is not None and endpoint.tenants.status.error:
            found["tenants"] = "the last good ones; the file is broken, see the log"
        if endpoint.catalog.error:
            found["registry"] = "what was last known of it; it cannot be reached, see the log"
        return Answered(found, 200 if ready else 503)

    @api.get("/metrics", response_class=Response)
    async def metrics(request: Request) -> Response:
        """Prometheus's text format; for this machine, or with the admin key."""
        if not (endpoint.sees_clients and is_loopback(request.scope)):
            check_admin(endpoint, request.headers.get("authorization"))
        page = endpoint.metrics.page(await endpoint.link.stats())
        return Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")


class Which(BaseModel, extra="forbid"):
    digest: str | None = None
    """Or its first digits; null: what the name means now, and for a rollback the version before."""
    hold: bool = False
    """For a pin: the name means this version from now on, whatever is published."""


def _add_admin(api: FastAPI, endpoint: Endpoint) -> None:
    async def admin(request: Request) -> None:
        check_admin(endpoint, request.headers.get("authorization"))

    guard = [Depends(admin)]

    def registry() -> Any:
        if endpoint.catalog.registry is None:
            raise bad_request("This endpoint has no registry.")
        return endpoint.catalog.registry

    async def changed(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        try:
            found = await endpoint.catalog.ask(lambda: call(*args, **options))
        except UnknownAdapter as error:
            raise ApiError(404, str(error), code="adapter_not_found") from None
        except ConfigError as error:
            raise bad_request(str(error)) from None
        except ArtefactError as error:
            raise ApiError(409, str(error), code=await conflict(call, *args)) from None
        endpoint.catalog.forget()
        return found

    async def conflict(call: Callable[..., Any], *args: Any) -> str:
        """What stands in the way of a call for a version, or for (tenant, name, …)."""
        names = (args[0].tenant, args[0].name) if isinstance(args[0], Ref) else args[:2]
        with contextlib.suppress(ArtefactError):
            if (await endpoint.catalog.ask(registry().show, *names)).damaged:
                return "adapter_damaged"
        return _CONFLICTS.get(call.__name__, "conflict")

    @api.get("/admin/adapters", dependencies=guard, responses=_REFUSALS)
    async def adapters(tenant: str | None = None) -> Response:
        """Every name with its versions, and which lie in a replica's memory."""
        entries = await changed(registry().entries, tenant)
        lying = {ref.digest for stats in await endpoint.link.stats() for ref in stats["resident"]}
        return Answered({"adapters": [_entry(entry, lying) for entry in entries]})

    @api.post("/admin/adapters/{tenant}/{name}/pin", dependencies=guard, responses=_REFUSALS)
    async def pin(tenant: str, name: str, which: Which) -> Response:
        """Protect a version from removal."""
        ref = await changed(registry().resolve, tenant, name, which.digest)
        await changed(registry().pin, ref, hold=which.hold)
        return Answered({"pinned": str(ref), "digest": ref.digest, "hold": which.hold})

    @api.post("/admin/adapters/{tenant}/{name}/unpin", dependencies=guard, responses=_REFUSALS)
    async def unpin(tenant: str, name: str, which: Which) -> Response:
        ref = await changed(registry().resolve, tenant, name, which.digest)
        return Answered({"unpinned": await changed(registry().unpin, ref), "digest": ref.digest})

    @api.post("/admin/adapters/{tenant}/{name}/rollback", dependencies=guard, responses=_REFUSALS)
    async def rollback(tenant: str, name: str, which: Which) -> Response:
        """Let the name mean an older version again."""
        digest = (await changed(registry().resolve, tenant, name, which.digest)).digest if which.digest else None
        ref = await changed(registry().rollback, tenant, name, digest)
        return Answered({"current": str(ref), "digest": ref.digest})

    @api.delete("/admin/adapters/{tenant}/{name}", dependencies=guard, responses=_REFUSALS)
    async def remove(tenant: str, name: str, digest: str | None = None) -> Response:
        """Remove one version, or the name with all of them. Answers in the making end on what they began with."""
        if digest is None:
            return Answered({"removed": await changed(registry().remove_name, tenant, name)})
        ref = await changed(registry().resolve, tenant, name, digest)
        await changed(registry().remove, ref)
        return Answered({"removed": [ref.digest]})

    @api.post("/admin/refresh", dependencies=guard, responses=_REFUSALS)
    async def refresh() -> Response:
        """Ask the registry again at the next request, instead of within `refresh_seconds`."""
        endpoint.catalog.refresh()
        return Answered({"refreshed": True})

    @api.get("/admin/replicas", dependencies=guard, responses=_REFUSALS)
    async def replicas() -> Response:
        """What every engine replica counts."""
        return Answered({"replicas": [_plain(stats) for stats in await endpoint.link.stats()]})


_CONFLICTS = {
    "remove": "adapter_in_use",
    "remove_name": "adapter_in_use",
    "resolve": "ambiguous_digest",
    "rollback": "no_earlier_version",
}
"""By what the registry was asked for."""


def _entry(entry: Any, lying: set[str]) -> dict[str, Any]:
    versions = [{**asdict(version), "resident": version.digest in lying} for version in entry.versions]
    return {"name": entry.full_name, "digest": entry.digest, "held": entry.held, "versions": versions}


def _plain(stats: dict[str, Any]) -> dict[str, Any]:
    resident = [{"adapter": str(ref), "digest": ref.digest} for ref in stats["resident"]]
    counted = {key: value for key, value in stats.items() if isinstance(value, int | float | str)}
    return {**counted, "resident": resident}


def check_admin(endpoint: Endpoint, authorization: str | None) -> None:
    """Raises ApiError unless the header shows the admin key."""
    known = endpoint.config.admin_key_sha256
    kind, _, key = (authorization or "").partition(" ")
    if known is None:
        raise ApiError(403, "This endpoint has no admin key (admin_key_sha256).", code="no_admin_key")
    if kind.lower() != "bearer" or not hmac.compare_digest(hash_of(key.strip()), known):
        raise ApiError(401, "This needs the admin key: Authorization: Bearer KEY.", code="invalid_admin_key")


def _add_page(api: FastAPI) -> None:
    folder = resources.files("serve") / "page"

    def add(path: str, file: str, kind: str) -> None:
        content = (folder / file).read_bytes()

        @api.get(path, include_in_schema=False)
        async def page() -> Response:
            return Response(content, media_type=kind, headers={"content-security-policy": _POLICY})

    add("/", "index.html", "text/html")
    add("/page.css", "page.css", "text/css")
    add("/page.js", "page.js", "text/javascript")


_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


# ------------------------------------------------------------------------------------------------------------- bodies


def check_json(kind: str) -> None:
    """Raises ApiError 415 for a body that is not called JSON. A page elsewhere may send any other kind, unasked."""
    name = kind.partition(";")[0].strip().lower()
    if name != "application/json":
        told = f", not {cut(name)}" if name else ""
        raise ApiError(415, f"The body should be JSON: Content-Type: application/json{told}.", code="not_json")


def read_body(content: bytes, kind: type[B], choices: int) -> B:
    """A request's body, which may ask for that many answers. Raises ApiError 400 with the key and what is wrong with
    it."""
    try:
        raw = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise bad_request(f"The body is not JSON: {error}.") from None
    if not isinstance(raw, dict):
        raise bad_request("The body should be a JSON object.")
    check_choices(raw, kind, choices)
    try:
        return kind.model_validate(without_defaults(raw))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        param = next((cut(part) for part in first["loc"] if isinstance(part, str)), None)
        raise bad_request(f"{explain(error, kind, most=1)[0]}.", param) from None


class Answered(Response):
    """JSON."""

    media_type = "application/json"

    def __init__(self, content: Any, status_code: int = 200, headers: dict[str, str] | None = None) -> None:
        super().__init__(orjson.dumps(content), status_code, headers)


class EventStream(Response):
    """An answer as server-sent events. Its headers go out with the first of them, so that what goes wrong before it has
    a status of its own."""

    media_type = "text/event-stream"

    def __init__(self, endpoint: Endpoint, served: Served) -> None:
        super().__init__(None, 200)
        del self.headers["content-length"]
        self._endpoint, self._served = endpoint, served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def write(data: bytes) -> None:
            nonlocal started
            if not started:
                started = True
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": data, "more_body": True})

        try:
            await while_connected(receive, self._endpoint.stream(self._served, write))
        except SlowClient:
            log.warning("request %s: its client takes nothing; the connection is closed", self._served.id)
            return  # without an end, so that the server closes the connection
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class ClientGone(Exception):
    """There is nobody to answer any more."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do `work`, and cancel it when the client leaves. Raises ClientGone."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    watcher, worker = asyncio.create_task(gone()), asyncio.create_task(work)
    try:
        await asyncio.wait({watcher, worker}, return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        raise ClientGone
    finally:
        for task in (watcher, worker):
            task.cancel()
        await asyncio.gather(watcher, worker, return_exceptions=True)


# ------------------------------------------------------------------------------------------------------------- errors


async def _told_by_framework(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    texts = {
        404: f"There is no {request.url.path}; the routes are in /openapi.json.",
        405: f"{request.url.path} does not take {request.method}.",
    }
    told = ApiError(error.status_code, texts.get(error.status_code, str(error.detail)))
    return Answered(told.body, told.status, {**(error.headers or {}), **told.headers})


async def _told_of_parameters(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    told = bad_request(f"{where}: {first['msg']}.", str(first["loc"][-1]))
    return Answered(told.body, told.status)


class Gate:
    """What holds for every request: an id, a bound for its body, who may connect at all, a count of how it ended, and
    an answer of the right shape whatever goes wrong."""

    def __init__(self, app: ASGIApp, endpoint: Endpoint, echo_ids: bool) -> None:
        self._app, self._endpoint, self._echo_ids = app, endpoint, echo_ids
        self._most = endpoint.config.bounds.body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        own = uuid.uuid4().hex  # what a client calls its request need not be unique
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        id = given if _REQUEST_ID.match(given) else own
        state = scope.setdefault("state", {})
        state.update(id=own, arrived=time.monotonic(), tenant="")
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                echoed = [(b"x-request-id", id.encode())] if self._echo_ids else []
                message["headers"] = [*message["headers"], *_HEADERS, *echoed]
            await send(message)

        try:
            self._check(scope, headers)
            await self._app(scope, self._bounded(receive), answer)
        except ClientGone:
            pass
        except ApiError as error:
            await Answered(error.body, error.status, error.headers)(scope, receive, answer)
        except FtrayError as error:
            log.error("request %s: %s", id, error)
            await self._fail(scope, receive, answer, status)
        except Exception:
            log.exception("request %s", id)
            await self._fail(scope, receive, answer, status)
        finally:
            self._count(scope, state, status)

    async def _fail(self, scope: Scope, receive: Receive, answer: Callable[..., Awaitable[None]], status: int) -> None:
        if not status:  # else the connection is closed without an end
            error = ApiError(500, "Something went wrong here; the log has more under the request's id.")
            await Answered(error.body, 500)(scope, receive, answer)

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        if self._endpoint.tenants is None:
            if not (is_loopback(scope) and _names_loopback(headers)):
                raise ApiError(403, "Without keys this endpoint answers its own machine alone.", code="loopback_only")
            if _is_foreign(scope, headers):
                text = "Without keys this endpoint answers no pages from elsewhere."
                raise ApiError(403, text, code="foreign_origin")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._most:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(413, f"The body is larger than {self._most:,} bytes.", code="request_too_large")

    def _bounded(self, receive: Receive) -> Receive:
        size = 0

        async def bounded() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._most:
                raise self._too_large()
            return message

        return bounded

    def _count(self, scope: Scope, state: dict[str, Any], status: int) -> None:
        route = getattr(scope.get("route"), "path", "")
        self._endpoint.metrics.requests.labels(state["tenant"], route, str(status or 499)).inc()


_PASSED_ON = (b"forwarded", b"via", b"x-forwarded-for", b"x-forwarded-host", b"x-real-ip")


def is_loopback(scope: Scope) -> bool:
    """Whether the request comes from this machine. One that a proxy passed on does not count, if the proxy says so."""
    client = scope.get("client")
    if not client or any(name in _PASSED_ON for name, _ in scope["headers"]):
        return False
    try:
        return ipaddress.ip_address(client[0]).is_loopback
    except ValueError:
        return False


def _names_loopback(headers: dict[bytes, bytes]) -> bool:
    """Whether the client thinks so too: a page from elsewhere that got a name for this address does not."""
    host = headers.get(b"host", b"").decode("latin-1").lower()
    name = host[: host.rfind(":")] if re.search(r":\d+$", host) else host
    return name in ("localhost", "127.0.0.1", "[::1]")


def _is_foreign(scope: Scope, headers: dict[bytes, bytes]) -> bool:
    """Whether a browser asks for a page from elsewhere, be it another port of this machine. Who follows a link from
    there to our own page may."""
    origin, site = headers.get(b"origin"), headers.get(b"sec-fetch-site")
    if origin is not None:
        return origin.lower().partition(b"://")[2] != headers.get(b"host", b"").lower()
    follows = scope["method"] == "GET" and headers.get(b"sec-fetch-mode") == b"navigate"
    return site in (b"cross-site", b"same-site") and not follows


# -------------------------------------------------------------------------------------------------------- description

_REFUSALS: dict[int | str, dict[str, Any]] = {
    "4XX": {
        "description": "Refused, in OpenAI's shape.",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    },
}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer, or its stream.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    },
    **_REFUSALS,
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def _takes(kind: type[BaseModel]) -> dict[str, Any]:
    reference = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def _description(api: FastAPI) -> dict[str, Any]:
    """OpenAPI's, with the bodies that are read by hand."""
    if api.openapi_schema is None:
        found = get_openapi(title=api.title, version=api.version, description=api.description, routes=api.routes)
        schemas = found.setdefault("components", {}).setdefault("schemas", {})
        for kind in (ChatRequest, CompletionRequest):
            schema = kind.model_json_schema(ref_template="#/components/schemas/{model}", by_alias=True)
            schemas.update(schema.pop("$defs", {}))
            schemas[kind.__name__] = schema
        schemas["Error"] = _ERROR
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        for path in found["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}, {}]
        api.openapi_schema = found
    return api.openapi_schema
