"""What `adapter_config.json` may say: for every kind of adapter that ftray trains, the fields that mean something, and
the values that the other fields of PEFT's files must have. No torch.

    settings = read_settings({"peft_type": "LORA", "r": 16, …})

Whoever reads an adapter of a stranger asks here first: a field that would change what the adapter does, and that ftray
does not know, is refused and never ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ftray.config.explain import explain
from ftray.config.strict import Strict
from ftray.errors import ArtefactError

Width = Annotated[int, Field(ge=1, le=8192)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Ending = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$", max_length=256)]
"""End of a module's path."""

_OFF: tuple[Any, ...] = (None, False)
_EMPTY: tuple[Any, ...] = (None, [], {})


class AdapterSettings(Strict):
    """What every `adapter_config.json` of PEFT has."""

    model_config = ConfigDict(strict=True)
    inert: ClassVar[dict[str, tuple[Any, ...]]] = {
        "auto_mapping": (None,),
        "inference_mode": (True, False),
        "modules_to_save": _EMPTY,
    }
    """PEFT's other fields: name → values with which the adapter is what its remaining fields say."""

    task_type: Literal["CAUSAL_LM"]
    base_model_name_or_path: str | None = None
    """As the run called its base; what must fit is the digest in `ftray.json`."""
    revision: str | None = None
    peft_version: str | None = None


class OnLayers(AdapterSettings):
    """Adapters of linear layers."""

    inert = AdapterSettings.inert | {
        "bias": ("none",),
        "exclude_modules": _EMPTY,
        "fan_in_fan_out": (True, False),  # the base says by itself which way its weights lie
        "layers_pattern": _EMPTY,
        "layers_to_transform": _EMPTY,
    }

    target_modules: list[Ending] = Field(min_length=1, max_length=1024)
    """Endings of the paths of the layers that have an adapter."""


_OF_LORA: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": _EMPTY,
    "arrow_config": (None,),
    "corda_config": (None,),
    "ensure_weight_tying": _OFF,
    "eva_config": (None,),
    "init_lora_weights": (True, False),
    "kasa_config": (None,),
    "layer_replication": _EMPTY,
    "loftq_config": _EMPTY,
    "lora_bias": _OFF,
    "lora_ga_config": (None,),
    "megatron_config": (None,),
    "megatron_core": (None, "megatron.core"),
    "monteclora_config": (None,),
    "qalora_group_size": (None, 16),
    "target_parameters": _EMPTY,
    "trainable_token_indices": _EMPTY,
    "use_bdlora": _OFF,
    "use_qalora": _OFF,
    "velora_config": (None,),
}


class LoraSettings(OnLayers):
    """LoRA, DoRA, rsLoRA."""

    inert = OnLayers.inert | _OF_LORA

    peft_type: Literal["LORA"]
    r: Width
    lora_alpha: Positive
    lora_dropout: Share = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, Width] = {}
    """Other ranks for some layers: regular expression on the end of a path → rank."""
    alpha_pattern: dict[str, Positive] = {}

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _quick_to_match(cls, patterns: dict[str, Any]) -> dict[str, Any]:
        refuse_slow_patterns(patterns)
        return patterns


class AdaLoraSettings(OnLayers):
    """LoRA as a singular value decomposition."""

    inert = OnLayers.inert | _OF_LORA | {"use_dora": _OFF, "use_rslora": _OFF, "alpha_pattern": _EMPTY}

    peft_type: Literal["ADALORA"]
    init_r: Width
    """Rank of each layer before any was taken away."""
    lora_alpha: Positive
    lora_dropout: Share = 0.0
    rank_pattern: dict[str, list[bool]] | None = None
    """`PATH.lora_E` → which of the `init_r` ranks are left; null: all, everywhere."""
    r: int = 8
    """Without meaning here, like all that follow: how training went."""
    target_r: int = 8
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None

    @model_validator(mode="after")
    def _all_of_one_length(self) -> AdaLoraSettings:
        for key, kept in (self.rank_pattern or {}).items():
            if len(kept) != self.init_r:
                raise ValueError(f"rank_pattern.{key}: {len(kept)} values, and init_r is {self.init_r}")
        return self


class VeraSettings(OnLayers):
    """Two vectors a layer around matrices that all share."""

    inert = OnLayers.inert | {
        "init_weights": (True, False),
        "projection_prng_key": (0,),
        "save_projection": (True,),
    }

    peft_type: Literal["VERA"]
    r: Width
    vera_dropout: Share = 0.0
    d_initial: Positive = 0.1
    """What training started from."""


class Ia3Settings(OnLayers):
    """A factor for each output, or for each input of a feed-forward layer."""

    inert = OnLayers.inert | {"init_ia3_weights": (True, False)}

    peft_type: Literal["IA3"]
    feedforward_modules: list[Ending] = Field(max_length=1024)
    """Those of `target_modules` whose inputs are scaled."""

    @model_validator(mode="after")
    def _among_targets(self) -> Ia3Settings:
        for name in self.feedforward_modules:
            if name not in self.target_modules:
                raise ValueError(f"feedforward_modules: {name!r} is not in target_modules")
        return self

    def scales_inputs(self, path: str) -> bool:
        """Whether the layer of this path is one of `feedforward_modules`, by PEFT's rule: a plain end of text."""
        return any(path.endswith(name) for name in self.feedforward_modules)


class VirtualTokens(AdapterSettings):
    """Virtual tokens in front of every sequence."""

    inert = AdapterSettings.inert | {"num_transformer_submodules": (1,)}

    num_virtual_tokens: Width
    token_dim: int
    """Width of one token; for a prefix that of all key heads."""
    num_layers: int
    num_attention_heads: int


class PrefixSettings(VirtualTokens):
    """Keys and values in front of every layer's own; the encoder is gone once trained."""

    inert = VirtualTokens.inert | {"init_weights": (None, True, False)}

    peft_type: Literal["PREFIX_TUNING"]
    prefix_projection: bool = False
    encoder_hidden_size: int | None = None


class PromptSettings(VirtualTokens):
    """Embeddings of virtual tokens. Encoder and initial text are how training went."""

    inert = VirtualTokens.inert | {"tokenizer_kwargs": _EMPTY}

    peft_type: Literal["PROMPT_TUNING", "P_TUNING"]
    prompt_tuning_init: Literal["RANDOM", "TEXT", "SAMPLE_VOCAB"] | None = None
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    encoder_reparameterization_type: Literal["MLP", "LSTM"] | None = None
    encoder_hidden_size: int | None = None
    encoder_num_layers: int | None = None
    encoder_dropout: float | None = None


class BottleneckSettings(BaseModel):
    """ftray's own: layers behind attention and feed-forward part, or behind the latter alone."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    inert: ClassVar[dict[str, tuple[Any, ...]]] = {}

    peft_type: Literal["FTRAY_BOTTLENECK"] = "FTRAY_BOTTLENECK"
    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    base_model_name_or_path: str | None = None
    revision: str | None = None
    size: Width
    placement: Literal["houlsby", "pfeiffer"]
    activation: Literal["relu", "gelu", "silu"]
    dropout: Share
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]


Settings = (
    LoraSettings | AdaLoraSettings | VeraSettings | Ia3Settings | PrefixSettings | PromptSettings | BottleneckSettings
)
SETTINGS: dict[str, type[Settings]] = {
    "LORA": LoraSettings,
    "ADALORA": AdaLoraSettings,
    "VERA": VeraSettings,
    "IA3": Ia3Settings,
    "PREFIX_TUNING": PrefixSettings,
    "PROMPT_TUNING": PromptSettings,
    "P_TUNING": PromptSettings,
    "FTRAY_BOTTLENECK": BottleneckSettings,
}
"""By `peft_type`."""


def read_settings(config: dict[str, Any], where: str = "adapter_config.json") -> Settings:
    """The settings of a parsed `adapter_config.json`. Raises ArtefactError with every field that is not allowed."""
    kind = config.get("peft_type")
    known = SETTINGS.get(kind) if isinstance(kind, str) else None
    if known is None:
        hint = f"known: {', '.join(SETTINGS)}"
        raise ArtefactError(f"peft_type {_short(kind)} is no adapter of ftray's", where=where, hint=hint)
    odd, meant = [], {}
    for name, value in config.items():
        if name not in known.inert:
            meant[name] = value
        elif not _among(value, known.inert[name]):
            allowed = " or ".join(map(repr, known.inert[name]))
            odd.append(f"{name}: {_short(value)} would change what the adapter does; it can be {allowed} alone")
    try:
        settings = known.model_validate(meant)
    except ValidationError as error:
        odd += explain(error, known)
    if odd:
        raise ArtefactError("\n  ".join(odd[:8]), where=where)
    return settings


def _among(value: Any, allowed: Iterable[Any]) -> bool:
    return any(type(value) is type(each) and value == each for each in allowed)  # in Python 0 == False


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) < 60 else f"{shown[:57]}…"


# ------------------------------------------------------------------------------------------- patterns that end in time

_MOST_PATTERNS = 1024
_LONGEST_PATTERN = 256
_LONGEST_PATH = 64
_MOST_WAYS = _LONGEST_PATH**2
"""Of one pattern: as of two of `*` or `+`."""
_MOST_WAYS_OF_ALL = 4 * _MOST_WAYS
_TOKEN = re.compile(
    r"(?P<atom>[A-Za-z0-9_-]|\.|\\[.dw-]|\[\^?(?:[A-Za-z0-9_.-]|\\[.dw])+\])"
    r"|(?P<open>\((?:\?:)?)|(?P<bar>\|)|(?P<close>\))|(?P<edge>[$^])"
)
_REPEAT = re.compile(r"(?P<many>[*+]\??)|(?P<maybe>\?)|\{(?P<least>\d{1,2})(?:,(?P<most>\d{1,2}))?\}")


def refuse_slow_patterns(patterns: Iterable[str]) -> None:
    """Raises ValueError for a regular expression that a short path could keep busy for long, or that is none.

    Python's `re` tries every way in which a pattern could match. Here the ways are counted: those of parts that follow
    one another multiply. Groups are not repeated, and nothing looks ahead or back.
    """
    total = 0
    for number, pattern in enumerate(patterns):
        if number >= _MOST_PATTERNS:
            raise ValueError(f"more than {_MOST_PATTERNS:,} patterns")
        if len(pattern) > _LONGEST_PATTERN:
            raise ValueError(f"{_short(pattern)}: a pattern of more than {_LONGEST_PATTERN} characters")
        try:
            ways, end = _ways(pattern, 0)
            if end != len(pattern):
                raise ValueError("a bracket too many")
            re.compile(pattern)
        except (ValueError, re.error) as error:
            raise ValueError(f"{_short(pattern)}: {error}") from None
        if ways > _MOST_WAYS:
            raise ValueError(f"{_short(pattern)}: it could take long to match; use * and + at most twice")
        total += ways - 1
    if total > _MOST_WAYS_OF_ALL:
        raise ValueError("all patterns together could take long to match; use * and + less often")


def _ways(pattern: str, at: int) -> tuple[int, int]:
    """(ways to match, where the alternatives end) of a pattern from `at` to its end or a closing bracket."""
    alternatives, ways = 0, 1
    while at < len(pattern):
        token = _TOKEN.match(pattern, at)
        if token is None:
            raise ValueError(f"{pattern[at]!r} at {at + 1} is not allowed in patterns of a registry")
        at, repeatable, own = token.end(), token["atom"] is not None, 1
        if token["close"]:
            at -= 1
            break
        if token["bar"]:
            alternatives, ways = alternatives + ways, 1
            continue
        if token["open"]:
            own, at = _ways(pattern, at)
            if pattern[at : at + 1] != ")":
                raise ValueError("a bracket is not closed")
            at += 1
        if repeat := _REPEAT.match(pattern, at):
            if not repeatable and not repeat["maybe"]:
                raise ValueError("a group or an edge is repeated, which is not allowed in patterns of a registry")
            own, at = _repeated(own, repeat), repeat.end()
        ways *= own
        if ways > _MOST_WAYS:
            ways = _MOST_WAYS + 1
    return min(alternatives + ways, _MOST_WAYS + 1), at


def _repeated(ways: int, repeat: re.Match[str]) -> int:
    if repeat["many"]:
        return _LONGEST_PATH
    if repeat["maybe"]:
        return ways + 1
    least, most = int(repeat["least"]), int(repeat["most"] or repeat["least"])
    return max(1, most - least + 1)
