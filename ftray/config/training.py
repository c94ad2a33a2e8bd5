"""`train`: steps, batch, optimizer, evaluation, commits."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from ftray.config.strict import Strict, by_name

Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "sgd", "lion", "adafactor", "mezo"]
COMMIT_SECONDS = 600.0
"""Longest training without a commit, where nobody says how often."""
BITSANDBYTES = ("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")
OWNERS: dict[str, tuple[str, ...]] = {
    "betas": ("adamw", *BITSANDBYTES, "lion"),
    "epsilon": ("adamw", *BITSANDBYTES),
    "momentum": ("sgd",),
    "perturbation": ("mezo",),
    "clip_norm": ("adamw", *BITSANDBYTES, "sgd", "lion", "adafactor"),
}
"""Keys of `train` that some optimizers alone look at, and which."""
SHAPED: dict[str, tuple[str, ...]] = {"final": ("linear", "cosine", "wsd"), "decay": ("wsd",)}
"""Keys of `train.schedule` that some schedules alone look at, and which."""


class Schedule(Strict):
    name: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """After the warm-up: `constant`; `linear` or `cosine` down to `final`; `wsd` (warm-up, stable, decay): constant,
    then linearly down over the last `decay`."""
    warmup: int | float = Field(0.03, ge=0)
    """Steps of linear warm-up from 0: a whole number of steps, or a share of all steps below 1."""
    final: float = Field(0.0, ge=0, le=1)
    """What the decay comes down to, as a share of the peak. As in transformers it would be the rate of one step more;
    the last one's is still above it."""
    decay: float = Field(0.2, ge=0, le=1)
    """`wsd`: share of all steps spent in decay."""

    @field_validator("warmup")
    @classmethod
    def _steps_or_share(cls, warmup: int | float) -> int | float:
        if isinstance(warmup, float) and (warmup == 1 or (warmup > 1 and not warmup.is_integer())):
            raise ValueError(f"{warmup} is neither a whole number of steps nor a share below 1")
        return warmup


class EarlyStopping(Strict):
    patience: int = Field(3, ge=1)
    """Evaluations in a row without a better held-out loss before the run ends."""
    min_improvement: float = Field(0.0, ge=0)
    """What counts as better: the loss must fall by more than this (nats a target token, or a pair)."""


_Beta = Annotated[float, Field(ge=0, lt=1)]
_ADAM = (0.9, 0.999)
_LION = (0.9, 0.99)


class Train(Strict):
    steps: int | None = Field(None, ge=1)
    """Optimizer steps. Give this or `epochs`."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the mixture. Give this or `steps`."""
    batch_rows: int = Field(16, ge=1)
    """Rows of one optimizer step, over all workers and micro-batches: what other trainers call the global batch.
    A preference is one row."""
    micro_batch_rows: int = Field(8, ge=1)
    """Rows that one worker puts through the model at once. Accumulation follows: batch_rows / (workers × this)."""
    learning_rate: float = Field(2e-4, gt=0)
    """Peak rate."""
    schedule: Annotated[Schedule, BeforeValidator(by_name)] = Schedule()
    """A name, or a mapping with `name` and its keys."""
    optimizer: Optimizer = "adamw"
    """`adamw`: torch's, fused. `adamw_8bit`, `paged_adamw_8bit`, `paged_adamw_32bit`: bitsandbytes', with 8-bit states
    and states paged to the host. `sgd`; `lion` (Chen et al. 2023), one state instead of two; `adafactor` (Shazeer and
    Stern 2018), a state of rows and columns, its rate absolute as Adam's is. `mezo` (Malladi et al. 2023): two forward
    passes instead of gradients, and no state at all, so training takes the memory of inference."""
    betas: tuple[_Beta, _Beta] = Field(_ADAM, json_schema_extra={"type": ["array", "null"]})
    """Adam's decay of the mean and of the variance; Lion's, of what it steps by and of the mean that it keeps. null:
    0.9 and 0.999, and for `lion` 0.9 and 0.99, as Chen et al. 2023 have them (section 5)."""
    epsilon: float = Field(1e-8, gt=0)
    """Adam's denominator guard."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of `sgd`."""
    perturbation: float = Field(1e-3, gt=0)
    """Of `mezo`: how far the weights are moved to either side, epsilon of the paper."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled decay of matrices; biases, norms and magnitudes never decay."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """The rate of each block is that of the block above it times this, and so down to the embeddings; 1: one rate. The
    last block, and what stands above it, has the whole rate."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Largest norm of the whole gradient; null: no clipping. `mezo` has no gradient to clip."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of each target's probability spread evenly over the vocabulary (Szegedy et al. 2016). The training loss
    contains it, held-out loss never does."""
    neftune: float | None = Field(None, gt=0)
    """Noise on the embeddings in training, alpha of NEFTune (Jain et al. 2023), for example 5; null: none."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """What forward and backward compute in, and what frozen weights that are not quantized are held in. Trained weights
    and their optimizer state stay fp32."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: activations of one block instead of all, for a third more time."""
    evaluate_every: int | None = Field(None, ge=1)
    """Steps between evaluations on held-out rows; null: at the start and the end alone."""
    evaluate_rows: int | None = Field(None, ge=1)
    """Held-out rows used at most; null: all."""
    commit_every: int | None = Field(None, ge=1)
    """Steps between commits; null: at each evaluation, and after ten minutes without a commit. The last step is
    committed whatever this says."""
    keep_last: int = Field(2, ge=1)
    """Newest commits that are kept."""
    keep_best: bool = True
    """Keep the commit with the lowest held-out loss, and make the artefact of it; false: of the last."""
    early_stopping: EarlyStopping | None = None
    """End when held-out loss no longer falls; null: never. A run that ended so goes on when it is given more patience,
    or null."""
    max_skipped: int = Field(5, ge=0)
    """Steps in a row with a loss or gradient that is not finite before the run stops. Such a step changes nothing."""

    @model_validator(mode="before")
    @classmethod
    def _betas_of_the_optimizer(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("betas") is None:
            return {**given, "betas": _LION if given.get("optimizer") == "lion" else _ADAM}
        return given

    @model_validator(mode="after")
    def _one_length(self) -> Train:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of `steps` and `epochs`")
        if self.early_stopping and not self.evaluate_every:
            raise ValueError("early_stopping needs `evaluate_every`, the steps between evaluations")
        return self
