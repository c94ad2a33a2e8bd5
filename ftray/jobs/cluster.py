"""A cluster's job server, asked through Ray's own client, with answers that arrive or fail within a bounded time.

    cluster = Cluster.open("http://head:8265", token_file)

Ray is imported when a cluster is opened.
"""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from ftray.errors import FtrayError, RunError, UserError
from ftray.redact import redact
from ftray.session import quiet_ray

DASHBOARD_PORT = 8265
_CONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 60.0
"""An answer that takes longer is taken for a lost connection; an upload of 100 MiB fits."""

_SILENT = "the job server does not answer: "

Status = Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]


class ConnectionLost(RunError):
    """The job server did not answer; it may answer later."""


class UnknownJob(UserError):
    """The cluster has no such job."""


@dataclass(frozen=True)
class Job:
    id: str
    status: Status
    entrypoint: str = ""
    message: str = ""
    exit_code: int | None = None
    """Of the command; negative: the signal that ended it. None while it runs, and if it was stopped or never began."""
    started: float | None = None
    """Seconds since 1970."""
    ended: float | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        return self.status in ("STOPPED", "SUCCEEDED", "FAILED")


def address_of(given: str | None, environment: Mapping[str, str]) -> str:
    """The job server's URL: what was given, else RAY_API_SERVER_ADDRESS, else RAY_ADDRESS if it is a URL, else this
    machine's. A host alone gets Ray's port. Raises UserError for what is no HTTP address."""
    address = given or environment.get("RAY_API_SERVER_ADDRESS")
    of_the_driver = environment.get("RAY_ADDRESS", "")
    if not address and of_the_driver.startswith(("http://", "https://")):
        address = of_the_driver
    address = address or f"http://127.0.0.1:{DASHBOARD_PORT}"
    if "://" not in address:
        address = f"http://{address}"
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            "the job server is asked over HTTP, and this is no such address",
            where=redact(address),
            hint=f"the dashboard's address: http://HEAD:{DASHBOARD_PORT}",
        )
    address = address.rstrip("/")
    return address if parts.port or parts.scheme == "https" or parts.path.strip("/") else f"{address}:{DASHBOARD_PORT}"


def use_token(file: str | None, environment: dict[str, str] | os._Environ[str]) -> None:
    """Let Ray's client show a token: that of `file`, else as RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token
    have it. To be called before Ray is imported. Raises UserError for a file without a token."""
    path = file or environment.get("RAY_AUTH_TOKEN_PATH")
    if file:
        environment.pop("RAY_AUTH_TOKEN", None)  # it would be preferred
        environment["RAY_AUTH_TOKEN_PATH"] = os.path.abspath(os.path.expanduser(file))
    has_default = os.path.isfile(os.path.expanduser("~/.ray/auth_token"))
    if environment.get("RAY_AUTH_TOKEN") or path or has_default:
        environment["RAY_AUTH_MODE"] = "token" if file else environment.get("RAY_AUTH_MODE", "token")
    if environment.get("RAY_AUTH_MODE") != "token" or environment.get("RAY_AUTH_TOKEN") or not path:
        return
    where = "--token-file" if file else "RAY_AUTH_TOKEN_PATH"
    try:
        with open(os.path.expanduser(path), encoding="utf-8") as opened:
            token = opened.read().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the token cannot be read: {error}", where=where) from None
    if not token:
        raise UserError(f"{path} is empty: a token is one line of text", where=where)


class Cluster:
    """The job server at an address. Every method raises ConnectionLost when it does not answer, UnknownJob for a job
    that it does not know, UserError when it refuses the token."""

    def __init__(self, client: Any, address: str) -> None:
        self._client, self.address = client, address

    @classmethod
    def open(cls, given: str | None, token_file: str | None = None) -> Cluster:
        """Raises UserError when nothing answers there, or refuses the token."""
        address = address_of(given, os.environ)
        use_token(token_file, os.environ)
        _knock(address)
        quiet_ray()
        os.environ["RAY_API_SERVER_ADDRESS"] = address  # RAY_ADDRESS would win over the argument
        try:
            with _told(address):
                return cls(_client(address), address)
        except ConnectionLost as lost:
            raise _nobody(address, lost.what.removeprefix(_SILENT)) from None

    def submit(self, entrypoint: str, job: str, **options: Any) -> None:
        """Start a job. `options` are those of `JobSubmissionClient.submit_job`; a local `working_dir` is uploaded."""
        with _told(self.address, job):
            self._client.submit_job(entrypoint=entrypoint, submission_id=job, **options)

    def job(self, job: str) -> Job:
        with _told(self.address, job):
            return _job(self._client.get_job_info(job))

    def jobs(self) -> list[Job]:
        """Submitted jobs, the newest first. Drivers that connected by themselves are not among them."""
        with _told(self.address):
            found = [_job(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(found, key=lambda job: job.started or 0, reverse=True)

    def stop(self, job: str) -> bool:
        """Ask a job to end: SIGTERM, and SIGKILL when it takes longer than it may. False: it was over."""
        with _told(self.address, job):
            return self._client.stop_job(job)

    def logs(self, job: str) -> str:
        with _told(self.address, job):
            return self._client.get_job_logs(job)

    def tail(self, job: str) -> AsyncIterator[str]:
        """The log from its beginning, as it grows; ends with the job, or when the connection is lost."""
        return self._client.tail_job_logs(job)


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        """Ray's client waits for an answer without a limit."""

        def _do_request(self, *arguments: Any, **options: Any) -> Any:
            return super()._do_request(*arguments, **({"timeout": (_CONNECT_SECONDS, _ANSWER_SECONDS)} | options))

    return Client(address)


def _job(details: Any) -> Job:
    def seconds(milliseconds: int | None) -> float | None:
        return milliseconds / 1000 if milliseconds else None

    return Job(
        id=details.submission_id,
        status=str(details.status),  # type: ignore[arg-type]
        entrypoint=details.entrypoint or "",
        message=details.message or "",
        exit_code=details.driver_exit_code,
        started=seconds(details.start_time),
        ended=seconds(details.end_time),
        metadata=details.metadata or {},
    )


# -------------------------------------------------------------------------------------------------------------- errors


def _knock(address: str) -> None:
    """Raises UserError when nothing listens there. Ray's client would wait for minutes for a host that is silent."""
    parts = urlsplit(address)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        why = "no answer within 5 s" if isinstance(error, TimeoutError) else error.strerror or str(error)
        raise _nobody(address, why) from None


def _nobody(address: str, why: str) -> UserError:
    return UserError(
        f"no Ray job server answers here: {why}",
        where=redact(address),
        hint="--address takes the dashboard's, http://HEAD:8265 unless it was set otherwise (6379 is another port);\n"
        "    from outside: kubectl port-forward service/…-head-svc 8265, or ssh -L 8265:localhost:8265 HEAD",
    )


class _told:
    """Turns what Ray's client raises into errors that say what to do."""

    def __init__(self, address: str, job: str | None = None) -> None:
        self.address, self.job = redact(address), job

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if error is None or isinstance(error, FtrayError) or not isinstance(error, Exception):
            return
        raise self.told(error) from None

    def told(self, error: Exception) -> FtrayError:
        import requests
        from ray.exceptions import AuthenticationError

        text = " ".join(str(error).split())
        if isinstance(error, AuthenticationError):
            return _refused(self.address, "Authentication required" in text)
        if isinstance(error, requests.exceptions.RequestException | ConnectionError | OSError):
            timed_out = isinstance(error, requests.exceptions.Timeout | TimeoutError)
            why = f"not within {_ANSWER_SECONDS:.0f} s" if timed_out else text[:200]
            return ConnectionLost(_SILENT + why, where=self.address)
        if "status code 404" in text or "does not exist" in text:
            return UnknownJob(
                f"the cluster knows no job {self.job}",
                where=self.address,
                hint="a head that was started anew forgets its jobs; the same command goes on from the last commit",
            )
        if isinstance(error, RuntimeError | ValueError):
            if "status code 5" in text and "already submitted" not in text:
                return ConnectionLost(f"the job server is in trouble: {text[:300]}", where=self.address)
            return UserError(f"the job server refused: {text[:500]}", where=self.address)
        raise error


def _refused(address: str, without: bool) -> UserError:
    if without:
        what = "the cluster asks for a token, and none was given"
    else:
        what = "the cluster refused the token: it has another one"
    return UserError(
        what,
        where=address,
        hint="--token-file FILE, or RAY_AUTH_TOKEN_PATH, RAY_AUTH_TOKEN, ~/.ray/auth_token; the cluster's own is what"
        "\n    its head was started with (KubeRay: the Secret that it made for the RayCluster)",
    )
