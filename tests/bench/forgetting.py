"""Task A, then task B: what is forgotten of A, and what a tenth of A's rows in B's mixture keeps.

    python tests/bench/forgetting.py [--steps 120] [--folder DIR]

Full tuning of the embedded base on the cheese expert's conversations (A), then of the result on the restaurant's
descriptions (B), once alone and once with A's rows at 10 % of the mixture (`weight` of a source in `data.sources`). The
matrix of `ftray evaluate --matrix` shows both. Minutes on 2 cores; no network, no GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

CHEESE = {"path": "embedded:cheese/train.jsonl", "format": "messages"}
MARK = 0.5
"""Replay shall leave at most this share of what is forgotten without it."""


def restaurant() -> dict[str, Any]:
    from ftray.config import load_run

    return load_run("quickstart-restaurant").data.sources[0].model_dump(mode="json")


def train(folder: Path, base: str, sources: list[dict[str, Any]], held_out: list[dict[str, Any]], steps: int) -> None:
    if (folder / "artefact").is_dir():
        return
    run = {
        "name": folder.name,
        "model": {"path": base},
        "method": {"name": "full"},
        "data": {"sources": sources, "held_out": held_out, "max_length": 256},
        "train": {"steps": steps, "batch_rows": 16, "micro_batch_rows": 16, "learning_rate": 1e-3, "precision": "fp32"},
        "workers": {"count": 1, "gpus": 0},
        "output": str(folder),
    }
    file = folder.parent / f"{folder.name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(run, sort_keys=False))
    subprocess.run([sys.executable, "-m", "ftray.cli.main", "train", str(file)], check=True)


def main() -> None:
    from ftray.config import load_run

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "ftray-forgetting"))
    arguments = parser.parse_args()
    root, rows = arguments.folder, restaurant()
    held_out = {
        name: [s.model_dump(mode="json") for s in load_run(f"quickstart-{name}").data.held_out]
        for name in ("cheese", "restaurant")
    }
    train(root / "A", "embedded", [CHEESE], held_out["cheese"], arguments.steps)
    after = str(root / "A" / "artefact")
    train(root / "B", after, [rows], held_out["restaurant"], arguments.steps)
    # 300 rows each: weights of 1 and 1/9 make one row in ten one of A's
    replayed = [rows, CHEESE | {"weight": 1 / 9}]
    train(root / "B-replay", after, replayed, held_out["restaurant"], arguments.steps)
    names = [str(root / name) for name in ("A", "B", "B-replay")]
    subprocess.run([sys.executable, "-m", "ftray.cli.main", "evaluate", *names, "--matrix"], check=True)
    found = json.loads((root / "A/evaluation/matrix.json").read_text(encoding="utf-8"))
    losses = {s["name"]: row for s, row in zip(found["systems"], found["losses"], strict=True)}
    print("\n| after | loss on A | loss on B |\n|---|---:|---:|")
    for name in ("A", "B", "B-replay"):
        print(f"| {name} | {losses[name][0]:.3f} | {losses[name][1]:.3f} |")
    lost, kept = losses["B"][0] - losses["A"][0], losses["B-replay"][0] - losses["A"][0]
    print(f"\nforgotten of A, nats a token: {lost:.3f}; with replay {kept:.3f}, {kept / lost:.2f} of it; mark {MARK}")


if __name__ == "__main__":
    main()
