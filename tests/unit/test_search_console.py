"""What a search prints: lines in a log, one table on a terminal, and the summary."""

from __future__ import annotations

import io
import json

import pytest

from ftray.cli.console import PlainConsole
from ftray.cli.search_console import SearchConsole, SearchTerminal, open_search_console, parameters_text
from ftray.cli.tune import outcome_text

PARAMETERS = {"train.learning_rate": 0.0031234, "method.rank": 8}
EVENTS = [
    {"kind": "search", "total": 4, "metric": ["loss"], "mode": ["min"], "trials": [
        {"index": 0, "parameters": PARAMETERS, "state": "finished", "steps": 40, "values": {"loss": 1.5}}]},
    {"kind": "trial", "index": 1, "parameters": PARAMETERS},
    {"kind": "trial_started", "index": 1, "steps": 40, "step": 0},
    {"kind": "trial_result", "index": 1, "step": 10, "loss": 2.0},
    {"kind": "trial_result", "index": 1, "step": 20, "loss": 1.25},
    {"kind": "trial_failed", "index": 1, "error": "a worker was lost", "aside": False},
    {"kind": "trial_finished", "index": 1, "summary": {}},
    {"kind": "trial", "index": 2, "parameters": PARAMETERS},
    {"kind": "trial_started", "index": 2, "steps": 40, "step": 20},
    {"kind": "trial_result", "index": 2, "step": 30, "loss": None},
    {"kind": "trial_stopped", "index": 2, "step": 30},
    {"kind": "trial_failed", "index": 3, "error": "no such layer", "aside": True},
]  # fmt: skip


def printed(console: PlainConsole, out: io.StringIO) -> list[str]:
    with console:
        for event in EVENTS:
            console(event)
    return out.getvalue().splitlines()


def test_a_log_has_a_line_for_what_matters() -> None:
    lines = printed(SearchConsole(out := io.StringIO()), out)
    assert lines == [
        "going on with 1 trial that was begun",
        "trial 0001 starts: learning_rate=0.00312 rank=8",
        "trial 0001 at step 20: loss 1.2500, the best so far",
        "warning: trial 0001 failed, and is tried again: a worker was lost",
        "trial 0001 finished: loss 1.2500",
        "trial 0002 starts after step 20: learning_rate=0.00312 rank=8",
        "trial 0002 stopped at step 30",
        "warning: trial 0003 failed and is set aside: no such layer",
    ]


def test_a_terminal_has_one_table() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    console = open_search_console(out=out)
    assert isinstance(console, SearchTerminal)
    printed(console, out)
    shown = out.getvalue()
    assert "warning: trial 0003 failed and is set aside: no such layer" in shown
    assert "trial 0001 starts" not in shown, "the table tells it"
    assert console.standing.counts() == "4 of 4 trials: 2 finished · 1 stopped · 1 set aside"
    assert [row.index for row in console.standing.table_rows(2)] == [0, 1]


def test_programs_get_every_event() -> None:
    out = io.StringIO()
    lines = printed(open_search_console(as_json=True, out=out), out)
    assert [json.loads(line) for line in lines] == EVENTS


def test_names_are_as_short_as_they_may_be() -> None:
    text = parameters_text({"method.name": "lora", "train.schedule.name": "wsd", "train.schedule": {"name": "cosine"}})
    assert text == "method.name=lora schedule.name=wsd schedule=cosine"


@pytest.mark.parametrize("artefact", ["s/trials/0001/artefact", None])
def test_the_summary(artefact: str | None) -> None:
    best = {"index": 1, "values": {"loss": 1.25, "memory": 0.5}, "step": 20, "parameters": PARAMETERS, "folder": "s/t"}
    found = {"trials": 4, "finished": 2, "stopped": 1, "aside": 1, "open": 0, "steps": 110, "seconds": 75.0}
    found |= {"reason": "finished", "best": best | {"artefact": artefact}, "best_file": "s/best.yaml"}
    text = outcome_text(found | {"metric": ["loss", "memory"], "front": [best, best]}, "s/report.html")
    assert "4: 2 finished, 1 stopped early, 1 set aside" in text
    assert "trial 0001: loss 1.2500, memory 0.5000 at step 20" in text
    assert "2 trade-offs" in text
    assert text.endswith("ftray publish s/t --as NAME" if artefact else "ftray train s/best.yaml")
