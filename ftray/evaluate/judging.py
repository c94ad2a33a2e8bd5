"""A judge over kept answers: what it says becomes part of the result, and its failure costs nothing of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ftray.errors import ConfigError
from ftray.evaluate.asking import OnEvent
from ftray.evaluate.endpoint import Endpoint
from ftray.evaluate.judge import Judged, Pair, judge
from ftray.evaluate.statistics import interval, resamples


def judge_of(text: str, metrics: Sequence[str]) -> Endpoint:
    """The judge at `https://host/v1#model`. Raises ConfigError, before anything is asked, also where there would be no
    answers to judge."""
    if not metrics:
        raise ConfigError(
            "there are no answers to judge",
            where="evaluate.metrics",
            hint="name a metric (words, say): they are written",
        )
    return Endpoint.of(text)


def verdicts(
    endpoint: Endpoint,
    found: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    prices: tuple[float, float] | None,
    on_event: OnEvent,
) -> Iterator[dict[str, Any]]:
    """What the judge makes of each system against the first, as plain values. `found` and `rows`: as `write_result`
    wrote them. `prices`: of a million tokens that it reads and writes. Raises RunError when the endpoint does not
    answer."""
    first, *others = [system["name"] for system in found["systems"]]
    for name in others:
        on_event({"kind": "status", "text": f"{endpoint.model} judges {name} and {first}"})
        pairs = [
            Pair(row["prompt"], row["answers"][name]["answer"], row["answers"][first]["answer"], row["references"][0])
            for row in rows
        ]

        def told(count: int) -> None:
            on_event({"kind": "progress", "what": "judged", "done": count, "total": len(rows), "unit": ""})

        judged = judge(endpoint, pairs, done=told)
        yield {"system": name, "than": first} | _plain(judged, found["settings"]["samples"], found["seed"], prices)


def _plain(judged: Judged, samples: int, seed: int, prices: tuple[float, float] | None) -> dict[str, Any]:
    around = interval(judged.measured, resamples(len(judged.verdicts), samples, seed))
    counts = judged.counts()
    return {
        "wins": round(judged.wins, 6),
        "low": round(around.low, 6) if around else None,
        "high": round(around.high, 6) if around else None,
        "better": counts["first"],
        "tie": counts["tie"],
        "worse": counts["second"],
        "swayed": judged.swayed,
        "unclear": judged.unclear,
        "prompt_tokens": judged.prompt_tokens,
        "answer_tokens": judged.answer_tokens,
        "cost": round(judged.cost(*prices), 6) if prices else None,
    }


def judged_text(judged: dict[str, Any]) -> str:
    """`tuned against base: better 40, tie 5, worse 3; wins 0.885 [0.80, 0.95]; …`"""
    text = f"{judged['system']} against {judged['than']}, judged: better {judged['better']}, tie {judged['tie']}, worse"
    text += f" {judged['worse']}; wins {judged['wins']:.3f} [{judged['low']:.3f}, {judged['high']:.3f}]"
    if judged["swayed"]:
        text += f"; {judged['swayed']} of the ties went with the place"
    if judged["unclear"]:
        text += f"; {judged['unclear']} judgements without a verdict"
    text += f"; the judge read {judged['prompt_tokens']:,} tokens and wrote {judged['answer_tokens']:,}"
    return f"{text}, which cost {judged['cost']:,.4f}" if judged.get("cost") is not None else text
