"""`ftray generate`: a mix of adapters over a file, killed and resumed; one line a row, in order."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from ftray.cli.main import call
from ftray.config import Decoding, Model, Source
from ftray.errors import ConfigError, DataError
from ftray.evaluate.generate import generate, here
from ftray.evaluate.generation import Asking, plan
from ftray.registry.base import facts_of_base
from ftray.registry.publish import publish
from tests.adapters import change_facts, seal, write_adapter

ROWS = 120
QUESTIONS = ["Tell me about brie.", "Which milk is feta made from?", "What goes with cheddar?"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Four adapters of the embedded base, one of another, one that is damaged; and a file of prompts for them."""
    root = tmp_path_factory.mktemp("generate")
    base = facts_of_base(Model(path="embedded"))
    for i in range(4):
        write_adapter(root / f"adapter{i}", seed=i, base=base, scale=0.15)
        change_facts(root / f"adapter{i}", run=None)
        seal(root / f"adapter{i}")
    write_adapter(root / "stranger")
    change_facts(root / "stranger", run=None)
    write_adapter(root / "damaged", seed=9, base=base)
    change_facts(root / "damaged", run=None)
    (root / "damaged/adapter_model.safetensors").write_bytes(b"nothing")
    publish(root / "adapter3", str(root / "registry"), "tenant", "three", base)
    lines = []
    for i in range(ROWS):
        names = [None, f"{root}/adapter0", f"{root}/adapter1", f"{root}/adapter2", "tenant/three"]
        row: dict[str, Any] = {"id": i, "q": QUESTIONS[i % 3], "who": names[i % 5]}
        match i:
            case 31:
                row["who"] = "tenant/nobody"
            case 32:
                row["q"] = "very long " * 600
            case 33:
                row["who"] = f"{root}/stranger"
            case 34:
                del row["q"]
            case 35:
                row["who"] = f"{root}/damaged"
        lines.append(json.dumps(row) if i != 36 else "{broken")
    (root / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return root


def asking(place: Path, out: str, **changes: Any) -> Asking:
    format = {"name": "prompt_completion", "prompt": "{q}", "completion": "", "chat": True}
    source = Source(path=str(place / "prompts.jsonl"), format=format)  # type: ignore[arg-type]
    decoding = Decoding(max_tokens=10, temperature=0.7, seed=3)
    wanted = Asking(source, str(place / out), decoding, adapter_column="who", base="embedded", part_rows=16)
    return replace(wanted, registry=str(place / "registry"), **changes)


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def whole(place) -> tuple[list[dict[str, Any]], dict[str, Any], list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    facts = generate(asking(place, "whole.jsonl"), events.append, here)
    return answers(place / "whole.jsonl"), facts, events


def test_parquet_holds_the_same(place, whole):
    rows, _, _ = whole
    facts = generate(asking(place, "whole.parquet"), lambda event: None, here)
    content = (place / "whole.parquet").read_bytes()
    assert facts["sha256"] == hashlib.sha256(content).hexdigest()
    found = pq.read_table(place / "whole.parquet").to_pylist()
    for row in found:
        row["input"] = json.loads(row["input"]) if row["input"] is not None else None
    assert found == rows


def test_one_line_a_row_in_order_each_by_its_adapter(place, whole):
    rows, facts, events = whole
    assert [row["row"] for row in rows] == list(range(1, ROWS + 1))
    failed = {row["row"] - 1: row["error"] for row in rows if row["error"] is not None}
    assert set(failed) == {31, 32, 33, 34, 35, 36}
    assert "nobody" in failed[31]
    assert "shorten the prompt" in failed[32]
    assert "tiny-llama" in failed[33]
    assert failed[34].startswith("missing column 'q'")
    assert "not JSON" in failed[36]
    assert all((row["answer"] is None) == (row["error"] is not None) for row in rows)
    assert facts["failed_by_reason"]["missing column 'q'"] == 1
    assert facts["failed"] == 6 == sum(facts["failed_by_reason"].values())
    assert facts["rows"] == ROWS
    assert facts["tokens"] == sum(row["tokens"] for row in rows) > ROWS
    assert facts["sha256"] == hashlib.sha256((place / "whole.jsonl").read_bytes()).hexdigest()
    assert json.loads((place / "whole.jsonl.manifest.json").read_text()) == facts
    assert not (place / "whole.jsonl.parts").exists()
    assert {name.rsplit("/")[-1] for name in facts["adapters"]} >= {"adapter0", "adapter1", "adapter2", "three"}
    asked = {row["input"]["q"] for row in rows if row["input"] and "q" in row["input"]}
    assert asked >= set(QUESTIONS)
    warned = [event["text"] for event in events if event["kind"] == "warning"]
    assert len(warned) == 2
    greedy = generate(asking(place, "greedy.jsonl", decoding=Decoding(max_tokens=10)), lambda event: None, here)
    by_question: dict[Any, set[str]] = {}
    for row in answers(Path(greedy["out"])):
        if row["error"] is None:
            by_question.setdefault((row["adapter"], row["input"]["q"]), set()).add(row["answer"])
    assert {len(said) for said in by_question.values()} == {1}  # a row's answer is its adapter's, whoever is beside it
    said = [tuple(by_question[who, q] for q in QUESTIONS) for who in dict.fromkeys(who for who, _ in by_question)]
    assert len({str(each) for each in said}) == 5  # and each adapter has its own


def test_killed_and_resumed_nothing_is_done_twice(place, whole):
    """kill -9 of the whole process, twice: finished parts stay as they are, and the end is that of an unbroken run."""
    parts = place / "killed.jsonl.parts"
    code = f"""
import sys, time
import torch; torch.set_num_threads(1)
from pathlib import Path
from ftray.evaluate.generate import generate, here
from ftray.evaluate.generator import Generator
from tests.evaluate.test_generate import asking

do = Generator.do

def up_to(generator, part):
    if part.number >= int(sys.argv[1]):
        time.sleep(600)
    return do(generator, part)

Generator.do = up_to
generate(asking(Path({str(place)!r}), "killed.jsonl"), lambda event: None, here)
"""
    kept: dict[Path, tuple[int, bytes]] = {}
    for wanted in (2, 4):
        process = subprocess.Popen([sys.executable, "-c", code, str(wanted + 1)])  # so far, however late it is killed
        end = time.monotonic() + 240
        while len(list(parts.glob("part-*.json")) if parts.exists() else []) < wanted:
            assert process.poll() is None, "it ended too early"
            assert time.monotonic() < end
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (place / "killed.jsonl").exists()
        assert all(path.stat().st_mtime_ns == kept[path][0] for path in kept)
        notes = list(parts.glob("part-*.json"))
        kept = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (n.with_suffix(".jsonl") for n in notes)}
        assert wanted <= len(kept) <= wanted + 1
    (parts / "part-000007.jsonl.abcd.part").write_text("left behind")
    torn = min(kept)
    torn.write_bytes(torn.read_bytes()[:-5])  # a part that its note does not describe is done again
    done: list[int] = []
    generate(asking(place, "killed.jsonl"), lambda e: done.append(e.get("done", 0)), here)
    assert (place / "killed.jsonl").read_bytes() == (place / "whole.jsonl").read_bytes()
    assert len([n for n in done if n]) == 8 - len(kept) + 1
    assert not parts.exists()
    again: list[dict[str, Any]] = []
    generate(asking(place, "killed.jsonl"), again.append, here)
    assert not [event for event in again if event["kind"] == "progress"]


def test_other_settings_do_not_mix_with_what_is_there(place, whole):
    other = asking(place, "whole.jsonl", decoding=Decoding(max_tokens=3), adapter_column=None)
    with pytest.raises(ConfigError, match="other prompts or settings"):
        generate(other, lambda event: None, here)
    generation = plan(asking(place, "mixed.jsonl"))
    part = place / "mixed.jsonl.parts"
    part.mkdir()
    (part / "generation.json").write_text(json.dumps({"digest": "else"}))
    with pytest.raises(ConfigError, match="these parts belong"):
        generate(generation.asking, lambda event: None, here)
    limited = replace(other, source=other.source.model_copy(update={"limit": 3}), overwrite=True)
    assert generate(replace(limited, out=str(place / "mixed.jsonl")), lambda event: None, here)["rows"] == 3
    assert [row["adapter"] for row in answers(place / "mixed.jsonl")] == [None] * 3


def test_what_cannot_begin(place, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    empty = asking(place, "x.jsonl")
    with pytest.raises(DataError, match="no row"):
        plan(replace(empty, source=empty.source.model_copy(update={"path": str(tmp_path / "empty.jsonl")})))
    with pytest.raises(ConfigError, match="which base"):
        plan(asking(place, "x.jsonl", base=None, adapter_column=None))
    with pytest.raises(ConfigError, match="beam"):
        plan(asking(place, "x.jsonl", decoding=Decoding(beams=2)))


def test_mistakes_on_the_command_line(place, capsys):
    out = str(place / "x.jsonl")
    for arguments, told in (
        (["--messages", "m", "--chat"], "whole conversations"),
        (["--top-p", "2"], "top_p"),
        (["--prompt", "{q", "--base", "embedded"], "no template"),
        (["--prompt", "{q}"], "which base"),
    ):
        assert call(["generate", str(place / "prompts.jsonl"), "--out", out, *arguments]) == 2
        assert told in capsys.readouterr().err
    assert call(["generate", str(place / "nothing.jsonl"), "--out", out, "--base", "embedded"]) == 2
    assert "no file" in capsys.readouterr().err


def test_seeds_belong_to_rows(place):
    one, other = plan(asking(place, "x.jsonl")), plan(asking(place, "x.jsonl", part_rows=7, slots=3))
    assert [one.seed_of(row) for row in range(9)] == [other.seed_of(row) for row in range(9)]
    assert len({one.seed_of(row) for row in range(1000)}) == 1000
    assert sum(part.rows for part in other.parts) == ROWS
