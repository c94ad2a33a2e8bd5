"""What a store may answer, in our words. No torch, no Ray.

Calls are tried again by the drivers themselves, a few times with growing pauses: botocore and s3fs on throttling, 5xx
answers, time-outs and broken connections (AWS_MAX_ATTEMPTS, AWS_RETRY_MODE), gcsfs and adlfs alike. What comes out of
a driver has lasted for a while, or will not pass by itself; `reached` says which.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ftray.errors import ConfigError, FtrayError, RunError
from ftray.redact import redact

_ON = "the same command goes on from the last commit"
_FULL = re.compile(r"StorageFull|QuotaExceeded|InsufficientStorage|Insufficient Storage|\(507\)|No space left", re.I)
_NO_BUCKET = re.compile(r"NoSuchBucket|bucket does not exist", re.I)
_NO_ANSWER = (ConnectionError, TimeoutError)
_NO_ANSWER_NAMES = {
    "HTTPClientError",  # botocore's: it names time-outs, refused and broken connections, and unknown hosts below it
    "ClientConnectorError",
    "FSTimeoutError",
    "ServerDisconnectedError",
}
_NO_CREDENTIALS_NAMES = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "TokenRetrievalError",
}
_FOR_A_WHILE = re.compile(
    r"SlowDown|reduce your request rate|ServiceUnavailable|InternalError|\(50[0234]\)|Throttl", re.I
)
_FOR_A_WHILE_NUMBERS = {errno.EIO, errno.EBUSY, errno.EAGAIN, errno.ETIMEDOUT, errno.ESTALE, errno.ENETDOWN}
_DRIVERS = {"fsspec", "s3fs", "botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "adlfs", "azure", "safetensors"}
"""Modules whose errors tell of stores, or of disks."""
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "r2"}


class StoreSilent(RunError):
    """A store that did not answer, though its driver asked again: later it may."""


@contextmanager
def reached(where: str | Path, *, lasting: bool = False) -> Iterator[None]:
    """Errors of the store that `where` (a path or URI) lies on, in our words: RunError, StoreSilent where it may pass
    by itself, ConfigError where its driver is not installed. Others go through, FileNotFoundError among them; with
    `lasting`, around what does more than use the store, also what may pass."""
    try:
        yield
    except FtrayError:
        raise
    except Exception as error:  # drivers raise errors of their own libraries
        told = explained(error, where)
        if told is None or (lasting and isinstance(told, StoreSilent)):
            raise
        for note in getattr(error, "__notes__", ()):
            told.add_note(note)
        raise told from error


def explained(error: BaseException, where: str | Path | None = None) -> FtrayError | None:
    """What an error of a disk or a store means and what to change; None where it is none of these."""
    place = redact(os.fspath(where)) if where is not None else None
    chain = [e for e in _chain(error) if _of_a_store(e)]
    if isinstance(error, FtrayError) or not _of_a_store(error):
        return None
    name = next((e.filename for e in chain if isinstance(e, OSError) and isinstance(e.filename, str)), None)
    place = place or name
    text = _shortened(error)
    if any(_is(e, {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}) or _says(e, _FULL) for e in chain):
        beside = f" (while writing {redact(name)})" if name and name != place else ""
        return RunError(
            f"no space is left{beside}: {text}", where=place, hint=f"make room, or raise the quota; then {_ON}"
        )
    if any(isinstance(e, PermissionError) or _is(e, {errno.EROFS}) for e in chain):
        return RunError(
            f"no permission: {text}",
            where=place,
            hint="this user, or on an object store these credentials, must be allowed to list, read, write and delete"
            f" there; then {_ON}",
        )
    if _named(chain, _NO_CREDENTIALS_NAMES):
        return RunError(
            f"no credentials were found: {text}",
            where=place,
            hint="every machine of the run needs them, from its role, its profile (AWS_PROFILE) or its environment"
            " (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)",
        )
    if any(_NO_BUCKET.search(str(e)) for e in chain):
        hint = "create it, or write another `output`; with a server of your own check AWS_ENDPOINT_URL"
        return RunError("there is no such bucket", where=place, hint=hint)
    if any(isinstance(e, ImportError) for e in chain) and place and "://" in place:
        return ConfigError(f"nothing here can reach such a store: {text}", where=place, hint=_install(place))
    if any(isinstance(e, _NO_ANSWER) for e in chain) or _named(chain, _NO_ANSWER_NAMES):
        return StoreSilent(
            f"the store does not answer: {text}",
            where=place,
            hint=f"check the network and AWS_ENDPOINT_URL, or your store's like; {_ON}",
        )
    if any(_is(e, _FOR_A_WHILE_NUMBERS) or _says(e, _FOR_A_WHILE) for e in chain):
        return StoreSilent(f"the store failed again and again: {text}", where=place, hint=f"later {_ON}")
    return None


def make_folder(fs: Any, path: str) -> None:
    """A folder and those above it, where the store has folders. An object store has none: a driver that is asked for
    one makes the bucket, and a misspelled bucket would be made in silence."""
    protocols = fs.protocol if isinstance(fs.protocol, tuple | list) else (fs.protocol,)
    if not _OBJECT_STORES.intersection(protocols):
        fs.makedirs(path, exist_ok=True)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from."""
    at: BaseException | None = error
    while at is not None:
        yield at
        at = at.__cause__ or at.__context__


def _of_a_store(error: BaseException) -> bool:
    return isinstance(error, OSError | ImportError) or type(error).__module__.split(".")[0] in _DRIVERS


def _says(error: BaseException, pattern: re.Pattern[str]) -> bool:
    """Of a file that is not there only the name is said, which may hold anything."""
    return not isinstance(error, FileNotFoundError) and pattern.search(str(error)) is not None


def _is(error: BaseException, numbers: set[int]) -> bool:
    return isinstance(error, OSError) and error.errno in numbers


def _named(chain: list[BaseException], names: set[str]) -> bool:
    """Whether one of the errors is of a class of these names: the drivers' libraries are not imported for it."""
    return any(kind.__name__ in names for error in chain for kind in type(error).__mro__)


def _shortened(error: BaseException) -> str:
    return redact(" ".join(str(error).split())[:300]) or type(error).__name__


def _install(place: str) -> str:
    extra = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}.get(place.split("://")[0])
    return f"pip install 'ftray[{extra}]'" if extra else "install the fsspec driver of this scheme"
