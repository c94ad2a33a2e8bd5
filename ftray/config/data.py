"""`data`: which rows, and how a row becomes tokens."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Union

from pydantic import BeforeValidator, Field, model_validator

from ftray.config.strict import Strict, by_name


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


class PreferenceFormat(Strict):
    """A prompt with a better and a worse completion, for `objective: dpo`."""

    name: Literal["preference"]
    prompt: str = "prompt"
    """Column of the prompt."""
    chosen: str = "chosen"
    """Column of the better completion."""
    rejected: str = "rejected"
    """Column of the worse one."""
    chat: bool = False
    """True: the prompt becomes a user turn and each completion the assistant's, in the tokenizer's chat template."""


Format = Annotated[
    Union[TextFormat, PromptCompletionFormat, InstructionFormat, MessagesFormat, PreferenceFormat],  # noqa: UP007
    Field(discriminator="name"),
    BeforeValidator(by_name),
]


_FILE_NAME = re.compile(r"^embedded:|\.(jsonl|ndjson|json|csv|tsv|parquet|pq|txt|md)(\.(gz|bz2|zst|xz))?$")


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
    """Split of a `datasets` source, or of a folder written by `save_to_disk`."""
    subset: str | None = None
    """Configuration name of a hub data set; null: its default."""
    limit: int | None = Field(None, ge=1)
    """Use the first rows only; null: all."""
    weight: float = Field(1.0, gt=0)
    """Copies of each row in an epoch: 2 sees every row twice, 0.5 half of them, another half in each epoch. Of rows to
    train on alone."""

    @property
    def is_file(self) -> bool:
        """By its name or reader it is a file or several, and no Hugging Face data set. A folder may be either."""
        return self.reader not in ("auto", "datasets") or bool(_FILE_NAME.search(self.path.lower()))


class Data(Strict):
    sources: list[Source] = Field(min_length=1)
    """What to train on. Several sources are mixed by their weights."""
    held_out: list[Source] = []
    """What to evaluate on, from files of its own. Give this or `held_out_fraction`."""
    held_out_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of `sources` kept back for evaluation, chosen by the row's content, so that equal rows stay on one side."""
    max_length: int = Field(1024, ge=8)
    """Tokens a row at most; of a preference, tokens of each of its two sides."""
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
        if isinstance(self.max_rejected, float) and self.max_rejected >= 1:
            raise ValueError(f"max_rejected {self.max_rejected} is neither a whole number of rows nor a share below 1")
        return self
