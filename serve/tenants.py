"""Who may ask, for what, and how much: a YAML file or URI, read again when it changes.

    tenants:
      acme:
        keys:
        - sha256: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
          not_after: 2027-01-31T00:00:00Z      # of the old key while a new one is handed out
        - sha256: 60303ae22b998861bce3b28f33eec1be758a213c86c93c076dbe9f558c11c752
        adapters: [shared/cheese]              # beside its own, which it names without the tenant
        limits: {requests_per_minute: 600, tokens_per_minute: 100_000, concurrency: 8}

Of several ingresses each keeps an even share of the limits. A key has 256 random bits, so that one round of SHA-256
hides it; `ftray serve --new-key` makes one. A file that cannot be read or is wrong changes nothing: the last good one
stays, and the log and `/readyz` say so.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated

from pydantic import AwareDatetime, Field, ValidationError

from ftray.config.explain import explain
from ftray.config.reading import parse_yaml
from ftray.config.strict import Strict
from ftray.errors import ConfigError
from ftray.manifest import filesystem

from .config import Digest

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
PREFIX = "ftray-"


class Key(Strict):
    sha256: Digest
    """Of the key; the key itself stands nowhere."""
    not_after: AwareDatetime | None = None
    """From then on it is refused; a time with its zone. null: without end."""
    note: str = ""
    """Whose it is, for the reader of the file."""


class Limits(Strict):
    """Of one tenant; null: none."""

    requests_per_minute: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1)
    """Of prompts and answers together. Answers count as they end, so that one minute may run over and the next pays;
    those that were left or cut off with what was written by then."""
    concurrency: int | None = Field(None, ge=1)
    """Answers in the making at once."""


class Tenant(Strict):
    keys: list[Key] = Field(min_length=1)
    """Any of them opens."""
    adapters: list[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}/[a-z0-9][a-z0-9._-]{0,63}$")]] = []
    """TENANT/NAME of others' adapters that it may use too."""
    limits: Limits = Limits()


class TenantsFile(Strict):
    tenants: dict[Name, Tenant] = Field(min_length=1)


def new_key() -> tuple[str, str]:
    """(a key, its SHA-256)"""
    key = PREFIX + secrets.token_urlsafe(32)
    return key, hash_of(key)


def hash_of(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def parse_tenants(text: str, name: str, ingresses: int = 1) -> TenantsFile:
    """`ingresses` are those that share the limits. Raises ConfigError with every problem found."""
    try:
        file = TenantsFile.model_validate(parse_yaml(text, name))
    except ValidationError as error:
        raise ConfigError("\n  ".join(explain(error, TenantsFile)), where=name) from None
    seen: dict[str, str] = {}
    for tenant, value in file.tenants.items():
        for key in value.keys:
            if key.sha256 in seen:
                raise ConfigError(f"{seen[key.sha256]} and {tenant} have the same key {key.sha256[:12]}…", where=name)
            seen[key.sha256] = tenant
    if problems := [found for tenant, value in file.tenants.items() for found in _too_few(tenant, value, ingresses)]:
        raise ConfigError(
            "\n  ".join(problems), where=name, hint=f"at least {ingresses} each, or a smaller ingress.replicas"
        )
    return file


def _too_few(tenant: str, value: Tenant, ingresses: int) -> Iterator[str]:
    """Limits that cannot be divided: an ingress admits one answer and one request a minute, or none ever."""
    for key in ("concurrency", "requests_per_minute"):
        limit = getattr(value.limits, key)
        if limit is not None and limit < ingresses:
            yield f"tenants.{tenant}.limits.{key}: {limit} among {ingresses} ingresses (ingress.replicas)"


def read_tenants(uri: str, ingresses: int = 1) -> TenantsFile:
    """The tenants of a file or URI. Raises ConfigError."""
    return parse_tenants(_read(uri), uri, ingresses)


def _read(uri: str) -> str:
    fs, path = filesystem(uri)
    try:
        fs.invalidate_cache()
        with fs.open(path, "rb") as file:
            return file.read().decode("utf-8")
    except FileNotFoundError:
        raise ConfigError("there is no such file of tenants", where=uri) from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"the tenants cannot be read: {error}", where=uri) from None


class Keyring:
    """The keys of one file, ready to be compared."""

    def __init__(self, file: TenantsFile) -> None:
        self.file = file
        self._keys = [(key.sha256.encode(), key.not_after, name) for name, t in file.tenants.items() for key in t.keys]

    def tenant_of(self, key: str, now: datetime) -> str | None:
        """Whose key it is. Every comparison is made, each in constant time."""
        asked, found = hash_of(key).encode(), None
        for known, not_after, tenant in self._keys:
            same = hmac.compare_digest(asked, known)
            if same and (not_after is None or now < not_after):
                found = tenant
        return found


@dataclass
class TenantsStatus:
    """What the log and `/readyz` say of the file."""

    error: str | None = None
    read_at: float = 0.0


class Tenants:
    """The tenants of a file or URI, as of its last good version. Safe to use from any thread.

    Raises ConfigError when the first reading fails: an endpoint does not start without its keys.
    """

    def __init__(self, uri: str, every: float, ingresses: int = 1) -> None:
        self.uri, self._every, self._ingresses = uri, every, ingresses
        self.status = TenantsStatus()
        self._lock = threading.Lock()
        text = _read(uri)
        self._seen = hashlib.sha256(text.encode()).digest()
        self.ring = Keyring(parse_tenants(text, uri, ingresses))
        self._next = time.monotonic() + every

    @property
    def is_due(self) -> bool:
        return time.monotonic() >= self._next

    def refresh(self) -> str | None:
        """Look at the file again if it is time; returns what there is to say about it, once. Reads, so it blocks."""
        if not self._lock.acquire(blocking=False):
            return None  # somebody looks; at a store that stands still it may take long
        try:
            return self._look() if self.is_due else None
        finally:
            self._lock.release()

    def _look(self) -> str | None:
        self._next = time.monotonic() + self._every
        try:
            text = _read(self.uri)
            seen = hashlib.sha256(text.encode()).digest()
            if seen == self._seen:
                told, self.status.error = self.status.error, None
                return f"{self.uri} can be read again" if told else None
            ring = Keyring(parse_tenants(text, self.uri, self._ingresses))
        except ConfigError as error:
            told, self.status.error = self.status.error, str(error)
            return f"the last good tenants stay: {error}" if told != str(error) else None
        self.ring, self._seen, self.status.error = ring, seen, None
        self.status.read_at = time.time()
        return f"{self.uri} was read again: {len(ring.file.tenants)} tenants"

    def tenant_of(self, key: str) -> str | None:
        return self.ring.tenant_of(key, datetime.now(UTC))

    def get(self, name: str) -> Tenant | None:
        return self.ring.file.tenants.get(name)
