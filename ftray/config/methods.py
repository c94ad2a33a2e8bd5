"""`method`: what is trained. Each method has its own knobs and no others."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal, Union

from pydantic import BeforeValidator, Field, model_validator

from ftray.config.strict import Strict


class _Method(Strict):
    @property
    def quantized(self) -> bool:
        """The base's linear layers are held in NF4."""
        return False

    @property
    def frozen_base(self) -> bool:
        """Only what the method adds is trained, so the artefact is an adapter."""
        return True

    @property
    def virtual_tokens(self) -> int:
        """Virtual tokens that stand in the row, in front of every sequence."""
        return 0

    @property
    def prefix_tokens(self) -> int:
        """Places in front of every sequence that have keys and values alone, and so stand in no row."""
        return 0


class Full(_Method):
    """Every parameter is trained, in fp32 with the compute type of `train.precision`."""

    name: Literal["full"]

    @property
    def frozen_base(self) -> bool:
        return False


class Freeze(_Method):
    """Transfer learning: some of the base's own parameters are trained, the rest stays as it is."""

    name: Literal["freeze"]
    blocks: int = Field(2, ge=0)
    """The last transformer blocks that are trained."""
    head: bool = False
    """Train the output head. Where it is the embedding (tied weights), `embeddings` must be true too."""
    norms: bool = False
    """Train every normalization."""
    embeddings: bool = False
    """Train the token and position embeddings."""
    also: list[str] = []
    """More parameters: regular expressions on the end of a parameter's path, such as `layers.0.mlp.*weight`."""

    @property
    def frozen_base(self) -> bool:
        return False

    @model_validator(mode="after")
    def _trains_something(self) -> Freeze:
        if not (self.blocks or self.head or self.norms or self.embeddings or self.also):
            raise ValueError("nothing would be trained: set blocks, head, norms, embeddings or also")
        return self


def _word_or_names(word: str) -> BeforeValidator:
    """Refuses another word than `word` where only a list of names may stand instead."""

    def check(value: Any) -> Any:
        if not isinstance(value, str) or value == word:
            return value
        if difflib.get_close_matches(value, [word]):
            raise ValueError(f"{value!r} is not known; did you mean {word!r}? Names are a list: [q_proj]")
        raise ValueError(f"{value!r} is no list; write {word}, or a list of names: [{value}]")

    return BeforeValidator(check)


Targets = Annotated[Literal["all-linear"] | list[str], _word_or_names("all-linear")]


class _LowRank(_Method):
    rank: int = Field(16, ge=1, le=8192)
    """Rows of A and columns of B (Hu et al. 2021, section 4.1)."""
    alpha: float = Field(32.0, gt=0)
    """The update is scaled by alpha / rank, or alpha / sqrt(rank) with `rslora`."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the adapter's inputs set to zero in training; 0: off."""
    targets: Targets = "all-linear"
    """`all-linear`: every linear layer but the output head. Or names: `q_proj` matches every module whose path ends in
    `.q_proj`; a name with dots must match the end of the path."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank), which keeps the update's size steady for large ranks (Kalajdzievski 2023)."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=8192)]] = {}
    """Other ranks for some layers: regular expression on the end of a module's path → rank."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Other alphas for some layers, like `rank_pattern`."""


class LoRA(_LowRank):
    """A low-rank update of each target (Hu et al. 2021), on an unquantized base."""

    name: Literal["lora"]


class DoRA(_LowRank):
    """LoRA on the direction, a trained magnitude for each output (Liu et al. 2024)."""

    name: Literal["dora"]


class _Quantized(_LowRank):
    double_quantization: bool = True
    """Quantize the blocks' scales too: 0.37 bits a parameter less (Dettmers et al. 2023, section 3)."""

    @property
    def quantized(self) -> bool:
        return True


class QLoRA(_Quantized):
    """LoRA over a base in NF4 (Dettmers et al. 2023)."""

    name: Literal["qlora"]


class QDoRA(_Quantized):
    """DoRA over a base in NF4."""

    name: Literal["qdora"]


class _EitherBase(_Method):
    quantization: Literal["none", "nf4"] = "none"
    """What the frozen base's linear layers are held in: `none`, the type of `train.precision`; `nf4`, 4 bits."""
    double_quantization: bool = True
    """With `nf4`: quantize the blocks' scales too."""

    @property
    def quantized(self) -> bool:
        return self.quantization == "nf4"


class AdaLoRA(_EitherBase):
    """LoRA as an SVD whose budget of ranks moves to the layers that matter (Zhang et al. 2023)."""

    name: Literal["adalora"]
    rank: int = Field(12, ge=1, le=8192)
    """Rank of every target at the start."""
    target_rank: int = Field(8, ge=1, le=8192)
    """Mean rank of the targets at the end."""
    alpha: float = Field(32.0, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the adapter's inputs set to zero in training."""
    targets: Targets = "all-linear"
    """As for `lora`."""
    start: float = Field(0.1, ge=0, lt=1)
    """Share of all steps before ranks are taken away."""
    settle: float = Field(0.3, ge=0, lt=1)
    """Share of all steps, at the end, in which ranks no longer change."""
    every: int = Field(5, ge=1)
    """Steps between two reallocations."""
    sensitivity_decay: float = Field(0.85, gt=0, lt=1)
    """Decay of the mean importance, beta 1 of the paper."""
    uncertainty_decay: float = Field(0.85, gt=0, lt=1)
    """Decay of its uncertainty, beta 2 of the paper."""
    orthogonality: float = Field(0.5, ge=0)
    """Weight of the penalty that keeps both factors orthogonal, added to the mean loss of a step."""

    @model_validator(mode="after")
    def _ranks_shrink(self) -> AdaLoRA:
        if self.target_rank >= self.rank:
            raise ValueError(
                f"target_rank {self.target_rank} is not below rank {self.rank}, from which AdaLoRA shrinks; for ranks"
                " that stay, use method lora"
            )
        if self.start + self.settle >= 1:
            raise ValueError("start + settle leave no step in which ranks could change; lower one of them")
        return self


class VeRA(_EitherBase):
    """Two trained vectors for each target around random matrices that all share (Kopiczko et al. 2023)."""

    name: Literal["vera"]
    rank: int = Field(256, ge=1, le=8192)
    """Rank of the random matrices. They are the same in every run, so that adapters of one base fit together."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the adapter's inputs set to zero in training."""
    targets: Targets = "all-linear"
    """As for `lora`."""
    initial: float = Field(0.1, gt=0)
    """What the vector d starts from."""


class IA3(_EitherBase):
    """One trained factor for each key, value and inner feed-forward activation (Liu et al. 2022)."""

    name: Literal["ia3"]
    targets: Annotated[Literal["default"] | list[str], _word_or_names("default")] = "default"
    """`default`: PEFT's for the base's family; for Llama keys, values and the last linear layer of each feed-forward
    part. Or names, as for `lora`."""
    feedforward: list[str] = []
    """Those of `targets` whose inputs are scaled instead of their outputs; empty with `default`."""

    @model_validator(mode="after")
    def _among_targets(self) -> IA3:
        odd = [name for name in self.feedforward if name not in self.targets]
        if odd and self.targets == "default":
            raise ValueError("feedforward comes with the default targets; name the targets too, or leave it empty")
        if odd:
            raise ValueError(f"feedforward names {odd[0]!r}, which is not in targets {self.targets}")
        return self


class Prefix(_EitherBase):
    """Trained keys and values in front of every layer's own (Li and Liang 2021)."""

    name: Literal["prefix"]
    tokens: int = Field(20, ge=1, le=4096)
    """Virtual tokens."""
    projection: bool = False
    """Train a small embedding and an MLP that makes the prefix, as in the paper; steadier at high rates."""
    hidden: int | None = Field(None, ge=1)
    """Width of that MLP; null: the base's hidden size."""

    @property
    def prefix_tokens(self) -> int:
        return self.tokens

    @model_validator(mode="after")
    def _width_of_something(self) -> Prefix:
        if self.hidden and not self.projection:
            raise ValueError("hidden is the width of the projection, which is off; set projection: true")
        return self


class Prompt(_EitherBase):
    """Trained embeddings of virtual tokens in front of the row (Lester et al. 2021)."""

    name: Literal["prompt"]
    tokens: int = Field(20, ge=1, le=4096)
    """Virtual tokens."""
    text: str | None = Field(None, min_length=1)
    """Start from the embeddings of this text's tokens, repeated or cut to `tokens`; null: from random tokens of the
    vocabulary."""

    @property
    def virtual_tokens(self) -> int:
        return self.tokens


class PTuning(_EitherBase):
    """Virtual tokens that a small encoder makes (Liu et al. 2021); the encoder is gone once trained."""

    name: Literal["p_tuning"]
    tokens: int = Field(20, ge=1, le=4096)
    """Virtual tokens."""
    encoder: Literal["mlp", "lstm"] = "mlp"
    """What the encoder is."""
    hidden: int = Field(128, ge=1)
    """Width of the encoder."""
    layers: int = Field(2, ge=1, le=8)
    """Layers of an `lstm`; an `mlp` has two hidden ones."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Between the layers of an `lstm`."""

    @property
    def virtual_tokens(self) -> int:
        return self.tokens

    @model_validator(mode="after")
    def _fits_the_encoder(self) -> PTuning:
        if self.encoder == "mlp" and (self.layers != 2 or self.dropout):
            raise ValueError("layers and dropout are an lstm's; an mlp has two hidden layers and no dropout")
        if self.dropout and self.layers == 1:
            raise ValueError("dropout acts between layers, and there is one; set layers: 2, or dropout: 0")
        return self


class Bottleneck(_EitherBase):
    """Adapter layers: down, activation, up, and a residual, behind attention and feed-forward part (Houlsby et al.
    2019), or behind the feed-forward part alone (Pfeiffer et al. 2020)."""

    name: Literal["bottleneck"]
    size: int = Field(64, ge=1, le=8192)
    """Width of the bottleneck."""
    placement: Literal["houlsby", "pfeiffer"] = "pfeiffer"
    """`houlsby`: two in each block. `pfeiffer`: one."""
    activation: Literal["relu", "gelu", "silu"] = "relu"
    """Between down and up."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the adapter's inputs set to zero in training."""
    scale: float = Field(1.0, gt=0)
    """Factor of what the adapter adds."""


Method = Annotated[
    Union[  # noqa: UP007
        Full, Freeze, LoRA, DoRA, QLoRA, QDoRA, AdaLoRA, VeRA, IA3, Prefix, Prompt, PTuning, Bottleneck
    ],
    Field(discriminator="name"),
]
LOW_RANK = (LoRA, DoRA, QLoRA, QDoRA)
VIRTUAL_TOKENS = (Prefix, Prompt, PTuning)
