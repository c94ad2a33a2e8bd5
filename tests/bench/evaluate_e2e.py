"""`ftray evaluate` on E2E: base, 5-shot, LoRA and full tuning, five metrics with intervals, on the 630 test questions.

    python tests/bench/evaluate_e2e.py [--base stories260k|embedded] [--steps 600] [--limit 630] [--folder DIR]

Trains both runs where the folder has none yet (minutes), then evaluates them together with the command, and prints its
table and how long it took; the figure to reach is ten minutes on 2 cores. Needs FTRAY_DATA.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECIPES = {"stories260k": "e2e-lora-stories260k", "embedded": "e2e-qlora-tiny"}
COMMON = ["workers.count=1", "train.precision=fp32", "train.optimizer=adamw", "train.evaluate_rows=300"]
LORA, FULL = "method={name: lora, rank: 16, alpha: 32}", "method={name: full}"
METHODS = {
    "stories260k": {
        "lora": ([LORA], "1e-2"),
        "full": ([FULL], "2e-3"),
    },
    "embedded": {
        "lora": ([LORA], "5e-3"),
        "full": ([FULL], "1e-3"),
    },
}


def ftray(*arguments: str) -> float:
    """Seconds that the command took."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "ftray.cli.main", *arguments], check=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", choices=RECIPES, default="stories260k")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--limit", type=int, default=630)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "ftray-evaluate-e2e"))
    arguments = parser.parse_args()
    recipe, runs = RECIPES[arguments.base], []
    for name, (method, rate) in METHODS[arguments.base].items():
        folder = arguments.folder / f"{arguments.base}-{name}"
        runs.append(str(folder))
        if (folder / "artefact").is_dir():
            print(f"{folder} is trained already")
            continue
        own = [f"name={name}", f"output={folder}", f"train.steps={arguments.steps}", f"train.learning_rate={rate}"]
        every = f"train.evaluate_every={max(arguments.steps // 5, 1)}"
        # as the command line's keys go one by one: the section first, then keys in it
        ftray("train", recipe, *method, *COMMON, *own, every, "data.sources.0.limit=8000", "train.commit_every=100000")
    seconds = ftray("evaluate", *runs, "--limit", str(arguments.limit))
    found = json.loads((Path(runs[0]) / "evaluation/result.json").read_text(encoding="utf-8"))
    print(f"\n| {arguments.base} | loss | " + " | ".join(m["name"] for m in found["metrics"]) + " | prompt tokens |")
    print("|---|---:|" + "---:|" * (len(found["metrics"]) + 1))
    for system in found["systems"]:
        cells = [f"{system['loss']:.4f}"]
        for score in system["scores"].values():
            cells.append(f"{score['score']:.4f} [{score['low']:.4f}, {score['high']:.4f}]")
        print(f"| {system['name']} | {' | '.join(cells)} | {system['prompt_tokens']:.0f} |")
    limit = 600
    print(f"\n{seconds:.0f} s for {found['questions']} questions on {os.cpu_count()} cores; the mark is {limit} s")


if __name__ == "__main__":
    main()
