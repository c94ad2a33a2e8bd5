"""Names of adapters, and of one version of one."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ftray.errors import ConfigError

DEFAULT_TENANT = "default"
"""Whose a name without a tenant is."""
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PREFIX = re.compile(r"[0-9a-f]{6,64}")


@dataclass(frozen=True, slots=True)
class Ref:
    """`TENANT/NAME@DIGEST`: names lead to it, everything downstream is keyed by `digest` alone."""

    tenant: str
    name: str
    digest: str
    """SHA-256 of the artefact's `ftray.json`, which holds those of its other files; in hexadecimal."""

    def __str__(self) -> str:
        return f"{self.tenant}/{self.name}@{self.digest[:12]}"


def is_name(text: str) -> bool:
    """Whether `text` can be the name of a tenant or of an adapter, and so of a folder."""
    return _NAME.fullmatch(text) is not None and ".." not in text


def is_digest(text: str) -> bool:
    return _DIGEST.fullmatch(text) is not None


def check_name(text: str, what: str = "name") -> str:
    """`text`. Raises ConfigError unless `is_name`."""
    if not is_name(text):
        shown = text if len(text) < 80 else f"{text[:77]}…"
        raise ConfigError(
            f"{shown!r} is no {what}",
            hint="up to 64 of a-z, 0-9, '.', '_', '-', the first a letter or digit, and no '..'",
        )
    return text


def parse_name(text: str) -> tuple[str, str, str | None]:
    """(tenant, name, digest or None) of `[TENANT/]NAME[@DIGEST]`; a digest may be cut to its first 6 characters or
    more. Raises ConfigError."""
    whole, at, digest = text.partition("@")
    tenant, slash, name = whole.rpartition("/")
    if at and not _PREFIX.fullmatch(digest):
        raise ConfigError(f"{digest[:80]!r} is no version", where=text[:200], hint="6 to 64 hexadecimal digits")
    return check_name(tenant if slash else DEFAULT_TENANT, "tenant"), check_name(name), digest or None
