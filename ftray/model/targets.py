"""Which layers a method is put on and which parameters it trains. No torch: works on paths.

The planner and the code that attaches a method both ask here, so that what `check` prints is what a run trains.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeVar

from ftray.config.methods import IA3, DoRA, Freeze, LoRA, QDoRA, QLoRA
from ftray.errors import ModelError

LowRank = LoRA | DoRA | QLoRA | QDoRA
_Value = TypeVar("_Value")

ATTENTION_PARTS = ("self_attn", "attn", "attention", "self_attention")
FEED_FORWARD_PARTS = ("mlp", "feed_forward", "ffn")
"""Names of the parts of a block, behind which bottleneck adapters stand."""
BOTTLENECK = "bottleneck_adapter"
"""Name of a bottleneck adapter inside its part."""


def select(targets: Literal["all-linear"] | Sequence[str], linears: Iterable[str]) -> list[str]:
    """Paths out of `linears` (every linear layer but the output head) that `targets` names, in their order.

    Raises ModelError when a name matches nothing; it lists what could match.
    """
    paths = list(linears)
    if targets == "all-linear":
        return paths
    for target in targets:
        if not any(ends_with(path, target) for path in paths):
            raise ModelError(
                f"{target!r} matches no linear layer of this base", where="method.targets", hint=_could(target, paths)
            )
    if not targets:
        raise ModelError("no target is named", where="method.targets", hint="name some, or write all-linear")
    return [path for path in paths if any(ends_with(path, target) for target in targets)]


def ends_with(path: str, name: str) -> bool:
    """`q_proj` and `self_attn.q_proj` are ends of `model.layers.0.self_attn.q_proj`; `proj` is not."""
    return path == name or path.endswith(f".{name}")


def _could(target: str, candidates: Sequence[str]) -> str:
    names = sorted({path.rsplit(".", 1)[-1] for path in candidates})
    near = difflib.get_close_matches(target.rsplit(".", 1)[-1], names, n=1)
    known = f"linear layers here: {', '.join(names)}; or all-linear"
    return f"did you mean {near[0]!r}? {known}" if near else known


def rank_of(path: str, method: LowRank) -> int:
    """Rank of one target, by the first pattern of `rank_pattern` that matches the end of its path."""
    return by_pattern(path, method.rank_pattern, method.rank)


def by_pattern(path: str, patterns: Mapping[str, _Value], default: _Value) -> _Value:
    """The value of the first pattern that matches the end of a module's path, as PEFT matches `rank_pattern` and
    `alpha_pattern`."""
    for pattern, value in patterns.items():
        if _compiled(pattern).match(path):
            return value
    return default


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def check_patterns(method: LowRank, targeted: Sequence[str]) -> None:
    """Raises ModelError for a pattern that is no regular expression, or that no target matches."""
    for key, patterns in (("rank_pattern", method.rank_pattern), ("alpha_pattern", method.alpha_pattern)):
        for pattern in patterns:
            where = f"method.{key}.{pattern}"
            try:
                matched = any(re.match(rf"(.*\.)?({pattern})$", path) for path in targeted)
            except re.error as error:
                raise ModelError(f"not a regular expression: {error}", where=where) from None
            if not matched:
                raise ModelError("matches none of the targets", where=where, hint=f"targets end like {targeted[0]}")


IA3_DEFAULTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "bloom": (("query_key_value", "mlp.dense_4h_to_h"), ("mlp.dense_4h_to_h",)),
    "falcon": (("query_key_value", "dense_4h_to_h"), ("dense_4h_to_h",)),
    "gemma": (("q_proj", "v_proj", "down_proj"), ("down_proj",)),
    "gemma2": (("q_proj", "v_proj", "down_proj"), ("down_proj",)),
    "gemma3_text": (("q_proj", "v_proj", "down_proj"), ("down_proj",)),
    "gpt2": (("c_attn", "mlp.c_proj"), ("mlp.c_proj",)),
    "gpt_bigcode": (("c_attn", "mlp.c_proj"), ("mlp.c_proj",)),
    "gpt_neo": (("q_proj", "v_proj", "c_proj"), ("c_proj",)),
    "gpt_neox": (("query_key_value", "dense_4h_to_h"), ("dense_4h_to_h",)),
    "gptj": (("q_proj", "v_proj", "fc_out"), ("fc_out",)),
    "llama": (("k_proj", "v_proj", "down_proj"), ("down_proj",)),
    "mistral": (("k_proj", "v_proj", "down_proj"), ("down_proj",)),
    "opt": (("q_proj", "k_proj", "fc2"), ("fc2",)),
    "phi": (("q_proj", "v_proj", "fc2"), ("fc2",)),
    "qwen2": (("q_proj", "v_proj", "down_proj"), ("down_proj",)),
    "qwen3": (("q_proj", "v_proj", "down_proj"), ("down_proj",)),
}
"""PEFT 0.21's tables for IA3 (targets, those of them that are feed-forward); a test compares them."""


def ia3_targets(method: IA3, family: str, linears: Iterable[str]) -> tuple[list[str], list[str]]:
    """(endings of the targets' paths, those of them that are feed-forward), each known to match. Raises ModelError."""
    paths = list(linears)
    if method.targets != "default":
        select(method.targets, paths)
        return list(method.targets), list(method.feedforward)
    if family not in IA3_DEFAULTS:
        names = sorted({path.rsplit(".", 1)[-1] for path in paths})
        raise ModelError(
            f"PEFT has no default targets of IA3 for the family {family!r}",
            where="method.targets",
            hint=f"name those of keys, values and the last feed-forward layer among {', '.join(names)}, and the last"
            " also in method.feedforward",
        )
    wanted, feedforward = IA3_DEFAULTS[family]
    select(wanted, paths)
    return list(wanted), list(feedforward)


def unfrozen(method: Freeze, parameters: Sequence[tuple[str, str]], layers: int) -> list[str]:
    """Names of the parameters that `freeze` trains, out of (name, kind) of all of the base's, in their order; kinds are
    those of `ftray.model.source.parameter_kinds`. Raises ModelError when a wish meets nothing."""
    if method.blocks > layers:
        raise ModelError(f"{method.blocks} blocks of {layers}", where="method.blocks", hint=f"write at most {layers}")
    if method.head and not method.embeddings and not any(kind == "head" for _, kind in parameters):
        raise ModelError(
            "this base's head is its embedding (tied weights), so training the head trains the embedding",
            where="method.head",
            hint="set method.embeddings: true if that is meant, or method.head: false",
        )
    kinds = {"head": method.head, "norm": method.norms, "embedding": method.embeddings}
    first = layers - method.blocks
    blocks = {name: block_of(name) for name, _ in parameters}
    wanted = {name for name, block in blocks.items() if block is not None and block >= first}
    wanted |= {name for name, kind in parameters if kinds.get(kind)}
    for pattern in method.also:
        try:
            found = {name for name, _ in parameters if re.match(rf"(.*\.)?({pattern})$", name)}
        except re.error as error:
            raise ModelError(f"{pattern!r} is not a regular expression: {error}", where="method.also") from None
        if not found:
            hint = f"paths look like {parameters[-1][0]}; the pattern must match to their end"
            raise ModelError(f"{pattern!r} matches no parameter of this base", where="method.also", hint=hint)
        wanted |= found
    return [name for name, _ in parameters if name in wanted]


def block_of(path: str) -> int | None:
    """Number of the transformer block that a parameter lies in; None above and below them."""
    found = _BLOCK.search(path)
    return int(found[1]) if found else None


_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
