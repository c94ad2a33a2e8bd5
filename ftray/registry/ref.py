"""The name of one version of an adapter."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ref:
    """`TENANT/NAME@DIGEST`: names lead to it, everything downstream is keyed by `digest` alone."""

    tenant: str
    name: str
    digest: str
    """SHA-256 over the artefact's files, in hexadecimal."""

    def __str__(self) -> str:
        return f"{self.tenant}/{self.name}@{self.digest[:12]}"
