"""The full check of an adapter: nothing of it is used before all of this holds.

The publisher runs it before a name points to the adapter, and every server again on its own copy. It goes from what is
small to what is large: names and sizes of files, `ftray.json`, base and template, checksums, configuration, the header
of the tensors, their values. Weights are never held in memory as a whole. No torch.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from ftray.config.methods import LOW_RANK, DoRA, QDoRA
from ftray.config.strict import Strict
from ftray.errors import ArtefactError
from ftray.manifest import sha256
from ftray.model.adapter_config import (
    AdaLoraSettings,
    BottleneckSettings,
    LoraSettings,
    Settings,
    VeraSettings,
    VirtualTokens,
    read_settings,
)
from ftray.model.expected import tensors_of
from ftray.registry.base import BaseFacts
from ftray.registry.facts import (
    ALLOWED,
    CONFIG,
    FACTS,
    NEEDED,
    WEIGHTS,
    Facts,
    digest_of_facts,
    only_these,
    parse_facts,
    strict_json,
)
from ftray.registry.tensors import check_finite, check_shapes, read_header


class Limits(Strict):
    """What an adapter may have at most."""

    adapter_bytes: int = Field(4 << 30, ge=1)
    """All files together."""
    text_bytes: int = Field(4 << 20, ge=1)
    """Each of `ftray.json`, `adapter_config.json` and the card."""
    header_bytes: int = Field(8 << 20, ge=1)
    """Header of the safetensors file: about 150 bytes a tensor."""
    rank: int = Field(512, ge=1)
    """Of LoRA, DoRA and AdaLoRA; width of bottleneck layers."""
    vera_rank: int = Field(8192, ge=1)
    """Of VeRA's shared matrices."""
    virtual_tokens: int = Field(1024, ge=1)
    """Of prefix, prompt and p-tuning."""


@dataclass(frozen=True)
class Checked:
    """An adapter that passed."""

    digest: str
    facts: Facts
    settings: Settings
    size: int
    """Bytes of all files."""


def check(
    folder: str | os.PathLike[str],
    base: BaseFacts,
    limits: Limits | None = None,
    *,
    digest: str | None = None,
    where: str | None = None,
) -> Checked:
    """Check the adapter in a local folder against the base that shall serve it. `digest` is what its name says that it
    is; `where` is what errors call the folder. Raises ArtefactError with the first thing that is wrong."""
    limits, root, where = limits or Limits(), Path(folder), where or os.fspath(folder)
    sizes = plain_files(root, where)
    refuse_files(sizes, limits, where)
    content = (root / FACTS).read_bytes()
    facts = parse_facts(content, f"{where}/{FACTS}")
    found = digest_of_facts(content)
    if digest is not None and found != digest:
        raise ArtefactError(f"its digest is {found[:12]}…, not {digest[:12]}…", where=where)
    _agrees_with_list(sizes, facts, where)
    fits_base(facts, base, where)
    for name, file in facts.files.items():
        if sha256(root / name) != file.sha256:
            raise ArtefactError(f"{name} has other content than {FACTS} says (SHA-256 differs)", where=where)
    settings = read_settings(strict_json((root / CONFIG).read_bytes(), f"{where}/{CONFIG}"), f"{where}/{CONFIG}")
    _is_of_method(settings, facts, where)
    _within(settings, limits, where)
    expected = tensors_of(settings, base.shapes)
    header = read_header(root / WEIGHTS, limits.header_bytes, f"{where}/{WEIGHTS}")
    check_shapes(header, expected, f"{where}/{WEIGHTS}")
    check_finite(root / WEIGHTS, header, f"{where}/{WEIGHTS}")
    return Checked(found, facts, settings, sum(sizes.values()))


def plain_files(root: Path, where: str) -> dict[str, int]:
    """{name: bytes} of a local folder's files. Raises ArtefactError for anything but plain files; follows no link."""
    sizes = {}
    try:
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        raise ArtefactError("no such folder", where=where) from None
    for entry in entries:
        status = entry.stat(follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode):
            what = f"{entry.name[:200]!r} is {_kind(status.st_mode)}, not a plain file"
            raise ArtefactError(what, where=where, hint=only_these())
        sizes[entry.name] = status.st_size
    return sizes


def _kind(mode: int) -> str:
    return "a link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else "a device"


def refuse_files(sizes: dict[str, int], limits: Limits, where: str) -> None:
    """Raises ArtefactError unless the names are those of an adapter and the sizes within the limits."""
    if odd := sorted(sizes.keys() - {*ALLOWED, FACTS}):
        raise ArtefactError(f"{odd[0][:200]!r} is no file of an adapter", where=where, hint=only_these())
    if missing := [name for name in (*NEEDED, FACTS) if name not in sizes]:
        raise ArtefactError(f"{missing[0]} is missing", where=where)
    for name, size in sizes.items():
        if name != WEIGHTS and size > limits.text_bytes:
            raise ArtefactError(f"{name} has {size:,} bytes; {_limit('text_bytes', limits)}", where=where)
    if sum(sizes.values()) > limits.adapter_bytes:
        raise ArtefactError(f"{sum(sizes.values()):,} bytes; {_limit('adapter_bytes', limits)}", where=where)


def _limit(name: str, limits: Limits) -> str:
    return f"the limit {name} is {getattr(limits, name):,}"


def _agrees_with_list(sizes: dict[str, int], facts: Facts, where: str) -> None:
    there = sizes.keys() - {FACTS}
    if odd := sorted(there ^ facts.files.keys()):
        how = "is not listed in" if odd[0] in there else "is listed, and not there, in"
        raise ArtefactError(f"{odd[0]} {how} {FACTS}", where=where)
    for name, file in facts.files.items():
        if sizes[name] != file.size:
            raise ArtefactError(f"{name} has {sizes[name]:,} bytes, {FACTS} says {file.size:,}", where=where)


def fits_base(facts: Facts, base: BaseFacts, where: str) -> None:
    """Raises ArtefactError unless the adapter was trained on this base, with this chat template."""
    if base.digest is not None and facts.base.sha256 != base.digest:
        raise ArtefactError(
            f"trained on another base: {facts.base.path} (SHA-256 {facts.base.sha256[:12]}…), and this one is"
            f" {base.path} ({base.digest[:12]}…)",
            where=where,
            hint="an adapter serves the very base that it was trained on; train it anew, or serve that base",
        )
    if base.chat_template is not None and (facts.chat_template_sha256 or "") != base.chat_template:
        raise ArtefactError(
            f"trained with {_template(facts.chat_template_sha256)}, and prompts here are rendered with"
            f" {_template(base.chat_template)}",
            where=where,
            hint="set the same chat template for the run (data.chat_template) and for the server",
        )


def _template(digest: str | None) -> str:
    return f"the chat template of SHA-256 {digest[:12]}…" if digest else "no chat template"


_PEFT_TYPES = {
    "adalora": "ADALORA",
    "vera": "VERA",
    "ia3": "IA3",
    "prefix": "PREFIX_TUNING",
    "prompt": "PROMPT_TUNING",
    "p_tuning": "P_TUNING",
    "bottleneck": "FTRAY_BOTTLENECK",
}


def _is_of_method(settings: Settings, facts: Facts, where: str) -> None:
    method = facts.method
    if isinstance(method, LOW_RANK):
        dora = isinstance(method, DoRA | QDoRA)
        same = isinstance(settings, LoraSettings) and settings.use_dora == dora
    else:
        same = _PEFT_TYPES.get(method.name) == settings.peft_type
    if not same:
        raise ArtefactError(f"{FACTS} says method {method.name}, {CONFIG} says {settings.peft_type}", where=where)


def _within(settings: Settings, limits: Limits, where: str) -> None:
    if isinstance(settings, LoraSettings):
        name, widest = "rank", max([settings.r, *settings.rank_pattern.values()])
    elif isinstance(settings, AdaLoraSettings):
        name, widest = "rank", settings.init_r
    elif isinstance(settings, BottleneckSettings):
        name, widest = "rank", settings.size
    elif isinstance(settings, VeraSettings):
        name, widest = "vera_rank", settings.r
    elif isinstance(settings, VirtualTokens):
        name, widest = "virtual_tokens", settings.num_virtual_tokens
    else:
        return
    if widest > getattr(limits, name):
        raise ArtefactError(f"{widest:,}; {_limit(name, limits)}", where=f"{where}/{CONFIG}")
