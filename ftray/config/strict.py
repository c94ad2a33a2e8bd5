"""What every section of a run file is: strict, frozen, documented key by key."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


def by_name(value: Any) -> Any:
    """The short form of a section that is chosen by name: `cosine` for `{name: cosine}`."""
    return {"name": value} if isinstance(value, str) else value
