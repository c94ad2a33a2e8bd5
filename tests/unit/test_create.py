"""`ftray create` against a teacher that times out, breaks off, repeats itself and limits: real HTTP on loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import wait
from pathlib import Path
from typing import Any
from urllib.request import OpenerDirector

import pytest

from ftray.cli.main import call
from ftray.config.creation import Creation, Filters, creation_names, load_creation
from ftray.errors import ConfigError, RunStopped
from ftray.evaluate import endpoint
from ftray.evaluate.calls import objects_in
from ftray.evaluate.create import create
from ftray.evaluate.endpoint import EndpointRefused
from ftray.evaluate.questions import Asked
from ftray.evaluate.sieve import Sieve
from ftray.manifest import sha256
from tests.teacher import Teacher, as_answer, honest_row

COLUMNS = ("instruction", "output")


def recipe(asked: Teacher, folder: Path, rows: int | None = 24, **changes: Any) -> Creation:
    raw: dict[str, Any] = {
        "name": "made",
        "output": str(folder),
        "rows": rows,
        "teacher": {"url": asked.url, "model": "t", "at_once": 4, "timeout_seconds": 60, "tries": 3},
        "ask": {
            "name": "instructions",
            "persona": "You know {topic}.",
            "topics": ["brie", "feta", "gouda"],
            "prompt": 'Write {count} about {topic} as {{"rows": []}} with {columns}, set {number}.',
            "rows_per_call": 2,
        },
        "filters": {"language": "en"},
    }
    for key, value in changes.items():
        raw[key] = {**raw[key], **value} if isinstance(value, dict) and key in raw and key != "ask" else value
    return Creation.model_validate(raw)


def honest(number: int, attempt: int) -> str:
    return as_answer([honest_row(2 * number), honest_row(2 * number + 1)])


def rude(number: int, attempt: int) -> str | int | float:
    """Every trouble of real teachers, each at calls of its own."""
    rows = [honest_row(2 * number), honest_row(2 * number + 1)]
    match number % 10:
        case 1 if attempt == 0:
            return 429
        case 2:  # again what it said first
            return as_answer([honest_row(0), honest_row(1)])
        case 3 if attempt == 0:
            return 60.0  # longer than anybody waits
        case 4:
            return as_answer(rows)[:-40]  # the second row breaks off
        case 5:
            return "I am sorry, I cannot do that."
        case 6:
            return f"Of course!\n```json\n{json.dumps(rows, indent=1)}\n```\nMore?"
        case 7:
            french = {"instruction": "Quel fromage va le mieux avec le vin rouge de la région ?"}
            return as_answer([french | {"output": "Le fromage de la ferme, avec du pain et de la confiture."}, rows[1]])
        case 8 if attempt == 0:
            return 503
        case 9:
            return as_answer([{"instruction": rows[0]["instruction"]}, rows[1] | {"output": "As an AI, I cannot."}])
    return as_answer(rows)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def patient_with(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only calls that the rude teacher leaves without an answer time out, once it has heard them: on a busy machine an
    honest one may take long, and would be asked, and paid, twice."""

    def opened(request, timeout):
        number = json.loads(request.data)["seed"]
        silent = number % 10 == 3 and not teacher.asked[number]
        try:
            return OpenerDirector.open(endpoint._OPENER, request, timeout=timeout if silent else 60)
        except TimeoutError:
            until(lambda: teacher.asked[number])
            raise

    monkeypatch.setattr(endpoint._OPENER, "open", opened)


def test_the_stated_number_of_rows_from_a_rude_teacher(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret-123456")
    with Teacher(rude) as teacher:
        patient_with(teacher, monkeypatch)
        creation = recipe(teacher, tmp_path / "a", teacher={"timeout_seconds": 1.0})
        facts, why = create(creation, lambda event: None)
        assert why is None
        rows = lines(tmp_path / "a/rows.jsonl")
        assert len(rows) == facts["rows"] == 24
        assert len({row["instruction"] for row in rows}) == 24
        assert all(row["output"] and row["topic"] == ["brie", "feta", "gouda"][row["call"] % 3] for row in rows)
        assert [row["call"] for row in rows] == sorted(row["call"] for row in rows)
        assert facts["sha256"] == sha256(tmp_path / "a/rows.jsonl")
        refused = facts["refused"]
        assert set(refused) == {
            "duplicate",
            "broken answer",
            "no rows in the answer",
            "other language",
            "missing column",
            "refused words",
        }
        assert refused["duplicate"] == 2 * sum(number % 10 == 2 for number in judged(tmp_path / "a", facts))
        assert facts["offered"] + refused["broken answer"] + refused["no rows in the answer"] == (
            24 + facts["surplus"] + sum(refused.values())
        )
        assert len(lines(tmp_path / "a/refused.jsonl")) == sum(refused.values())
        assert facts["calls"]["lost"] == teacher.asked.total() - teacher.paid.total() - errors_sent(teacher) > 0
        assert facts["teacher"]["sampling"]["temperature"] == teacher.bodies[0]["temperature"] == 0.8
        assert max(teacher.paid.values()) == 1
        assert teacher.keys == {"Bearer sk-very-secret-123456"}
    for path in (tmp_path / "a").iterdir():
        assert "secret-123456" not in path.read_text(), path

    # another folder, other timing: the same rows
    with Teacher(rude, delay=0.02) as teacher:
        patient_with(teacher, monkeypatch)
        create(recipe(teacher, tmp_path / "b", teacher={"at_once": 1, "timeout_seconds": 1.0}), lambda event: None)
    assert lines(tmp_path / "b/rows.jsonl") == rows


def judged(folder: Path, facts: dict[str, Any]) -> range:
    return range(facts["calls"]["judged"] + facts["calls"]["failed"])


def errors_sent(teacher: Teacher) -> int:
    return sum(number % 10 in (1, 8) for number in teacher.asked)


def test_nothing_is_paid_twice_after_kills(tmp_path):
    with Teacher(honest, delay=0.15) as teacher:
        creation = recipe(teacher, tmp_path / "made", rows=60, teacher={"timeout_seconds": 20})
        path = tmp_path / "recipe.yaml"
        path.write_text(creation.to_yaml())
        journal = tmp_path / "made/journal.jsonl"
        known: set[int] = set()
        for wanted in (4, 12):
            process = subprocess.Popen([sys.executable, "-m", "ftray.cli.main", "create", str(path)])
            until(lambda n=wanted: journal.exists() and journal.read_bytes().count(b"\n") > n)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            known = {entry["call"] for entry in lines(journal) if "answer" in entry}
            with journal.open("ab") as file:
                file.write(b'{"call": 99, "answer": "cut o')
        assert len(known) >= 12
        asked_before = dict(teacher.asked)
        facts, why = create(creation, lambda event: None)
    assert why is None
    assert facts["rows"] == len({row["instruction"] for row in lines(tmp_path / "made/rows.jsonl")}) == 60
    assert facts["calls"]["answered"] == len(teacher.paid)
    # what was in the journal was never asked again; only what was on its way at a kill was, 4 calls at most each time
    assert sum(teacher.paid.values()) - len(teacher.paid) <= 2 * 4
    assert all(teacher.asked[number] == asked_before[number] for number in known)
    before = teacher.asked.total()
    assert create(creation, lambda event: None)[0]["sha256"] == facts["sha256"]
    assert teacher.asked.total() == before


def until(holds, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_filters_and_rows_may_be_changed_without_a_call(tmp_path):
    with Teacher(honest) as teacher:
        create(recipe(teacher, tmp_path / "x", rows=10), lambda event: None)
        asked = teacher.asked.total()
        strict = recipe(teacher, tmp_path / "x", rows=4, filters={"refuse": ["gouda"]})
        create(strict, lambda event: None)
        assert teacher.asked.total() == asked
        assert "gouda" not in (tmp_path / "x/rows.jsonl").read_text().replace('"topic": "gouda"', "").lower()
        with pytest.raises(ConfigError, match=r"teacher\.model"):
            create(recipe(teacher, tmp_path / "x", teacher={"model": "other"}), lambda event: None)


def test_a_budget_is_kept_and_what_is_there_is_written(tmp_path, capsys):
    with Teacher(honest, delay=0.05) as teacher:
        creation = recipe(teacher, tmp_path / "x", budget={"tokens": 2000}, teacher={"sampling": {"max_tokens": 100}})
        path = tmp_path / "recipe.yaml"
        path.write_text(creation.to_yaml())
        assert call(["create", str(path), "rows=200", "--json"]) == 3
        out, err = capsys.readouterr()
        found = json.loads(out.splitlines()[-1])
        assert "budget.tokens" in found["ended"]
        assert "budget.tokens" in err
        spent = sum(found["tokens"].values())
        assert 2000 - 2 * 140 < spent <= 2000
        assert spent == 90 * teacher.paid.total()
        assert found["rows"] == len(lines(tmp_path / "x/rows.jsonl")) > 20


def test_tries_without_an_answer_are_within_the_budget(tmp_path):
    """A broken connection may have been paid: it counts as if it had."""
    with Teacher(lambda number, attempt: 0.0 if attempt == 0 else honest(number, attempt)) as teacher:
        facts, why = create(recipe(teacher, tmp_path / "x", rows=100, budget={"calls": 9}), lambda event: None)
    assert "budget.calls" in why
    assert teacher.asked.total() <= 9
    assert facts["calls"]["lost"] + facts["calls"]["answered"] == teacher.asked.total()
    assert facts["tokens"]["lost_at_most"] > 1500 * facts["calls"]["lost"]


def test_a_call_that_was_answered_is_in_the_budget_once(tmp_path, monkeypatch):
    """Also before the main thread has seen that it is done: else another's next try would be told that all is spent."""
    journal = tmp_path / "x/journal.jsonl"

    def said(number: int, attempt: int) -> str | float:
        if number == 1 and attempt == 0:
            until(lambda: b"answer" in journal.read_bytes())
            return 0.0
        return honest(number, attempt)

    monkeypatch.setattr("ftray.evaluate.create.wait", lambda flying, **_: wait(flying))  # it sees both at once
    with Teacher(said) as teacher:
        creation = recipe(teacher, tmp_path / "x", rows=4, budget={"calls": 3}, teacher={"at_once": 2})
        facts, why = create(creation, lambda event: None)
    assert (why, facts["rows"]) == (None, 4)
    assert facts["calls"] == {"answered": 2, "judged": 2, "failed": 0, "lost": 1}


def test_rates_are_kept(tmp_path):
    """No request is there before its turn; how late it may be is the machine's."""
    with Teacher(honest) as teacher:
        began = time.monotonic()
        create(recipe(teacher, tmp_path / "x", rows=12, teacher={"requests_per_minute": 600}), lambda event: None)
    assert len(teacher.times) >= 6
    for number, at in enumerate(sorted(teacher.times)):
        assert at - began >= 0.1 * number - 1e-6


def test_a_teacher_that_repeats_itself_is_given_up(tmp_path):
    with Teacher(lambda number, attempt: as_answer([honest_row(1)])) as teacher:
        facts, why = create(recipe(teacher, tmp_path / "x", patience=5), lambda event: None)
    assert "brought no row" in why
    assert facts["rows"] == 1
    assert teacher.asked.total() <= 6 + 4


def test_a_slow_first_call_lets_no_more_be_paid_than_patience_waits_for(tmp_path):
    def said(number: int, attempt: int) -> str:
        if number == 0:
            time.sleep(0.4)
        return as_answer([honest_row(1)])

    with Teacher(said) as teacher:
        create(recipe(teacher, tmp_path / "x", patience=5), lambda event: None)
    assert teacher.asked.total() <= 6 + 4


@pytest.mark.parametrize("status", [401, 302])
def test_a_refused_key_ends_it_at_once_and_is_told_to_nobody(tmp_path, monkeypatch, status):
    monkeypatch.setenv("FTRAY_API_KEY", "sk-very-secret-123456")
    with Teacher(lambda number, attempt: status) as teacher, pytest.raises(EndpointRefused) as caught:
        create(recipe(teacher, tmp_path / "x"), lambda event: None)
    assert teacher.asked.total() <= 4
    assert str(status) in str(caught.value)
    for text in (str(caught.value), *(path.read_text() for path in (tmp_path / "x").iterdir())):
        assert "secret-123456" not in text


def test_a_stop_keeps_what_is_paid(tmp_path):
    with Teacher(honest, delay=0.05) as teacher:
        creation = recipe(teacher, tmp_path / "x", rows=100)
        with pytest.raises(RunStopped):
            create(creation, lambda event: None, lambda: teacher.paid.total() >= 8)
        answered = [e["call"] for e in lines(tmp_path / "x/journal.jsonl") if "answer" in e]
        assert sorted(answered) == sorted(teacher.paid)
        assert len(answered) < 16


def test_answers_to_given_prompts(tmp_path):
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("q,a\nWhat is brie?,old\nWhat is feta?,\n ,x\nWhat is feta?,again\n")
    ask = {
        "name": "answers",
        "prompts": [{"path": str(prompts), "format": {"name": "prompt_completion", "prompt": "{q}"}}],
        "persona": "Be brief.",
        "samples": 2,
    }

    def said(number: int, attempt: int) -> str | int:
        return 400 if number == 3 else f" Cheese of call {number // 4}, {'mild' if number % 2 else 'strong'}. "

    events: list[dict[str, Any]] = []
    with Teacher(said) as teacher:
        creation = recipe(teacher, tmp_path / "x", None, ask=ask, filters={"near": None, "language": None})
        facts, why = create(creation, events.append)
        assert "1 calls failed" in why
        assert "HTTP 400" in why
        rows = lines(tmp_path / "x/rows.jsonl")
        assert [row["completion"] for row in rows][:2] == ["Cheese of call 0, strong.", "Cheese of call 0, mild."]
        assert rows[0]["prompt"] == "What is brie?"
        assert facts["prompts_refused"] == 1
        assert any("hold no prompt" in event.get("text", "") for event in events)
        assert {body["messages"][0]["content"] for body in teacher.bodies} == {"Be brief."}
        assert not any("old" in str(body["messages"]) for body in teacher.bodies)
        teacher.answer = lambda number, attempt: "Salty."  # the one that failed is asked again, and it alone
        before = teacher.asked.total()
        facts, why = create(creation, events.append)
        assert why is None
        assert teacher.asked.total() == before + 1
        assert facts["rows"] == len(rows) + 1


# ---------------------------------------------------------------------------------------------------------------- parts


def test_what_is_near_and_what_is_in_a_test_file():
    tests = [Asked("Which milk is Roquefort made from?", "Raw ewe's milk.", None, where="t:1")]
    long = " ".join(f"word{i}" for i in range(20))
    tests.append(Asked("Something else entirely?", long, None, where="t:2"))
    sieve = Sieve(COLUMNS, COLUMNS[:1], Filters(characters={"output": (5, 200)}), tests)

    def judge(ask: str, answer: str = "An answer.") -> str | None:
        refusal = sieve.judge({"instruction": ask, "output": answer})
        return refusal.reason if refusal else None

    assert judge("How long does a ripe brie keep in the fridge?") is None
    assert judge("How long does a ripe brie keep in a fridge?") == "near duplicate"
    assert judge("how long does a RIPE brie keep in the fridge", "An  answer") == "duplicate"
    assert judge("How long does a ripe comté keep in a cellar?") is None
    assert judge("Which milk is Roquefort made from, then?") == "in a test file"
    assert judge("Tell me more", f"It says {' '.join(long.split()[3:17])} so.") == "in a test file"
    assert judge("Tell me more", f"It says {' '.join(long.split()[3:15])} so.") is None
    assert judge("Hm?", "No.") == "too short"
    assert judge("Hm?", "No. " * 99) == "too long"
    assert judge("  ") == "too short"
    assert sieve.judge({"instruction": 3, "output": "An answer."}).reason == "not text"  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="cannot be told"):
        Sieve(COLUMNS, COLUMNS, Filters(language="qq"), [])


@pytest.mark.parametrize(
    ("text", "count", "whole"),
    [
        ('[{"instruction": "a"}, {"output": "b"}]', 2, True),
        ('{"data": {"rows": [{"instruction": "a"}]}}', 1, True),
        ('{"instruction": "a"}\n{"instruction": "b"}', 2, True),
        ('```json\n[{"instruction": "a"}]\n``` {', 1, False),
        ('{"rows": [{"instruction": "a"}, {"instruction": "b', 1, False),
        ('{"instruction": "two\nlines"}', 1, True),
        ("nothing", 0, True),
        ("{" * 3000, 0, False),
    ],
)
def test_rows_are_found_in_what_teachers_write(text, count, whole):
    found, read = objects_in(text, COLUMNS)
    assert (len(found), read) == (count, whole)


def test_recipes_and_refusals(tmp_path, capsys):
    assert creation_names() == ["cheese-expert"]
    creation = load_creation("cheese-expert", ["rows=7", f"output={tmp_path}"])
    assert creation.rows == 7
    assert call(["create", "cheese-expert", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "affineur" in shown
    assert '{"rows": [{"instruction"' in shown
    assert "100 calls" in shown
    assert call(["create", "cheese-expert", "teacher.modell=x"]) == 2
    assert "did you mean 'model'" in capsys.readouterr().err
    assert call(["create", "cheese-expert", "teacher.url=https://u:p@host/v1"]) == 2
    assert call(["create", "cheese-expert", "ask.prompt='{topik}'", "--dry-run"]) == 2
    assert "{topic}" in capsys.readouterr().err
    assert call(["recipes", "cheese-expert"]) == 0
    assert "affineur" in capsys.readouterr().out
    assert call(["create", "cheese-exper"]) == 2
    assert "did you mean 'cheese-expert'" in capsys.readouterr().err


def test_two_at_once_are_refused(tmp_path):
    with Teacher(honest) as teacher:
        creation = recipe(teacher, tmp_path / "x")
        seen: list[Exception] = []

        def again(event: dict[str, Any]) -> None:
            if not seen and event["kind"] == "progress":
                with pytest.raises(ConfigError, match="another process") as caught:
                    create(creation, lambda event: None)
                seen.append(caught.value)

        create(creation, again)
    assert seen


def test_a_teacher_that_is_not_there(tmp_path):
    with Teacher(honest) as teacher:
        creation = recipe(teacher, tmp_path / "x", patience=2, teacher={"tries": 1})
    facts, why = create(creation, lambda event: None)
    assert facts["rows"] == 0
    assert "refused" in why.lower()
