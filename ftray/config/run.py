"""What a run is: the run file, strict and complete."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Union

import yaml
from pydantic import BeforeValidator, Field, model_validator

from ftray.config.data import Data
from ftray.config.evaluation import Evaluation
from ftray.config.methods import Method
from ftray.config.refusals import refusals
from ftray.config.strict import Strict, by_name
from ftray.config.training import Train


class Model(Strict):
    path: str
    """A folder in Hugging Face format, a hub name, any fsspec URI of such a folder, or `embedded` for the tiny base
    that ships with ftray."""
    revision: str | None = None
    """Branch, tag or commit of a hub name; null: the default branch."""
    random_weights: bool = False
    """True: the shape of `path` (its config.json) with fresh weights drawn from `seed`: pretraining and benchmarks."""
    trust_remote_code: bool = False
    """True runs Python code that came with the model. Off unless you have read it."""


class SFT(Strict):
    """Supervised tuning: the cross-entropy of target tokens."""

    name: Literal["sft"]


class DPO(Strict):
    """Direct preference optimization (Rafailov et al. 2023), on rows of format `preference`. The reference is the base
    with the adapter off, or a frozen copy of it where the base itself is trained."""

    name: Literal["dpo"]
    beta: float = Field(0.1, gt=0)
    """How closely the model is held to the reference."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of pairs assumed to be labelled the wrong way round (conservative DPO)."""
    reference_free: bool = False
    """True: the reference gives every completion the same probability."""


Objective = Annotated[Union[SFT, DPO], Field(discriminator="name")]  # noqa: UP007


class Strategy(Strict):
    zero: Literal[0, 1, 2, 3] = 2
    """What DeepSpeed ZeRO divides among the workers: 0 nothing, 1 optimizer states, 2 gradients too, 3 weights too."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where optimizer states lie and are updated."""
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    """ZeRO 3: where weights lie while they are not needed."""
    nvme_path: str | None = None
    """Folder on a fast local disk of every node, for `nvme`."""
    pin_memory: bool = True
    """Page-lock what is offloaded: faster copies to a GPU, and the host cannot swap it out. Without a GPU no effect."""
    bucket_elements: int = Field(50_000_000, ge=1000)
    """Elements that are communicated at once."""
    keep_elements: int = Field(100_000_000, ge=0)
    """ZeRO 3: elements of gathered weights that a worker keeps ready between uses, at most."""


class Workers(Strict):
    count: int | None = Field(None, ge=1)
    """Ray Train workers, each with a copy of the model; 1 unless `min` and `max` are given."""
    min: int | None = Field(None, ge=1)
    """Instead of `count`: fewest workers that the run goes on with when nodes are lost."""
    max: int | None = Field(None, ge=1)
    """Instead of `count`: workers that it has when the cluster has room; it grows again once nodes are back."""
    gpus: Literal["auto"] | Annotated[float, Field(ge=0)] = "auto"
    """GPUs a worker; `auto`: one if the cluster has any at the start, else none. On a cluster, where GPUs may come yet,
    none is a guess that is refused before any node with work is there, and for a base of a billion parameters: 1 waits
    for GPUs, 0 means CPUs."""
    cpus: float | None = Field(None, gt=0)
    """CPUs a worker; null: 1, or an even share of this machine when Ray runs locally without GPUs."""
    retries: int = Field(3, ge=-1)
    """Times that the workers may start again after one died, without a new commit in between; -1: without limit."""
    wait_seconds: float = Field(600, ge=0)
    """Longest wait for places on the cluster, at the start and after nodes were lost; then the run ends with what is
    missing. The last commit is whole, and the same command goes on."""
    stall_seconds: float = Field(1800, gt=0)
    """Longest time in which a worker may make no progress within a step; then it is named, ended, and the workers start
    again. One that gives no sign of life at all is found after 60 s, or after this time if that is less."""
    gpu_memory_gib: float | None = Field(None, gt=0)
    """Memory of one GPU, for the memory plan; null: nothing is compared."""

    @model_validator(mode="before")
    @classmethod
    def _one_without_a_word(cls, given: Any) -> Any:
        if isinstance(given, dict) and not {"count", "min", "max"} & {key for key in given if given[key] is not None}:
            return {**given, "count": 1}
        return given

    @property
    def least(self) -> int:
        """Workers that the run needs."""
        return self.count or self.min or 1

    @property
    def most(self) -> int:
        """Workers that it has where there is room."""
        return self.count or self.max or self.least

    @property
    def elastic(self) -> bool:
        return self.count is None

    @property
    def number(self) -> str:
        """`2`, `1 to 4`."""
        return f"{self.least} to {self.most}" if self.elastic else f"{self.least}"


class Logging(Strict):
    every: int = Field(10, ge=1)
    """Steps between lines in a log without a terminal."""
    tensorboard: bool = True
    """Write `tensorboard/` in the run's folder."""
    mlflow: str | None = None
    """MLflow tracking URI; null: off. Needs the extra `mlflow`."""
    wandb: str | None = None
    """Weights & Biases project; null: off. Needs the extra `wandb`."""


class Run(Strict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    """Name of the run: letters, digits, `.`, `_`, `-`."""
    model: Model
    method: Annotated[Method, BeforeValidator(by_name)]
    """A name, or a mapping with `name` and its keys."""
    data: Data
    train: Train
    objective: Annotated[Objective, BeforeValidator(by_name)] = SFT(name="sft")
    """A name, or a mapping with `name` and its keys."""
    strategy: Strategy | None = None
    """DeepSpeed ZeRO; null: every worker holds the whole model (torch's DDP)."""
    evaluate: Evaluation | None = None
    """What `ftray evaluate` asks of the tuned model and of baselines; null: losses on the held-out rows alone. Training
    does not look at it."""
    workers: Workers = Workers(count=1)
    logging: Logging = Logging()
    output: str = "runs/{name}"
    """The run's folder: a path or any fsspec URI; `{name}` is the run's name."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Order of rows, dropout, fresh weights."""

    @model_validator(mode="after")
    def _fits_together(self) -> Run:
        for reason in refusals(self):
            raise ValueError(reason)
        return self

    @property
    def folder(self) -> str:
        """The run's folder, with the name filled in."""
        return self.output.replace("{name}", self.name)

    @property
    def accumulation(self) -> int:
        """Micro-batches a worker in one step, at most."""
        return self.accumulation_of(self.workers.least)

    def accumulation_of(self, workers: int) -> int:
        """Micro-batches of each in one step, at most, when there are so many workers."""
        rows = -(-self.train.batch_rows // workers)
        return -(-rows // self.train.micro_batch_rows)

    def total_steps(self, rows_per_epoch: int) -> int:
        """Optimizer steps: as given, or the epochs times the steps of one, of which the last may be short."""
        if self.train.steps is not None:
            return self.train.steps
        assert self.train.epochs is not None
        return max(1, math.ceil(self.train.epochs * math.ceil(rows_per_epoch / self.train.batch_rows)))

    def dump(self) -> dict[str, Any]:
        """The resolved run as plain values, every default filled in."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.dump(), sort_keys=False, allow_unicode=True, width=110)
