"""The command line: exit codes, what is printed where, and the plain console from a list of events."""

from __future__ import annotations

import io
import json
import math
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console as RichConsole

import ftray.cli.commands.runs as commands_of_runs
from ftray.cli.check import batch_text, learning_text, steps_text
from ftray.cli.console import JsonConsole, PlainConsole, TerminalConsole, open_console
from ftray.cli.data import describe, histogram, marked, show_sample
from ftray.cli.main import call
from ftray.cli.quickstart import answers_text, next_text, quickstart_text
from ftray.cli.signals import stop_on_signal
from ftray.cli.train import summary_text, train_run
from ftray.cli.words import count, duration, facts, json_text, percent, size, some, table
from ftray.config import Run, parse_run
from ftray.errors import RunError, RunStopped

RUN = """
name: a
model: {path: meta-llama/Llama-3.1-8B}
method: {name: qlora}
data: {sources: [{path: ROWS, format: text}]}
train: {steps: 100}
"""


@pytest.fixture
def run_file(tmp_path: Path) -> str:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n' * 3)
    (tmp_path / "run.yaml").write_text(RUN.replace("ROWS", str(tmp_path / "rows.jsonl")))
    return str(tmp_path / "run.yaml")


def a_run(*overrides: str) -> Run:
    return parse_run(RUN, "a.yaml", overrides)


# ------------------------------------------------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    "command", ["quickstart", "check", "data", "train", "tune", "evaluate", "report", "generate", "create", "recipes"]
)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call([command, "--help"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 8


def test_check_prints_the_run_and_its_arithmetic(run_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["check", run_file, "train.micro_batch_rows=4", "workers.gpu_memory_gib=24"]) == 0
    told = capsys.readouterr()
    assert not told.err
    for part in (
        "learning_rate: 0.0002",  # a default of the resolved run
        "16 rows a step = 1 worker × 4 micro-batches of 4",
        "8,030,261,248 parameters",
        "41,943,040 of 8,072,204,288 parameters, 0.52 %",
        "rows.jsonl: 1 file, 42 B",
        "does NOT fit 24 GiB",
        "train.micro_batch_rows=2",
    ):
        assert part in told.out
    assert "\x1b" not in told.out
    assert re.fullmatch(r"NOT ready: [\d.]+ GiB does NOT fit 24 GiB", told.out.splitlines()[-1])


def test_the_last_line_of_a_check_is_its_verdict(run_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["check", run_file, "workers.gpu_memory_gib=80"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "ready: fits 80 GiB"
    assert call(["check", run_file]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("ready: takes ")


def test_rows_beyond_the_positions_of_a_base(run_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["check", run_file, "model.path=gpt2", "method=lora", "data.max_length=4096"]) == 2
    told = capsys.readouterr().err
    assert "data.max_length: rows of up to 4096 tokens are more than the base's 1024 positions" in told
    assert call(["check", run_file, "model.path=embedded", "data.max_length=4096"]) == 0
    assert "rows of up to 4,096 tokens reach beyond the 1,024 positions" in capsys.readouterr().out
    assert call(["check", run_file, "model.path=embedded"]) == 0
    assert "reach beyond" not in capsys.readouterr().out


def test_what_the_base_or_this_machine_lacks_is_told_before_anything_starts(
    run_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = ["model.path=embedded", "method={name: prompt, tokens: 1000}", "data.max_length=100"]
    zero3 = "{zero: 3, offload_optimizer: nvme, offload_parameters: nvme, nvme_path: NVME}"
    (tmp_path / "file").write_text("")
    no_folder = f"strategy={zero3.replace('NVME', str(tmp_path / 'file/nvme'))}"
    for command in ("check", "train"):
        started = time.perf_counter()
        assert call([command, run_file, *long]) == 2
        assert (
            "1000 virtual tokens and rows of up to 100 are more than the base's 1024 positions"
            in capsys.readouterr().err
        )
        assert call([command, run_file, "model.path=embedded", "method={name: full}", no_folder]) == 2
        told = capsys.readouterr().err
        assert f"strategy.nvme_path: {tmp_path / 'file/nvme'} cannot be written to" in told
        assert "Not a directory" in told
        assert time.perf_counter() - started < 30
    in_place = f"strategy={zero3.replace('NVME', str(tmp_path / 'new/nvme'))}"
    assert call(["check", run_file, "model.path=embedded", "method={name: full}", in_place]) == 0
    assert not (tmp_path / "new").exists(), "a check leaves nothing"


def test_check_as_json(run_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["check", run_file, "--json", "workers.gpu_memory_gib=24", "train.micro_batch_rows=4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plan"]["trained_parameters"] == 41_943_040
    assert found["advice"] == ["train.micro_batch_rows=2"]
    assert found["batch"]["accumulation"] == 4
    assert found["data"][0]["files"] == 1
    assert found["run"]["train"]["batch_rows"] == 16


def test_missing_data_fail_the_check_with_the_key(run_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["check", run_file, "data.sources.0.path=nowhere/*.jsonl"]) == 2
    told = capsys.readouterr()
    assert "nowhere/*.jsonl: MISSING" in told.out
    assert told.out.splitlines()[-1] == "NOT ready: data.sources.0.path: no such data"
    assert told.err.startswith("error: run a: no such data: data.sources.0.path nowhere/*.jsonl")


def test_globs_folders_and_what_is_elsewhere(run_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = f"[{{path: '{tmp_path}/*.jsonl', format: text}}, {{path: '{tmp_path}', format: text}},"
    sources += " {path: 's3://bucket/x.jsonl', format: text}, {path: some/set, reader: datasets, format: text}]"
    assert call(["check", run_file, f"data.sources={sources}", "--json"]) == 0
    assert [s["files"] for s in json.loads(capsys.readouterr().out)["data"]] == [1, 2, None, None]


def test_the_schema_of_the_run_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["check", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["properties"]["seed"]["description"].startswith("Order of rows")


def test_mistakes_are_told_once_without_a_traceback(run_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["check", run_file, "train.stepps=3"]) == 2
    told = capsys.readouterr()
    assert told.err == f"error: {run_file}: train.stepps: unknown key; did you mean 'steps'?\n"
    assert not told.out
    assert call(["check", run_file, "train.stepps=3", "--verbose"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["chekc"], ["check"], ["check", "--nope"], ["data", "a", "--samples", "-1"], ["train", "no-such-run"]]
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(arguments) == 2
    told = capsys.readouterr().err
    assert told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (RunStopped("stopped at step 7", hint="the same command goes on"), 75, "stopped at step 7\n"),
        (RunError("a worker died", where="runs/a"), 3, "error: runs/a: a worker died\n"),
    ],
)
def test_exit_codes_of_runs(
    error: Exception, code: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(commands_of_runs, "load", fail)
    assert call(["train", "x"]) == code
    assert capsys.readouterr().err.startswith(told)


def test_a_bug_shows_its_traceback_and_asks_for_a_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("x")

    monkeypatch.setattr(commands_of_runs, "load", fail)
    with pytest.raises(ZeroDivisionError):
        call(["train", "x"])
    assert "bug in ftray" in capsys.readouterr().err


def test_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["recipes"]) == 0
    assert "quickstart-cheese" in capsys.readouterr().out
    assert call(["recipes", "--json"]) == 0
    assert "e2e-qlora-tiny" in json.loads(capsys.readouterr().out)
    assert call(["recipes", "quickstart-cheese"]) == 0
    assert "name: quickstart-cheese" in capsys.readouterr().out
    assert call(["recipes", "quickstart-chese"]) == 2
    assert "did you mean 'quickstart-cheese'" in capsys.readouterr().err


def processor_seconds(command: list[str], code: int) -> float:
    """What a command that ends with this exit code takes of the processors."""
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == code
    return usage.ru_utime + usage.ru_stime


def test_validation_is_quick(run_file: str) -> None:
    """Under a second of processor time. That too grows on a busy machine, so the least of a few tries counts."""
    for override, code in (("train.x=1", 2), ("train.steps=7", 0)):
        command = [sys.executable, "-m", "ftray.cli.main", "check", run_file, override]
        taken = [processor_seconds(command, code)]
        while min(taken) >= 1.0 and len(taken) < 5:
            taken.append(processor_seconds(command, code))
        assert min(taken) < 1.0, taken


# ------------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    ("rows", "workers", "micro", "text"),
    [
        (16, 2, 8, "16 rows a step = 2 workers × 1 micro-batch of 8"),
        (64, 4, 4, "64 rows a step = 4 workers × 4 micro-batches of 4"),
        (1, 1, 8, "1 row a step = 1 worker × 1 rows, in 1 micro-batch of 1"),
        (17, 2, 8, "17 rows a step = 2 workers × 9 or 8 rows, in 2 micro-batches of at most 8"),
        (12, 2, 4, "12 rows a step = 2 workers × 6 rows, in 2 micro-batches of 3"),
    ],
)
def test_batch_text(rows: int, workers: int, micro: int, text: str) -> None:
    run = a_run(f"train.batch_rows={rows}", f"workers.count={workers}", f"train.micro_batch_rows={micro}")
    assert batch_text(run).split("\n")[0] == text


def test_steps_text() -> None:
    assert steps_text(a_run("train.schedule.warmup=0.03")).startswith(
        "100 steps\nrate up to 0.0002 in 3 steps, then cosine to 0\n"
    )
    epochs = steps_text(a_run("train.epochs=1", "train.schedule={name: linear, warmup: 0.1, final: 0.1}"))
    assert epochs.startswith("1 epoch; steps are known once the rows are counted\n")
    assert "rate up to 0.0002 in 10 % of the steps, then linear to 2e-05" in epochs
    limited = steps_text(a_run("train.epochs=2", "data.sources.0.limit=100"))
    assert limited.startswith("2 epochs of at most 100 rows: at most 14 steps\n")
    assert "never reaches its peak" not in limited
    short = ("train.epochs=2", "data.sources.0.limit=100", "train.schedule.warmup=14")
    assert "never reaches its peak" in steps_text(a_run(*short))


def test_learning_text() -> None:
    assert learning_text(a_run()) == "sft by adamw, β 0.9 and 0.999"
    assert learning_text(a_run("train.optimizer=lion")) == "sft by lion, β 0.9 and 0.99"
    divided = a_run("method=lora", "strategy={zero: 3, offload_parameters: cpu}")
    assert learning_text(divided) == "sft by adamw, β 0.9 and 0.999, ZeRO 3, weights on the host"
    assert learning_text(a_run("train.optimizer=sgd")) == "sft by sgd"


def test_steps_text_says_when_commits_come() -> None:
    held_out = ("data.held_out_fraction=0.1", "train.evaluate_every=20")
    for overrides, said in (
        ((), "commit at the end, and after 10 minutes without one"),
        (held_out, "commit at the end, and every 20 steps, and after 10 minutes without one"),
        ((*held_out, "train.commit_every=7"), "commit at the end, and every 7 steps"),
    ):
        assert steps_text(a_run(*overrides)).splitlines()[-1] == said


def test_words() -> None:
    assert (count(1234567), some(1, "row"), some(2000, "row")) == ("1,234,567", "1 row", "2,000 rows")
    assert (percent(0.005223), percent(0.5), percent(1.0)) == ("0.522 %", "50 %", "100 %")
    assert [duration(s) for s in (0.4, 42, 185, 7800, 273600, None, float("inf"))] == [
        "0.4 s", "42 s", "3 min 05 s", "2 h 10 min", "3 d 4 h", "?", "?",
    ]  # fmt: skip
    assert [size(n) for n in (512, 2048, 3 << 30)] == ["512 B", "2.0 KiB", "3.0 GiB"]
    assert table(("a", "n"), [("x", 1), ("long", 20)], right=(1,)) == "a      n\n────  ──\nx      1\nlong  20"
    assert facts([("a", "1\n2"), ("bc", "3")], indent=1) == " a   1\n     2\n bc  3"


# ---------------------------------------------------------------------------------------------------------- console

START = {
    "kind": "start", "steps": 20, "step": 0, "batch_rows": 16, "workers": 2, "accumulation": 1, "device": "cpu",
    "trainable_parameters": 1000, "parameters": 10_000, "unquantized": [f"layers.{i}.up" for i in range(5)],
}  # fmt: skip


def a_step(number: int, **more: Any) -> dict[str, Any]:
    return {
        "kind": "step", "step": number, "epoch": 0.1, "cursor": [0, 16], "loss": 2.0 - number / 20,
        "learning_rate": 1e-3, "grad_norm": 1.0, "target_tokens": 100, "tokens": 200, "seconds": 0.5,
        "target_tokens_per_second": 200.0, "skipped": 0, "time": 1.0, **more,
    }  # fmt: skip


EVENTS = [
    {"kind": "status", "text": "looking at the data"},
    {"kind": "progress", "what": "prepare", "done": 10, "total": 100, "unit": "rows"},
    {"kind": "progress", "what": "prepare", "done": 50, "total": 100, "unit": "rows"},
    {"kind": "progress", "what": "prepare", "done": 100, "total": 100, "unit": "rows"},
    START,
    {"kind": "evaluation", "step": 0, "loss": 4.4, "perplexity": 81.45, "target_tokens": 5000, "seconds": 3.14},
    *[a_step(n) for n in range(1, 11)],
    {"kind": "warning", "text": "slow"},
    {"kind": "warning", "text": "slow"},
    {"kind": "skip", "step": 11, "rows": ["a:1", "a:2", "a:3", "a:4"], "reason": "the loss is nan"},
    {"kind": "commit", "step": 15, "folder": "runs/a/commits/step-00000015"},
    {"kind": "resume", "step": 15},
    {"kind": "a kind of a later version", "x": 1},
    *[a_step(n, skipped=1) for n in range(16, 21)],
    {"kind": "end", "reason": "finished"},
]


def rendered(console_of: Any, events: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    with console_of(out) as console:
        for event in events:
            console(event)
    return out.getvalue()


def test_plain_lines() -> None:
    assert rendered(PlainConsole, EVENTS).splitlines() == [
        "looking at the data",
        "prepare: 10 of 100 rows",
        "prepare: 100 of 100 rows",
        "training: 20 steps of 16 rows (2 workers × 1 micro-batch) on cpu",
        "trained: 1,000 of 10,000 parameters, 10 %",
        "warning: NF4 cannot hold 5 layers, left unquantized: layers.0.up, layers.1.up, layers.2.up and 2 more",
        "held-out at step 0 (the base): loss 4.4000, perplexity 81.45 over 5,000 target tokens in 3.1 s",
        "step 10/20 · loss 1.5000 · rate 1.00e-03 · 200 target tokens/s · 5.0 s left",
        "warning: slow",
        "step 11 skipped, the loss is nan; its rows: a:1, a:2, a:3 and 1 more",
        "committed step 15: runs/a/commits/step-00000015",
        "going on after step 15, the last commit",
        "step 20/20 · loss 1.0000 · rate 1.00e-03 · 200 target tokens/s · 1 skipped · done",
        "finished",
    ]


def test_a_log_has_no_ansi_and_its_lines_come_every_n_steps() -> None:
    told = rendered(lambda out: open_console(every=7, title="cheese", out=out), EVENTS)
    assert "\x1b" not in told
    assert "\r" not in told
    assert all(line.startswith("[cheese] ") for line in told.splitlines())
    assert [line.split()[2] for line in told.splitlines() if " · loss " in line] == ["7/20", "20/20"]


def test_json_lines() -> None:
    told = rendered(JsonConsole, EVENTS)
    assert [json.loads(line) for line in told.splitlines()] == EVENTS


def test_json_has_no_word_for_what_is_no_number() -> None:
    skipped = {"kind": "step", "loss": float("nan"), "sums": [1.0, -math.inf], "name": "caf\udce9", "path": Path("a")}
    told = rendered(JsonConsole, [skipped])
    assert json.loads(told, parse_constant=pytest.fail) == {
        "kind": "step", "loss": None, "sums": [1.0, None], "name": "caf\udce9", "path": "a",
    }  # fmt: skip
    assert told.isascii()
    assert json_text({"a": (math.nan, "ä")}, ensure_ascii=False) == '{"a": [null, "ä"]}'


def test_the_terminal_shows_progress_and_keeps_the_lines() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    console = open_console(out=out)
    assert isinstance(console, TerminalConsole)
    console.display.rich = RichConsole(file=out, force_terminal=True, width=100, highlight=False, soft_wrap=True)
    with console:
        for event in EVENTS:
            console(event)
    told = out.getvalue()
    assert "looking at the data" in told
    assert "held-out 4.4000" in told
    assert "200 target tokens/s" in told
    assert told.rstrip().endswith("finished")


# ----------------------------------------------------------------------------------------------------- data, summary


class Letters:
    """A tokenizer whose tokens are letters; the first of a text loses its leading space, as SentencePiece's do."""

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(map(chr, tokens)).removeprefix(" ")


def test_target_tokens_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    tokens = [ord(c) for c in " ab cd ef"]
    parts = marked(Letters(), tokens, [False] * 3 + [True] * 3 + [False] * 3)
    assert parts == [("ab", False), (" cd", True), (" ef", False)]
    show_sample(parts)
    assert capsys.readouterr().out == "ab⟦ cd⟧ ef\n"
    assert marked(Letters(), [], []) == []


def test_histogram() -> None:
    told = histogram({"edges": [0.0, 10.0, 20.0, 30.0], "counts": [5, 10, 0]}, 30)
    lines = told.splitlines()
    assert lines[0] == "tokens a row, at most 30"
    assert len(lines) == 3  # nothing is longer than 20
    assert lines[1].count("█") * 2 == lines[2].count("█")
    assert histogram({"edges": [0, 1], "counts": [0]}, 8) == "no rows"
    many = histogram({"edges": list(range(65)), "counts": [1] * 64}, 64).splitlines()
    assert len(many) == 17
    assert sum(int(line.split()[-1]) for line in many[1:]) == 64


def test_data_description() -> None:
    found = {
        "digest": "d" * 64, "seconds": 2.0, "max_length": 32,
        "rows": {"train": 90, "held_out": 10, "rejected": 2, "truncated": 3, "read": 102},
        "tokens": {"train": 900, "held_out": 100}, "target_tokens": {"train": 450, "held_out": 50},
        "length_histogram": {"edges": [0, 16, 32], "counts": [40, 50]},
        "rejected_by_reason": {"too long": 2}, "sources": [{"path": "rows.jsonl", "rows": 100, "rejected": 2}],
        "rejected_first": [{"file": "rows.jsonl", "row": 7, "reason": "too long", "sample": "x"}],
    }  # fmt: skip
    told = describe(a_run(), found, "runs/a/data/dd")
    for part in (
        "90 to train on, 10 held out; 102 read; 3 truncated",
        "900, of which 450 (50 %) are targets",
        "2 rows (1.96 % of those read)",
        "2 × too long",
        "rows.jsonl:7: too long: x",
        "runs/a/rejected.jsonl",
    ):
        assert part in told


SUMMARY: dict[str, Any] = {
    "name": "a", "folder": "runs/a", "artefact": "runs/a/artefact", "steps": 100, "seconds": 61.0, "base_loss": 4.0,
    "final_loss": 1.1, "best_loss": 0.9, "best_step": 80, "trainable_parameters": 10, "parameters": 1000,
    "artefact_step": 90, "artefact_loss": 1.0,
    "target_tokens": 5, "target_tokens_per_second": 640.0, "skipped_steps": 1, "peak_memory_gib": 0.5,
    "reason": "finished", "method": "qlora", "workers": 2, "resumed_from": 50,
}  # fmt: skip


def test_summary() -> None:
    told = summary_text(SUMMARY, "runs/a/report.html")
    for part in (
        "100 in 1 min 01 s (finished)",
        "4.0000 → 1.0000, 25 % of the base's, at step 90",
        "after step 50",
        "640 target tokens/s on 2 workers",
        "runs/a/artefact",
        "runs/a/report.html",
        "with PEFT",
    ):
        assert part in told
    nothing = dict.fromkeys(("base_loss", "best_loss", "final_loss", "artefact_loss", "resumed_from"))
    bare = summary_text(SUMMARY | nothing | {"method": "full", "workers": 1}, None)
    assert "on 1 worker\n" in bare
    assert "held-out" not in bare
    assert "with transformers" in bare


def test_quickstart_table() -> None:
    told = quickstart_text({"cheese": SUMMARY | {"report": "r.html"}, "restaurant": SUMMARY | {"report": None}})
    head, _, cheese, restaurant, _ = told.splitlines()
    assert head.split() == ["tenant", "base", "loss", "tuned", "loss", "ratio", "seconds", "artefact"]
    assert cheese.split() == ["cheese", "4.0000", "1.0000", "0.25", "61", "runs/a/artefact"]
    assert restaurant.startswith("restaurant")


def test_quickstart_answers_and_what_comes_next() -> None:
    told = answers_text({"cheese": {"question": "Brie?", "base": "No.", "cheese": "Ah, my friend! " * 10}})
    asked, base, cheese, *rest = told.splitlines()
    assert asked.split() == ["asked", "Brie?"]
    assert base.split() == ["base", "No."]
    assert cheese.startswith("cheese  Ah, my friend!")
    assert rest[0].startswith("        Ah")
    told = next_text({"cheese": SUMMARY | {"report": "r.html"}, "restaurant": SUMMARY | {"report": None}}, "s.yaml")
    assert told.splitlines()[0].split() == ["report", "of", "cheese", "r.html"]
    assert "ftray serve s.yaml" in told


# ---------------------------------------------------------------------------------------------------------- signals


def test_the_first_signal_asks_and_the_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    said: list[str] = []
    with stop_on_signal(said.append) as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(5)
    assert signal.getsignal(signal.SIGTERM) is before
    for _ in range(100):
        if said:
            break
        time.sleep(0.01)
    assert said[0].startswith("SIGTERM: stopping after this step")


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        (["status", "progress"], "SIGINT: stopping; training has not begun yet; once more leaves at once"),
        (["progress", "start", "step"], "SIGINT: stopping after this step, with a commit; once more leaves at once"),
    ],
)
def test_what_a_signal_comes_to(monkeypatch: pytest.MonkeyPatch, kinds: list[str], said: str) -> None:
    """While rows are prepared there is no step to wait for, and none to commit."""

    def train(_run: Run, *, on_event: Any, stop: threading.Event, verbose: bool) -> None:
        for kind in kinds:
            on_event({"kind": kind})
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.wait(5)
        raise RunStopped("stopped")

    told: queue.Queue[str] = queue.Queue()
    monkeypatch.setattr("ftray.train.launch.train", train)
    with pytest.raises(RunStopped):
        train_run(a_run(), lambda event: told.put(event.get("text")), verbose=False)  # type: ignore[arg-type]
    while (text := told.get(timeout=5)) is None:
        pass
    assert text == said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_leaves_at_once(number: int) -> None:
    script = (
        "import time\nfrom ftray.cli.signals import stop_on_signal\n"
        "with stop_on_signal(lambda text: print(text, flush=True)) as stop:\n"
        "    print('ready', flush=True)\n    time.sleep(60)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert "stopping after this step" in process.stdout.readline()
    process.send_signal(number)
    assert process.wait(10) == 128 + number
    process.stdout.close()
