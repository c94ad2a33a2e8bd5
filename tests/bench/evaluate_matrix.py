"""25 adapters × 25 tasks: every adapter's loss and answers on every task, in one pass of one base, and with PEFT.

    python tests/bench/evaluate_matrix.py [--tasks 25] [--rows 160] [--steps 60] [--questions 16] [--tokens 8]
        [--batch 32] [--by-task] [--share 1.0] [--rounds 1] [--workers 0] [--folder DIR]

15 bAbI tasks and 10 domains of CLINC150 (FTRAY_DATA), few short rows of each, become 25 run files; `ftray train A B …`
trains them as lanes of the embedded base, a LoRA adapter of rank 8 on every linear layer each. Then the matrix of
`ftray evaluate --matrix`, the base as its first row, in this process; and the same losses and answers with PEFT,
adapter by adapter: `load_adapter`, `set_adapter`, greedy `generate` and forward passes over padded batches of rows of
like length, whatever their task (`--by-task`: each task's own rows). Both sides load the base in that time, and
neither its libraries; with `--workers` of ours, as `ftray evaluate --workers` has them, Ray's and their start counts,
libraries included. `--share` of the adapters is timed with PEFT, and its time scaled.

Printed are the seconds of both and their ratio, the matrix' diagonal against the rest, and how far the sides differ.
Adapters that are in DIR already are trained no more.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[2]))

from ftray.evaluate.matrix import Column, Matrix, columns_of, cross
from ftray.evaluate.questions import Prompter, questions_of
from ftray.evaluate.scores.registry import opened
from ftray.evaluate.systems import System, resolved

DATA = Path(os.environ.get("FTRAY_DATA", "../shared")).resolve() / "data"
MARK = 5.0
LONGEST = 400
"""Characters of a prompt: a few sentences."""
Row = dict[str, str]


# ---------------------------------------------------------------------------------------------------------------- data


def babi(path: Path) -> Iterator[Row]:
    """A question with the story up to it, and its answer."""
    story: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        number, text = line.split(" ", 1)
        story = [] if number == "1" else story
        if "\t" not in text:
            story.append(text)
            continue
        question, answer, *_ = text.split("\t")
        yield {"prompt": " ".join([*story, question.strip()]), "answer": answer}


def tasks(rows: int, questions: int) -> dict[str, tuple[list[Row], list[Row]]]:
    """(training rows, held-out rows) of each task, by name."""
    found = {}
    for train in sorted((DATA / "babi").glob("*_train.txt")):
        sides = (babi(train), babi(train.with_name(train.name.replace("_train", "_test"))))
        found[train.name.split("_")[0]] = [list(side) for side in sides]
    intents = json.loads((DATA / "clinc150/data_full.json").read_text(encoding="utf-8"))
    for domain, own in json.loads((DATA / "clinc150/domains.json").read_text(encoding="utf-8")).items():
        found[domain] = [
            [{"prompt": text, "answer": intent.replace("_", " ")} for text, intent in intents[split] if intent in own]
            for split in ("train", "test")
        ]
        for side in found[domain]:  # they come intent by intent
            np.random.default_rng(0).shuffle(side)  # type: ignore[arg-type]
    short = {
        name: [[r for r in side if len(r["prompt"]) <= LONGEST] for side in sides] for name, sides in found.items()
    }
    return {name: (train[:rows], held_out[:questions]) for name, (train, held_out) in short.items()}


def run_file(folder: Path, name: str, rows: tuple[list[Row], list[Row]], steps: int) -> Path:
    paths = {}
    for side, those in zip(("train", "held_out"), rows, strict=True):
        paths[side] = folder / f"{name}.{side}.jsonl"
        paths[side].write_text("".join(json.dumps(row) + "\n" for row in those), encoding="utf-8")
    format = {"name": "prompt_completion", "prompt": "{prompt}\n", "completion": "{answer}"}
    run: dict[str, Any] = {
        "name": name,
        "model": {"path": "embedded"},
        "method": {"name": "lora", "rank": 8, "alpha": 16},
        "data": {
            "sources": [{"path": str(paths["train"]), "format": format}],
            "held_out": [{"path": str(paths["held_out"]), "format": format}],
            "max_length": 256,
        },
        "train": {"steps": steps, "batch_rows": 16, "micro_batch_rows": 16, "learning_rate": 5e-3},
        "evaluate": {"metrics": ["exact_match"]},
        "workers": {"count": 1},
        "logging": {"tensorboard": False},
        "output": str(folder / name),
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(run, sort_keys=False))
    return file


def train(files: Sequence[Path]) -> None:
    if all((file.with_suffix("") / "artefact/ftray.json").exists() for file in files):
        return
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    program = [sys.executable, "-c", "from ftray.cli.main import main; main()", "train", *map(str, files)]
    began = time.perf_counter()
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    print(f"{len(files)} adapters trained as lanes of one base in {time.perf_counter() - began:.0f} s", flush=True)


# --------------------------------------------------------------------------------------------------------------- sides


def matrix_of_ours(systems: Sequence[System], columns: Sequence[Column], workers: int) -> tuple[Matrix, float]:
    """(the matrix, seconds)"""
    began = time.perf_counter()
    if not workers:
        matrix = cross(systems, columns, lambda event: None)
    else:
        from ftray.evaluate.crew import Crew
        from ftray.session import ray_session

        with ray_session():
            matrix = cross(systems, columns, lambda event: None, partial(Crew, count=workers))
    return matrix, time.perf_counter() - began


def with_peft(systems: Sequence[System], columns: Sequence[Column], rows: int, by_task: bool, share: float) -> Matrix:
    """The same matrix, its seconds scaled to all systems; rows of systems that were left out are NaN."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from ftray.data.encode import Vocabulary
    from ftray.data.tokenizer import load_tokenizer
    from ftray.embedded import base_path

    shape = len(systems) + 1, len(columns)
    losses, scores = np.full(shape, np.nan), np.full(shape, np.nan)
    began = time.perf_counter()
    tokenizer = load_tokenizer(systems[0].base.model)  # type: ignore[union-attr]
    prompter = Prompter(Vocabulary.of(tokenizer))
    base = AutoModelForCausalLM.from_pretrained(base_path(), dtype=torch.bfloat16)
    model: Any = PeftModel.from_pretrained(base, systems[0].folder, "0", autocast_adapter_dtype=False).eval()
    asked = [questions_of(column.rows) for column in columns]
    prompts = [(j, prompter.tokens(question.asked)) for j, those in enumerate(asked) for question in those]
    whole = [
        (j, tokens, targets)
        for j, column in enumerate(columns)
        for tokens, targets in prompter.encoded([prompter.whole(row) for row in column.rows])
    ]
    most = max(column.decoding.max_tokens for column in columns)
    some = [None, *range(max(1, round(share * len(systems))))]
    for i, number in enumerate(some):
        if number:
            model.load_adapter(systems[number].folder, str(number), autocast_adapter_dtype=False)
            model.set_adapter(str(number))
            model.delete_adapter(str(number - 1))
        with torch.inference_mode(), model.disable_adapter() if number is None else warnings.catch_warnings():
            sums = np.zeros((2, len(columns)))
            for batch in _batches([(j, len(tokens)) for j, tokens, _ in whole], rows, by_task):
                own = [whole[k] for k in batch]
                for (j, _, targets), loss in zip(own, _losses(model, own, tokenizer.pad_token_id), strict=True):
                    sums[:, j] += loss, targets.sum()
            losses[i] = sums[0] / sums[1]
            said = [""] * len(prompts)
            for batch in _batches([(j, len(tokens)) for j, tokens in prompts], rows, by_task):
                ids, mask = _padded([prompts[k][1] for k in batch], tokenizer.pad_token_id, left=True)
                found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=most, do_sample=False)
                texts = tokenizer.batch_decode(found[:, ids.shape[1] :], skip_special_tokens=True)
                for k, text in zip(batch, texts, strict=True):
                    said[k] = text.strip()
        answers = iter(said)
        for j, those in enumerate(asked):
            with opened([columns[j].metric or ""], [question.references for question in those]) as [metric]:
                scores[i, j] = metric.measure([next(answers) for _ in those]).score
    seconds = (time.perf_counter() - began) * (len(systems) + 1) / len(some)
    return Matrix(list(systems), list(columns), losses, scores, [], seconds)


def _batches(sizes: Sequence[tuple[int, int]], rows: int, by_task: bool) -> Iterator[list[int]]:
    """Rows of (task, length) that go through together: of like length."""
    order = sorted(range(len(sizes)), key=lambda k: (sizes[k][0] if by_task else 0, sizes[k][1]))
    parts = [[k for k in order if sizes[k][0] == j] for j in {j for j, _ in sizes}] if by_task else [order]
    for part in parts:
        yield from (part[start : start + rows] for start in range(0, len(part), rows))


def _padded(rows: Sequence[Any], pad: int, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        at = slice(longest - len(row), None) if left else slice(len(row))
        ids[place, at] = torch.as_tensor(np.asarray(row, np.int64))
        mask[place, at] = 1
    return ids, mask


def _losses(model: Any, rows: Sequence[tuple[int, np.ndarray, np.ndarray]], pad: int) -> list[float]:
    ids, mask = _padded([tokens for _, tokens, _ in rows], pad, left=False)
    logits = model(input_ids=ids, attention_mask=mask).logits
    found = []
    for place, (_, tokens, targets) in enumerate(rows):
        at = torch.from_numpy(np.flatnonzero(targets))
        right = torch.from_numpy(tokens.astype(np.int64))[at]
        found.append(float(torch.nn.functional.cross_entropy(logits[place, at - 1].float(), right, reduction="sum")))
    return found


# --------------------------------------------------------------------------------------------------------------- bench


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=25)
    parser.add_argument("--rows", type=int, default=160, help="of each task, to train on")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--questions", type=int, default=16, help="of each task")
    parser.add_argument("--tokens", type=int, default=8, help="of an answer, at most")
    parser.add_argument("--batch", type=int, default=32, help="rows that PEFT is given at once")
    parser.add_argument("--by-task", action="store_true")
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="of ours, on Ray; 0: this process")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        folder: Path = arguments.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        every = tasks(arguments.rows, arguments.questions)
        chosen = list(every)[:: max(1, len(every) // arguments.tasks)][: arguments.tasks]
        files = [run_file(folder, name, every[name], arguments.steps) for name in chosen]
        train(files)
        with resolved([str(file.with_suffix("")) for file in files]) as systems:
            measure(systems, arguments)


def measure(systems: list[System], arguments: argparse.Namespace) -> None:
    columns = [
        Column(c.name, c.rows, c.metric, c.decoding.model_copy(update={"max_tokens": arguments.tokens}), of=c.of)
        for c in columns_of(systems)
    ]
    ratios = []
    for _ in range(arguments.rounds):
        ours, seconds = matrix_of_ours(systems, columns, arguments.workers)
        theirs = with_peft(systems, columns, arguments.batch, arguments.by_task, arguments.share)
        ratios.append(theirs.seconds / seconds)
        print(
            f"engine {seconds:.1f} s, PEFT {theirs.seconds:.1f} s: {ratios[-1]:.1f} times as fast",
            flush=True,
        )
    cells = f"{len(ours.systems)} × {len(columns)} cells of {len(columns[0].rows)} questions"
    print(f"{cells}: {statistics.median(ratios):.1f} times as fast as PEFT, median of {len(ratios)}; mark {MARK}")
    own = np.array([[i == j for j in range(len(columns))] for i in range(len(systems))])
    for what, values, best in (
        ("loss, nats a target token", ours.losses, ours.losses.min(0)),
        ("exact match", ours.scores, ours.scores.max(0)),
    ):
        base, tuned = values[0], values[1:]
        print(
            f"{what}: base {base.mean():.3f}, own task {tuned[own].mean():.3f}, others' {tuned[~own].mean():.3f};"
            f" own is as good as any in {(tuned[own] == best).sum()} of {len(columns)}"
        )
    far = np.nanmax(np.abs(ours.losses - theirs.losses) / ours.losses)
    same = np.nanmean(np.abs(ours.scores - theirs.scores)[np.isfinite(theirs.scores)] < 1e-9)
    print(f"PEFT's losses differ by {far:.2%} at most, its scores are the same in {same:.1%} of the cells (bf16)")


if __name__ == "__main__":
    main()
