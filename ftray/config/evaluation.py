"""`evaluate`: what is asked of a model, how it answers, and by what its answers are judged."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from ftray.config.data import Source
from ftray.config.strict import Strict

MetricName = Literal[
    "e2e",
    "bleu",
    "nist",
    "meteor",
    "coco_rouge_l",
    "cider",
    "chrf",
    "rouge_1",
    "rouge_2",
    "rouge_l",
    "exact_match",
    "accuracy",
    "macro_f1",
    "numeric_answer",
    "valid_json",
    "json_schema",
    "distinct_1",
    "distinct_2",
    "words",
]
METRIC_NAMES: tuple[str, ...] = get_args(MetricName)[1:]
METRIC_GROUPS: dict[str, tuple[str, ...]] = {"e2e": METRIC_NAMES[:5]}
"""Names that stand for several: `e2e` is what the E2E challenge reports."""


class Decoding(Strict):
    max_tokens: int = Field(128, ge=1)
    """Tokens of an answer at most."""
    temperature: float = Field(0.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Of the most probable tokens, the fewest whose share of the probability reaches this; 1: all."""
    top_k: int = Field(0, ge=0)
    """The most probable tokens alone; 0: all."""
    seed: int = 0
    """Of draws, where `temperature` is not 0."""
    stop: list[str] = []
    """An answer ends before the first of these."""
    beams: int = Field(1, ge=1, le=64)
    """Answers that are followed at once, of which the most probable is given; 1: no search."""
    length_penalty: float = 1.0
    """With beams: the sum of log probabilities is divided by the length to this power."""
    no_repeat_ngram: int = Field(0, ge=0)
    """With beams: no n-gram of this order twice in an answer; 0: off."""

    @model_validator(mode="after")
    def _beams_alone(self) -> Decoding:
        if self.beams > 1 and (self.temperature or self.top_k or self.top_p < 1):
            raise ValueError("beams search for the most probable answer: temperature 0, top_p 1 and top_k 0 go with it")
        if self.beams == 1 and (self.no_repeat_ngram or self.length_penalty != 1.0):
            raise ValueError("no_repeat_ngram and length_penalty belong to a search: set decoding.beams above 1")
        return self


class Evaluation(Strict):
    rows: list[Source] = []
    """What is asked; empty: the run's held-out rows. Rows with one prompt are one question with several references."""
    limit: int | None = Field(None, ge=1)
    """The first questions alone; null: all."""
    loss_rows: int | None = Field(1000, ge=1)
    """The first rows alone have their loss taken; null: all."""
    metrics: list[MetricName] = []
    """By what answers are judged: names, or `e2e` for the E2E challenge's five. Empty: by losses alone, and nothing is
    generated."""
    decoding: Decoding = Decoding()
    examples: list[int] = [0]
    """Baselines: the base with so many training rows in its prompt; 0 is the base alone. Empty: no baseline."""
    choose: Literal["random", "similar"] = "random"
    """Which training rows: drawn once by the run's seed, or for each question those that share most words with it."""
    json_schema: dict[str, Any] | None = None
    """Of the metric `json_schema`."""
    samples: int = Field(1000, ge=100)
    """Bootstrap samples for intervals, and shuffles for tests."""

    @model_validator(mode="after")
    def _fits_together(self) -> Evaluation:
        if any(count < 0 for count in self.examples):
            raise ValueError("examples: a number of rows in the prompt cannot be negative")
        if ("json_schema" in self.metrics) != (self.json_schema is not None):
            raise ValueError("the metric json_schema and the key json_schema belong together")
        return self
