"""What a run is: the run file, strict and complete. No torch, no Ray: it loads in a few hundredths of a second.

    run = load_run("cheese.yaml", overrides=["train.steps=100"])

A run file is YAML. `${NAME}` and `${NAME:-default}` are taken from the environment. Relative paths are relative to the
working directory, as in a shell. Every key is documented under itself below; an unknown key is refused with the
nearest known one.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ftray.errors import ConfigError


class Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


# ---------------------------------------------------------------------------------------------------------------- model


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


# --------------------------------------------------------------------------------------------------------------- method


class Full(Strict):
    """Every parameter is trained, in fp32 with the compute type of `train.precision`."""

    name: Literal["full"]


class _LowRank(Strict):
    rank: int = Field(16, ge=1, le=8192)
    """Rows of A and columns of B (Hu et al. 2021, section 4.1)."""
    alpha: float = Field(32.0, gt=0)
    """The update is scaled by alpha / rank, or alpha / sqrt(rank) with `rslora`."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the adapter's inputs set to zero in training; 0: off."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
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


class QLoRA(_Quantized):
    """LoRA over a base in NF4 (Dettmers et al. 2023)."""

    name: Literal["qlora"]


class QDoRA(_Quantized):
    """DoRA over a base in NF4."""

    name: Literal["qdora"]


Method = Annotated[Union[Full, LoRA, DoRA, QLoRA, QDoRA], Field(discriminator="name")]  # noqa: UP007
LOW_RANK = (LoRA, DoRA, QLoRA, QDoRA)
QUANTIZED = (QLoRA, QDoRA)


# ----------------------------------------------------------------------------------------------------------------- data


class TextFormat(Strict):
    """Plain text; every token is a target."""

    name: Literal["text"]
    column: str = "text"
    """The column that holds the text. For a `.txt` file each line is a row with this column."""


class PromptCompletionFormat(Strict):
    """Two templates over the row's columns; the completion's tokens are the targets."""

    name: Literal["prompt_completion"]
    prompt: str = "{prompt}"
    """Template; `{mr}` is the column `mr`, `{{` a brace."""
    completion: str = "{completion}"
    """Template of what the model must learn to say; the end-of-text token follows it."""
    chat: bool = False
    """True: the prompt becomes a user turn and the completion the assistant's, in the tokenizer's chat template."""


class InstructionFormat(Strict):
    """Alpaca's columns, in Alpaca's wording; the output's tokens are the targets."""

    name: Literal["instruction"]
    instruction: str = "instruction"
    """Column of the instruction."""
    input: str | None = "input"
    """Column of the optional input; null: none."""
    output: str = "output"
    """Column of the response."""
    chat: bool = False
    """True: in the tokenizer's chat template instead of Alpaca's wording."""


class MessagesFormat(Strict):
    """A conversation in the tokenizer's own chat template; the assistant's turns are the targets."""

    name: Literal["messages"]
    column: str = "messages"
    """The column that holds the list of `{role, content}`."""


def _format_by_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


Format = Annotated[
    Union[TextFormat, PromptCompletionFormat, InstructionFormat, MessagesFormat],  # noqa: UP007
    Field(discriminator="name"),
    BeforeValidator(_format_by_name),
]


class Source(Strict):
    path: str
    """A file, a glob, a folder, any fsspec URI of these, or a hub name with `reader: datasets`. `embedded:NAME` is a
    data set that ships with ftray."""
    format: Format
    """How a row becomes tokens: a name, or a mapping with `name` and the format's own keys."""
    reader: Literal["auto", "jsonl", "json", "csv", "parquet", "text", "datasets"] = "auto"
    """`auto` goes by the file's ending, before `.gz` or `.bz2` if there is one. `json` is one list of rows;
    `datasets` is a hub name or a folder written by `save_to_disk`."""
    split: str = "train"
    """Split of a `datasets` source."""
    subset: str | None = None
    """Configuration name of a hub data set; null: its default."""
    limit: int | None = Field(None, ge=1)
    """Use the first rows only; null: all."""
    weight: float = Field(1.0, gt=0)
    """Copies of each row in an epoch: 2 sees every row twice, 0.5 half of them, another half in each epoch."""


class Data(Strict):
    sources: list[Source] = Field(min_length=1)
    """What to train on. Several sources are mixed by their weights."""
    held_out: list[Source] = []
    """What to evaluate on, from files of its own. Give this or `held_out_fraction`."""
    held_out_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of `sources` kept back for evaluation, chosen by the row's content, so that equal rows stay on one side."""
    max_length: int = Field(1024, ge=8)
    """Tokens a row at most."""
    too_long: Literal["truncate", "refuse"] = "refuse"
    """`truncate` cuts the end of a longer row; `refuse` puts it aside. Both are counted. A row whose targets would all
    be cut is put aside in either case."""
    packing: Literal["off", "batch", "corpus"] = "batch"
    """`batch`: the rows of a micro-batch are laid end to end, without padding. `off`: padded to the longest of them.
    Both give the same losses. `corpus`: many short rows are packed once into rows of `max_length` tokens, and
    `train.batch_rows` counts these."""
    max_rejected: int | float = Field(0.01, ge=0)
    """Rows that may be put aside before the run stops: a whole number of rows, or a share below 1."""
    chat_template: str | None = None
    """File of a Jinja chat template that replaces the tokenizer's; null: the tokenizer's own."""
    cache: str | None = None
    """Folder or URI where prepared data are kept and found again by digest; null: `data/` in the run's folder."""

    @model_validator(mode="after")
    def _one_held_out(self) -> Data:
        if self.held_out and self.held_out_fraction:
            raise ValueError("both `held_out` and `held_out_fraction` are set; keep one of them")
        if isinstance(self.max_rejected, float) and self.max_rejected > 1:
            raise ValueError(f"max_rejected {self.max_rejected} is neither a whole number of rows nor a share below 1")
        return self


# ---------------------------------------------------------------------------------------------------------------- train


class Schedule(Strict):
    name: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """After the warm-up: `constant`; `linear` or `cosine` down to `final`; `wsd` (warm-up, stable, decay): constant,
    then linearly down over the last `decay`."""
    warmup: int | float = Field(0.03, ge=0)
    """Steps of linear warm-up from 0: a whole number of steps, or a share of all steps below 1."""
    final: float = Field(0.0, ge=0, le=1)
    """The last step's rate as a share of the peak."""
    decay: float = Field(0.2, ge=0, le=1)
    """`wsd`: share of all steps spent in decay."""


def _schedule_by_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class EarlyStopping(Strict):
    patience: int = Field(3, ge=1)
    """Evaluations in a row without a better held-out loss before the run ends."""
    min_improvement: float = Field(0.0, ge=0)
    """What counts as better: the loss must fall by more than this (nats a target token)."""


_Beta = Annotated[float, Field(ge=0, lt=1)]


class Train(Strict):
    steps: int | None = Field(None, ge=1)
    """Optimizer steps. Give this or `epochs`."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the mixture. Give this or `steps`."""
    batch_rows: int = Field(16, ge=1)
    """Rows of one optimizer step, over all workers and micro-batches: what other trainers call the global batch."""
    micro_batch_rows: int = Field(8, ge=1)
    """Rows that one worker puts through the model at once. Accumulation follows: batch_rows / (workers × this)."""
    learning_rate: float = Field(2e-4, gt=0)
    """Peak rate."""
    schedule: Annotated[Schedule, BeforeValidator(_schedule_by_name)] = Schedule()
    """A name, or a mapping with `name` and its keys."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = "adamw"
    """`adamw` is torch's, fused; the others are bitsandbytes', 8-bit states and states paged to the host."""
    betas: tuple[_Beta, _Beta] = (0.9, 0.999)
    """Adam's decay of the mean and of the variance."""
    epsilon: float = Field(1e-8, gt=0)
    """Adam's denominator guard."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled decay of matrices; biases, norms and magnitudes never decay."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Largest norm of the whole gradient; null: no clipping."""
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
    """Steps between commits; null: at each evaluation and at the end."""
    keep_last: int = Field(2, ge=1)
    """Newest commits that are kept."""
    keep_best: bool = True
    """Keep the commit with the lowest held-out loss, and make the artefact of it; false: of the last."""
    early_stopping: EarlyStopping | None = None
    """End when held-out loss no longer falls; null: never."""
    max_skipped: int = Field(5, ge=0)
    """Steps in a row with a loss or gradient that is not finite before the run stops. Such a step changes nothing."""

    @model_validator(mode="after")
    def _one_length(self) -> Train:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of `steps` and `epochs`")
        if self.early_stopping and not self.evaluate_every:
            raise ValueError("early_stopping needs `evaluate_every`, the steps between evaluations")
        return self


class Workers(Strict):
    count: int = Field(1, ge=1)
    """Ray Train workers, each with a copy of the model."""
    gpus: Literal["auto"] | Annotated[float, Field(ge=0)] = "auto"
    """GPUs a worker; `auto`: one if the cluster has any, else none."""
    cpus: float | None = Field(None, gt=0)
    """CPUs a worker; null: 1, or an even share of this machine when Ray runs locally without GPUs."""
    retries: int = Field(3, ge=-1)
    """Times that Ray Train may start the group again after a worker died; -1: without limit."""
    gpu_memory_gib: float | None = Field(None, gt=0)
    """Memory of one GPU, for the memory plan; null: nothing is compared."""


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
    method: Method
    data: Data
    train: Train
    workers: Workers = Workers()
    logging: Logging = Logging()
    output: str = "runs/{name}"
    """The run's folder: a path or any fsspec URI; `{name}` is the run's name."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Order of rows, dropout, fresh weights."""

    @model_validator(mode="after")
    def _fits_together(self) -> Run:
        train, workers = self.train, self.workers
        if self.model.random_weights and not isinstance(self.method, Full):
            raise ValueError(
                f"model.random_weights with method {self.method.name!r} would adapt noise; pretrain with method `full`"
            )
        if train.batch_rows < workers.count:
            raise ValueError(
                f"train.batch_rows {train.batch_rows} leaves some of {workers.count} workers without a row in every"
                " step; raise train.batch_rows or lower workers.count"
            )
        if not (self.data.held_out or self.data.held_out_fraction):
            for key in ("evaluate_every", "early_stopping"):
                if getattr(train, key):
                    raise ValueError(f"train.{key} needs held-out rows: set data.held_out or data.held_out_fraction")
        return self

    @property
    def folder(self) -> str:
        """The run's folder, with the name filled in."""
        return self.output.replace("{name}", self.name)

    @property
    def accumulation(self) -> int:
        """Micro-batches a worker in one step, at most."""
        rows = -(-self.train.batch_rows // self.workers.count)
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


# -------------------------------------------------------------------------------------------------------------- loading


def recipe_names() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return sorted(f.name.removesuffix(".yaml") for f in _recipes().iterdir() if f.name.endswith(".yaml"))


def _recipes():
    return resources.files("ftray") / "recipes"


def load_run(where: str | Path, overrides: Iterable[str] = ()) -> Run:
    """The run of a YAML file, of a run's folder (its `run.yaml`), or of a shipped recipe's name.

    `overrides` are `dotted.key=value` with a YAML value; a number in the path indexes a list.
    Raises ConfigError with every problem found, each with its place and the nearest known key.
    """
    text, name = _read(str(where))
    return parse_run(text, name, overrides)


def parse_run(text: str, name: str, overrides: Iterable[str] = ()) -> Run:
    """`load_run` for a text already read; `name` is what errors call it."""
    raw = _parse_yaml(text, name)
    for item in overrides:
        _override(raw, item)
    try:
        return Run.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n  ".join(_explain(error)), where=name) from None


def _read(where: str) -> tuple[str, str]:
    path = Path(where)
    if "://" not in where and path.is_dir():
        path = path / "run.yaml"
        if not path.is_file():
            raise ConfigError("this folder holds no run.yaml, so it is not a run", where=where)
    if "://" not in where and path.is_file():
        try:
            return path.read_text(encoding="utf-8"), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"this run file cannot be read: {error}", where=where) from None
    if where in recipe_names():
        return (_recipes() / f"{where}.yaml").read_text(encoding="utf-8"), f"recipe {where}"
    if "://" in where:
        import fsspec

        uri = where if where.endswith((".yaml", ".yml")) else where.rstrip("/") + "/run.yaml"
        try:
            with fsspec.open(uri, "r", encoding="utf-8") as file:
                return file.read(), uri
        except FileNotFoundError:
            raise ConfigError("no such run file", where=uri) from None
    near = difflib.get_close_matches(where, recipe_names(), n=1)
    raise ConfigError(
        "no such run file, run folder or recipe",
        where=where,
        hint=f"did you mean {near[0]!r}?" if near else f"recipes: {', '.join(recipe_names())}",
    )


_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


def _parse_yaml(text: str, name: str) -> dict[str, Any]:
    try:
        raw = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {error}", where=name) from None
    if not isinstance(raw, dict):
        raise ConfigError("a run file is a mapping of keys", where=name)
    return _interpolate(raw, name)


class _Loader(yaml.SafeLoader):
    """YAML that reads numbers and booleans as YAML 1.2 does (1e-4 is a number, `off` a word) and refuses a key that is
    written twice."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise yaml.constructor.ConstructorError(None, None, "a key is a plain word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def _interpolate(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        return {key: _interpolate(item, name) for key, item in value.items()}
    if isinstance(value, list):
        return [_interpolate(item, name) for item in value]
    if not isinstance(value, str):
        return value

    def fill(match: re.Match[str]) -> str:
        found = os.environ.get(match[1], match[2])
        if found is None:
            raise ConfigError(
                f"the environment has no {match[1]}",
                where=name,
                hint=f"set it, or write ${{{match[1]}:-default}}",
            )
        return found

    return _VARIABLE.sub(fill, value)


def _override(raw: dict[str, Any], item: str) -> None:
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise ConfigError(f"{item!r} is no override", hint="write key=value, for example train.steps=100")
    *path, last = key.split(".")
    at: Any = raw
    for i, part in enumerate(path):
        if isinstance(at, list):
            at = at[_index(at, part, key)]
            if not isinstance(at, dict | list):
                raise ConfigError(f"{'.'.join(path[: i + 1])} holds a value, not keys", where=item)
            continue
        child = at.get(part)
        if isinstance(child, str) and part in ("schedule", "format"):  # the short form, by name alone
            child = at[part] = {"name": child}
        if child is None:
            child = at[part] = {}
        if not isinstance(child, dict | list):
            raise ConfigError(f"{'.'.join(path[: i + 1])} holds a value, not keys", where=item)
        at = child
    try:
        value = _interpolate(yaml.load(text, Loader=_Loader), item)
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {error}", where=item) from None
    if isinstance(at, list):
        at[_index(at, last, key)] = value
    else:
        at[last] = value
        if key in ("train.steps", "train.epochs") and value is not None:  # the two exclude each other: the later wins
            at.pop("epochs" if last == "steps" else "steps", None)


def _index(at: Sequence[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(at):
        raise ConfigError(f"{part!r} in {key} is not one of 0…{len(at) - 1}", where=key)
    return int(part)


# --------------------------------------------------------------------------------------------------------- explanations


def _explain(error: ValidationError) -> list[str]:
    return [_explain_one(e) for e in error.errors()]


def _explain_one(e: Any) -> str:
    loc = [str(part) for part in e["loc"]]
    kind, model = e["type"], _model_at(e["loc"])
    place = ".".join(_without_tags(e["loc"]))
    if kind == "extra_forbidden":
        known = sorted(model.model_fields) if model else []
        near = difflib.get_close_matches(loc[-1], known, n=1, cutoff=0.55)
        tail = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{place}: unknown key; {tail}"
    if kind == "missing":
        return f"{place}: this key is needed"
    if kind == "union_tag_invalid":
        known = [tag.strip("' ") for tag in e["ctx"]["expected_tags"].split(",")]
        near = difflib.get_close_matches(str(e["ctx"]["tag"]), known, n=1)
        tail = f"did you mean {near[0]!r}?" if near else f"one of: {', '.join(known)}"
        return f"{place}.name: {e['ctx']['tag']!r} is not known; {tail}"
    if kind == "union_tag_not_found":
        return f"{place}: needs a `name` that says which one it is"
    if kind == "value_error":
        return f"{place}: {e['ctx']['error']}" if place else str(e["ctx"]["error"])
    shown = repr(e["input"])
    return f"{place}: {e['msg'][0].lower()}{e['msg'][1:]} (here: {shown if len(shown) < 80 else shown[:77] + '…'})"


def _walk(loc: tuple[Any, ...]):
    """Yields (part of an error's location, whether it is a key of the file, the model that follows it)."""
    model: Any = Run
    for part in loc:
        if isinstance(part, int):
            yield part, True, model
            continue
        members = _members(model)
        if len(members) > 1 and (tagged := [m for m in members if _tag(m) == part]):
            model = tagged[0]
            yield part, False, model
            continue
        owner = members[0] if members else None
        field = owner.model_fields.get(part) if owner else None
        if owner and field is None and part in ("str", "int", "float", "literal['all-linear']", "list[str]"):
            yield part, False, model
            continue
        is_key = owner is not None
        model = field.annotation if field else None
        yield part, is_key or field is not None, model


def _without_tags(loc: tuple[Any, ...]) -> list[str]:
    parts = [str(part) for part, is_key, _ in _walk(loc) if is_key]
    return parts or [str(part) for part in loc]


def _model_at(loc: tuple[Any, ...]) -> type[BaseModel] | None:
    model: Any = Run
    for _, _, found in _walk(loc[:-1]):
        model = found
    members = _members(model)
    return members[0] if members else None


def _members(annotation: Any) -> list[type[BaseModel]]:
    """The models named anywhere in an annotation: Format → [TextFormat, …], list[Source] → [Source]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for arg in get_args(annotation) for m in _members(arg)]


def _tag(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("name")
    args = get_args(field.annotation) if field else ()
    return args[0] if args else None
