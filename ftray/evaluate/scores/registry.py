"""Metrics by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from ftray.config.evaluation import METRIC_GROUPS, METRIC_NAMES
from ftray.evaluate.scores import coco, mteval, text
from ftray.evaluate.scores.metric import Metric, References

KINDS: dict[str, type[Metric]] = {
    kind.name: kind
    for kind in (
        mteval.Bleu,
        mteval.Nist,
        coco.Meteor,
        coco.CocoRougeL,
        coco.Cider,
        text.Chrf,
        text.Rouge1,
        text.Rouge2,
        text.RougeL,
        text.ExactMatch,
        text.Accuracy,
        text.MacroF1,
        text.NumericAnswer,
        text.ValidJson,
        text.JsonSchema,
        text.Distinct1,
        text.Distinct2,
        text.Words,
    )
}
assert tuple(KINDS) == METRIC_NAMES, "ftray.config.evaluation names the metrics for the run file"


def expanded(names: Sequence[str]) -> list[str]:
    """Groups (`e2e`) become their metrics; each name once, in order."""
    return list(dict.fromkeys(metric for name in names for metric in METRIC_GROUPS.get(name, (name,))))


@contextmanager
def opened(
    names: Sequence[str], references: References, json_schema: dict[str, Any] | None = None
) -> Iterator[list[Metric]]:
    """The metrics over these references, until the end of the block. Raises UserError where a package or Java is
    missing, before anything is generated."""
    with ExitStack() as stack:
        metrics = []
        for name in expanded(names):
            metric = (
                text.JsonSchema(references, json_schema or {}) if name == "json_schema" else KINDS[name](references)
            )
            stack.callback(metric.close)
            metrics.append(metric)
        yield metrics
