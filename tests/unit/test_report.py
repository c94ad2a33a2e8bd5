"""The report: what it says is what the folder holds, and it stands alone."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from ftray.cli.main import call
from ftray.config import parse_run
from ftray.errors import UserError
from ftray.evaluate import plots, report
from ftray.evaluate.record import read_record
from ftray.evaluate.report import write_report

RUN = """
name: cheese
model: {path: /srv/models/Llama-3.1-8B}
method: {name: qlora, rank: 8}
data:
  sources: [{path: "s3://user:hunter2hunter2@bucket/cheese.jsonl", format: messages}]
  held_out_fraction: 0.1
  max_length: 64
train: {steps: 40, evaluate_every: 10}
workers: {count: 2}
"""
HELD_OUT = {0: 4.0, 10: 2.0, 20: 1.0, 30: 1.5, 40: 1.25}
FACTS = {
    "digest": "a1b2c3d4" * 8,
    "rows": {"train": 950, "held_out": 100, "rejected": 7, "truncated": 3, "read": 1057},
    "tokens": {"train": 40_000, "held_out": 4_000},
    "target_tokens": {"train": 12_345, "held_out": 1_000},
    "length_histogram": {"edges": [0, 16, 32, 48, 64], "counts": [100, 500, 300, 50]},
    "rejected_by_reason": {"the row is not JSON": 5, "<script>alert(1)</script>": 2},
    "sources": [{"path": "s3://user:hunter2hunter2@bucket/cheese.jsonl", "rows": 1050, "rejected": 7}],
    "max_length": 64,
    "packing": "batch",
}


def _events() -> list[dict]:
    events: list[dict] = [
        {"kind": "start", "steps": 40, "step": 0, "trainable_parameters": 2_000_000, "parameters": 8_000_000_000,
         "unquantized": ["lm_head"]},
    ]  # fmt: skip
    for step in range(41):
        if step:
            events.append(
                {"kind": "step", "step": step, "loss": None if step == 17 else 4 / step, "learning_rate": 1e-4,
                 "grad_norm": 0.7, "target_tokens": 100, "tokens": 320, "seconds": 0.5,
                 "target_tokens_per_second": 200.0}
            )  # fmt: skip
        if step in HELD_OUT:
            loss = HELD_OUT[step]
            events.append({"kind": "evaluation", "step": step, "loss": loss, "perplexity": math.exp(loss),
                           "target_tokens": 1000})  # fmt: skip
    events += [
        {"kind": "skip", "step": 17, "rows": ["cheese.jsonl:12"], "reason": "the loss is not finite"},
        {"kind": "resume", "step": 20},
        {"kind": "warning", "text": "a commit at https://bob:hunter2hunter2@host was damaged & skipped"},
        {"kind": "end", "reason": "finished"},
    ]
    return events


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "run.yaml").write_text(parse_run(RUN, "cheese.yaml").to_yaml())
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in _events()))
    (tmp_path / "summary.json").write_text(json.dumps({"seconds": 92.4, "reason": "finished"}))
    data = tmp_path / "data" / "a1b2"
    data.mkdir(parents=True)
    (data / "manifest.json").write_text(json.dumps({"format": 1, "files": {}, "facts": FACTS}))
    return tmp_path


class _Page(HTMLParser):
    """Text, tables and every attribute of a page; refuses elements that are closed in the wrong order."""

    VOID = {"meta", "br", "link", "img", "hr"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.words.append(data)
        if self.open and ("td" in self.open or "th" in self.open):
            self.rows[-1][-1] += data

    def row(self, first: str) -> list[str]:
        return next(row for row in self.rows if row and row[0] == first)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def _page(folder) -> _Page:
    return _Page(Path(write_report(str(folder))).read_text(encoding="utf-8"))


def test_base_against_tuned(folder):
    page = _page(folder)
    assert page.row("Loss, nats per target token") == ["Loss, nats per target token", "4.0000", "1.0000", "0.250"]
    assert page.row("Perplexity") == ["Perplexity", "54.60", "2.72", "0.0498"]
    assert page.row("Step") == ["Step", "0", "20 (best)", ""]
    assert page.row("Last evaluation, step 40")[2] == "1.2500"
    assert "QLoRA of rank 8 on Llama-3.1-8B, 2 workers, bf16" in page.text
    assert "1 min 32 s" in page.text


def test_tuned_is_what_the_artefact_holds(folder):
    """Not the best where that commit was lost."""
    (folder / "summary.json").write_text(json.dumps({"reason": "finished", "artefact_step": 40}))
    page = _page(folder)
    assert page.row("Loss, nats per target token")[1:] == ["4.0000", "1.2500", "0.312"]
    assert page.row("Step")[2] == "40 (last)"


def test_the_number_of_workers(folder):
    for workers, told in (("{min: 1, max: 4}", "1 to 4 workers"), ("{count: 1}", "1 worker"), ("{}", "1 worker")):
        run = parse_run(RUN, "cheese.yaml", [f"workers={workers}"])
        (folder / "run.yaml").write_text(run.to_yaml())
        assert f"QLoRA of rank 8 on Llama-3.1-8B, {told}, bf16" in _page(folder).text


def test_without_keep_best_the_last_evaluation_counts(folder):
    run = parse_run(RUN, "cheese.yaml", ["train.keep_best=false"])
    (folder / "run.yaml").write_text(run.to_yaml())
    assert _page(folder).row("Loss, nats per target token")[2] == "1.2500"


def test_data_counts_and_reasons(folder):
    page = _page(folder)
    assert page.row("Training") == ["Training", "950", "40,000", "12,345", "30.9\N{NO-BREAK SPACE}%"]
    assert page.row("Held-out")[1] == "100"
    assert page.row("the row is not JSON") == ["the row is not JSON", "5"]
    assert page.row("s3://***@bucket/cheese.jsonl") == ["s3://***@bucket/cheese.jsonl", "train", "1,050", "7"]
    assert "1,057 rows read, 7 refused, 3 truncated. At most 64 tokens a row. Packing: batch." in page.text


def test_what_happened(folder):
    page = _page(folder)
    assert ["17", "skipped step", "the loss is not finite; its rows: cheese.jsonl:12"] in page.rows
    assert ["20", "resumed", "went on after step 20"] in page.rows
    assert any(row[1:2] == ["warning"] and "damaged & skipped" in row[2] for row in page.rows)
    assert not any("finished" in cell for row in page.rows for cell in row), "an ordinary end is no warning"


def test_a_stop_is_told(folder):
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": "end", "reason": "stopped"}) + "\n")
    assert ["20", "stopped", "asked to stop; everything was committed"] in _page(folder).rows


def test_it_stands_alone(folder):
    text = Path(write_report(str(folder))).read_text()
    page = _Page(text)
    outside = re.compile(r"(?i)^(https?:)?//|^(file|data|javascript):")
    loads = [(t, n, v) for t, n, v in page.attributes if n in ("src", "href", "xlink:href", "action", "srcset")]
    assert loads  # the plots' own marks
    assert not [found for found in loads if outside.match(found[2] or "")]
    assert all(v.startswith("#") for _, _, v in loads)
    assert not {t for t, _, _ in page.attributes} & {"script", "link", "iframe", "img"}
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_content_is_escaped_and_credentials_are_left_out(folder):
    text = Path(write_report(str(folder))).read_text()
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "hunter2" not in text


def test_ids_are_unique_and_every_reference_is_met(folder):
    page = _page(folder)
    ids = [v for _, n, v in page.attributes if n == "id"]
    assert len(ids) == len(set(ids))
    text = (folder / "report.html").read_text()
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | {v[1:] for _, n, v in page.attributes if n == "xlink:href"}
    used |= {v for _, n, v in page.attributes if n == "aria-labelledby"}
    assert used
    assert used <= set(ids)


def test_it_can_be_read_aloud(folder):
    page = _page(folder)
    labels = [v for t, n, v in page.attributes if (t, n) == ("svg", "aria-label")]
    assert len(labels) == 5  # loss, learning rate, norm, throughput, lengths
    assert len(set(labels)) == 5
    assert all(page.rows)
    assert {v for t, n, v in page.attributes if t == "th" and n == "scope"} == {"row", "col"}
    assert not [row for row in page.rows if row[0] == "" and len(row) == 1]


def _contrast(first: str, second: str) -> float:
    """WCAG 2.2, relative luminance and contrast ratio."""

    def luminance(colour: str) -> float:
        full = colour if len(colour) == 7 else "#" + "".join(c * 2 for c in colour[1:])
        parts = [int(full[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_text_stands_out_in_light_dark_and_print(folder):
    text = Path(write_report(str(folder))).read_text()
    blocks = re.findall(r":root \{.*?\}", text, re.S)
    palettes = [dict(re.findall(r"--(\w+): (#[0-9a-f]{3,6})", block)) for block in blocks]
    assert len(palettes) == 3
    for palette in palettes:
        for ground in ("paper", "panel"):
            for ink in ("ink", "muted", "accent", "second", "third", "good", "warn"):
                assert _contrast(palette[ink], palette[ground]) >= 4.5, (ink, ground, palette)


def test_a_run_that_was_killed_still_has_a_report(folder):
    (folder / "summary.json").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(lines[:16]) + '\n{"kind": "st')
    page = _page(folder)
    assert "not finished" in page.text
    assert page.row("Loss, nats per target token")[1:3] == ["4.0000", "2.0000"]


def test_a_run_that_has_only_begun(tmp_path):
    (tmp_path / "run.yaml").write_text(parse_run(RUN, "cheese.yaml").to_yaml())
    page = _page(tmp_path)
    assert "No step has been made yet." in page.text
    assert "The prepared data are not there any more" in page.text


def test_no_run_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"no run\.yaml"):
        write_report(str(tmp_path))


def test_data_are_found_through_the_pointer(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("cache")
    facts = {**FACTS, "rows": {"train": 5}}
    (elsewhere / "manifest.json").write_text(json.dumps({"format": 1, "files": {}, "facts": facts}))
    (folder / "data.json").write_text(json.dumps({"uri": str(elsewhere)}))
    assert read_record(str(folder)).facts["rows"] == {"train": 5}


def test_a_step_made_twice_counts_once_as_the_later(folder):
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": "step", "step": 40, "loss": 9.0}) + "\n")
    steps, losses = read_record(str(folder)).series("step", "loss")
    assert list(steps) == list(range(1, 41))
    assert losses[-1] == 9.0
    assert np.isnan(losses[16])


def test_a_report_on_an_object_store(folder):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/bucket/run", recursive=True)
    assert write_report("memory://bucket/run") == "memory://bucket/run/report.html"
    assert b"54.60" in memory.cat("/bucket/run/report.html")


def test_plots_are_well_formed_for_any_series():
    nothing = np.array([]), np.array([])
    hole = np.array([1, 2, 3]), np.array([1.0, np.nan, 2.0])
    for text in (
        plots.loss_curves(hole, hole, nothing, None, None, "pair"),
        plots.loss_curves(nothing, nothing, (np.array([0]), np.array([2.0])), 2.0, None, "pair"),
        plots.curve("rate", 'a "label" & <more>', hole, "rate"),
        plots.histogram([0, 1], [0], 1),
    ):
        element = ElementTree.fromstring(text.replace("xlink:href", "href"))
        assert element.get("role") == "img"
        assert not re.search(r"#0[0-9]0[0-9]0[0-9]", text)  # every placeholder colour was replaced


def test_long_runs_make_small_pages():
    steps = np.arange(1, 50_001)
    x, y = plots.thin((steps, np.sin(steps / 5000.0)))
    assert len(x) == 800
    assert np.allclose(y, np.sin(x / 5000.0), atol=1e-3)


def test_smoothing_keeps_level_trend_and_holes():
    assert np.allclose(plots.smooth(np.full(50, 3.0), 9), 3.0)
    line = np.arange(50.0)
    assert np.allclose(plots.smooth(line, 9)[9:-9], line[9:-9])
    holed = np.where(np.arange(50) == 20, np.nan, 3.0)
    assert np.allclose(plots.smooth(holed, 9), 3.0)
    assert len(plots.smooth(np.array([1.0, 2.0]), 9)) == 2


@pytest.mark.parametrize(
    ("value", "shown"),
    [(8.03e9, "8.03B"), (41_943_040, "41.9M"), (12_345, "12.3k"), (1_777.7, "1,778"), (2.3789, "2.38"), (None, "–")],
)
def test_short_numbers(value, shown):
    assert report.short(value) == shown


@pytest.mark.parametrize(("seconds", "shown"), [(3.25, "3.2 s"), (119.6, "2 min 0 s"), (3_660, "1 h 1 min")])
def test_durations(seconds, shown):
    assert report.duration(seconds) == shown


def test_preferences_have_margins_and_no_perplexity(folder):
    text = (folder / "run.yaml").read_text().replace("name: sft", "name: dpo")
    (folder / "run.yaml").write_text(text)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("perplexity", None)
        if line["kind"] in ("step", "evaluation"):
            line |= {"margin": line["step"] / 8 - 1, "accuracy": 0.75}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Path(write_report(str(folder))).read_text()
    assert "Perplexity" not in page
    assert "nats per target token" not in page.lower()
    assert "nats per pair" in page
    assert ">Margin</h3>" in page
    assert ">Accuracy</h3>" in page
    assert "1.50" in page  # the margin at step 20


# ------------------------------------------------------------------------------------------ what `ftray evaluate` found


def _score(score: float) -> dict:
    return {"score": score, "low": score - 0.05, "high": score + 0.05}


def _evaluate(folder: Path, name: str = "cheese", bleu: float = 0.5) -> None:
    """Files as `ftray evaluate` leaves them."""
    common = {"examples": 0, "examples_shown": 0, "rows_too_long": 0, "cut_off": 0, "prompt_tokens": 20.0,
              "answer_tokens": 9.0, "loss_low": None, "loss_high": None}  # fmt: skip
    base = common | {"name": "base", "kind": "base", "loss": 4.0, "scores": {"bleu": _score(0.1)}}
    shots = common | {"name": "base, 5-shot", "kind": "base", "loss": 3.0, "scores": {"bleu": _score(0.2)},
                      "examples": 5, "examples_shown": 2.5}  # fmt: skip
    tuned = common | {"name": name, "kind": "adapter", "loss": 1.0, "scores": {"bleu": _score(bleu)}}
    decoding = {"max_tokens": 64, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0, "stop": [], "beams": 10,
                "length_penalty": 0.8, "no_repeat_ngram": 4}  # fmt: skip
    found = {
        "questions": 6, "references": 12, "loss_rows": 6, "settings": {"decoding": decoding}, "sources": ["test.csv"],
        "metrics": [{"name": "bleu"}], "systems": [base, shots, tuned],
        "differences": [{"system": name, "than": "base", "metrics": {"bleu": {"p": 0.001}, "loss": {"p": 0.2}}}],
        "overlap": {"lines": ["1 of 6 held-out rows (16.7 %) are training rows too"]}, "judged": [],
    }  # fmt: skip
    rows = [
        {"number": i, "where": f"test.csv:{i}", "prompt": f"asked {i} <b>", "references": ["right", "as right"],
         "answers": {s: {"answer": f"{s} says {i}", "scores": {"bleu": i / 10}} for s in ("base", name)}}
        for i in range(1, 7)
    ]  # fmt: skip
    matrix = {
        "systems": [{"name": "base", "own": None, "kind": "base"}, {"name": name, "own": 0, "kind": "adapter"}],
        "tasks": [{"name": "own"}, {"name": "general"}],
        "losses": [[4.0, 3.0], [1.0, 3.5]],
        "forgetting": [[0.0, 0.0], [-3.0, 0.5]],
        "scores": [[None, None], [None, None]],
    }
    (folder / "evaluation").mkdir()
    (folder / "evaluation/result.json").write_text(json.dumps(found))
    (folder / "evaluation/answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "evaluation/matrix.json").write_text(json.dumps(matrix))


def test_systems_answers_and_the_matrix_are_shown(folder):
    _evaluate(folder)
    page = _Page(Path(write_report(str(folder))).read_text(encoding="utf-8"))
    assert page.row("base")[:3] == ["base", "4.0000", "0.1000 ± 0.050"]
    tuned = next(row for row in page.rows if row[:1] == ["cheese"] and len(row) == 5)
    assert tuned[1:3] == ["1.0000", "0.5000* ± 0.050"]
    words = " ".join(page.words)
    assert "beam search with 10 beams, length penalty 0.8, no 4-gram twice, up to 64 tokens" in words
    assert "2.5 of 5 examples fitted" in words
    assert "16.7 %" in words
    assert "asked 1 <b>" in words  # as text, and not as an element
    best, worst = words.rindex("cheese says 6"), words.rindex("cheese says 1")
    assert words.index("Best and worst") < best < worst
    assert ["cheese", "1.0000", "-3.000", "+0.500"] in page.rows
    assert "-3.00" in words  # in the map
    assert words.count("Change of each system") == 1


def test_what_is_wrong_stands_beside_the_curves_and_in_them(folder):
    """The fixture's held-out loss rises from step 20 on while training loss falls."""
    page = _Page(Path(write_report(str(folder))).read_text(encoding="utf-8"))
    words = " ".join(page.words)
    assert "Overfitting." in words
    assert "From step 20 on held-out loss rises, from 1.000 to 1.250" in words
    assert words.count("overfitting") >= 1  # the mark in the plot


def test_several_runs_on_one_page(folder, tmp_path_factory, capsys):
    import shutil

    other = tmp_path_factory.mktemp("other") / "run"
    shutil.copytree(folder, other)
    (other / "run.yaml").write_text((other / "run.yaml").read_text().replace("name: cheese", "name: wine"))
    _evaluate(folder)
    _evaluate(other, "wine", bleu=0.7)
    to = folder / "both.html"
    assert call(["report", str(folder), str(other), "--to", str(to)]) == 0
    assert capsys.readouterr().out.strip() == str(to)
    page = _Page(to.read_text(encoding="utf-8"))
    rows = {row[0]: row for row in page.rows if len(row) == 5}
    assert [rows[name][2] for name in ("base", "cheese", "wine")] == [
        "0.1000 ± 0.050", "0.5000* ± 0.050", "0.7000* ± 0.050",
    ]  # fmt: skip
    assert sum("badge" in str(value) for _, name, value in page.attributes if name == "class") == 2
    result = json.loads((other / "evaluation/result.json").read_text())
    (other / "evaluation/result.json").write_text(json.dumps(result | {"sources": ["others.csv"]}))
    assert call(["report", str(folder), str(other), "--to", str(to)]) == 0
    words = " ".join(_Page(to.read_text(encoding="utf-8")).words)
    assert "wine was evaluated on other questions" in words
    assert call(["report", str(folder)]) == 0
    assert call(["report", str(folder / "data")]) == 2
