"""What a client is told when a request cannot be answered: OpenAI's shape, with a status, a code and what to change."""

from __future__ import annotations

import math
from typing import Any

from ftray.errors import FtrayError


class ApiError(Exception):
    """One answer of `{"error": {"message", "type", "param", "code"}}`. Survives pickling."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
        may_retry: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after, self.may_retry = retry_after, may_retry

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        found = {}
        if self.retry_after is not None:
            found["retry-after"] = str(max(1, math.ceil(self.retry_after)))
        if self.may_retry is not None:
            found["x-should-retry"] = "true" if self.may_retry else "false"  # the openai package looks at it
        if self.status == 401:
            found["www-authenticate"] = "Bearer"
        return found

    def __reduce__(self):
        return _rebuild, (self.status, self.message, self.code, self.param, self.retry_after, self.may_retry)


def _rebuild(status, message, code, param, retry_after, may_retry) -> ApiError:
    return ApiError(status, message, code=code, param=param, retry_after=retry_after, may_retry=may_retry)


_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def model_not_found(name: str) -> ApiError:
    """One and the same for a model that is not there and for one of another tenant."""
    return ApiError(404, f"The model {name!r} does not exist or is not yours.", param="model", code="model_not_found")


def overloaded(retry_after: float) -> ApiError:
    message = "The endpoint has as many requests as it takes; try again shortly."
    return ApiError(429, message, code="overloaded", retry_after=retry_after)


def replica_lost() -> ApiError:
    return ApiError(
        503, "The process that was answering ended; send the request again.", code="replica_lost", retry_after=1
    )


def of_engine(error: FtrayError | None) -> ApiError:
    """What a client is told of an error that ended its request in the engine."""
    from ftray.errors import ArtefactError, UserError

    if isinstance(error, ArtefactError):  # why is for the log: it may name files of the server
        message = "This adapter cannot be used; the endpoint's log says why."
        return ApiError(500, message, code="adapter_unusable", may_retry=False)
    if isinstance(error, UserError):
        what = f"{error.where}: {error.what}" if error.where else error.what
        return bad_request(f"{what}; {error.hint}" if error.hint else what)
    return ApiError(500, "The engine could not go on with this request.", code="engine_error")
