"""`ftray.json`, read strictly: what an artefact says of itself, and the size and SHA-256 of its other files."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from ftray.config import Method
from ftray.config.explain import explain
from ftray.config.strict import Strict
from ftray.errors import ArtefactError

FACTS = "ftray.json"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CARD = "README.md"
NEEDED = (CONFIG, WEIGHTS)
ALLOWED = (*NEEDED, CARD)
"""Files of an adapter beside `ftray.json`; there may be no other."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class File(Strict):
    size: int = Field(ge=0)
    """Bytes."""
    sha256: Sha256


class Origin(Strict):
    """The base that an adapter was trained on."""

    path: str = Field(max_length=4096)
    """As the run called it."""
    revision: str | None = Field(max_length=256)
    sha256: Sha256
    """Of `ftray.model.load.base_digest`."""


class Facts(Strict):
    """An adapter's `ftray.json`. Unknown keys are refused."""

    model_config = ConfigDict(strict=True)

    format: Literal[1]
    ftray: str = Field(max_length=64)
    """Version of ftray that wrote it."""
    kind: Literal["adapter"]
    base: Origin
    method: Method
    chat_template_sha256: Sha256 | None
    """None: the base has no chat template, and none was used."""
    tokenizer_sha256: Sha256 | None
    data_sha256: Sha256 | None
    run: dict[str, Any] | None
    """The resolved run file; None for adapters combined of several."""
    step: int | None
    metrics: dict[str, float | int | None]
    origins: list[dict[str, Any]] = []
    """What an exported one was made of."""
    combination: dict[str, Any] | None = None
    files: dict[str, File]

    @property
    def size(self) -> int:
        """Bytes of all files that it lists."""
        return sum(file.size for file in self.files.values())


def digest_of_facts(content: bytes) -> str:
    """The artefact's digest: SHA-256 of the bytes of its `ftray.json`, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def parse_facts(content: bytes, where: str) -> Facts:
    """Raises ArtefactError, also where the listed files are not those of an adapter."""
    value = strict_json(content, where)
    if value.get("kind") == "model":
        raise ArtefactError(
            "this is a whole model, and a registry holds adapters",
            where=where,
            hint="serve it as a base; methods full and freeze, and merges, leave whole models",
        )
    try:
        facts = Facts.model_validate(value)
    except ValidationError as error:
        raise ArtefactError("\n  ".join(explain(error, Facts)[:8]), where=where) from None
    if odd := sorted(facts.files.keys() - set(ALLOWED)):
        raise ArtefactError(f"files: {odd[0][:200]!r} is no file of an adapter", where=where, hint=only_these())
    if missing := sorted(set(NEEDED) - facts.files.keys()):
        raise ArtefactError(f"files: {missing[0]} is not listed", where=where)
    return facts


def only_these() -> str:
    """What an adapter consists of, as a hint."""
    return f"an adapter is {', '.join(ALLOWED)} and {FACTS}: no folder, no link, no pickle, nothing else"


def strict_json(content: bytes, where: str) -> dict[str, Any]:
    """One JSON object in UTF-8 that every parser reads alike: no key twice, no NaN. Raises ArtefactError."""
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ArtefactError(f"not valid JSON: {str(error)[:200]}", where=where) from None
    if not isinstance(value, dict):
        raise ArtefactError("it is one JSON object", where=where)
    return value


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key stands twice")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")
