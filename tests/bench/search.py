"""ASHA against a full grid of the same space: is what it finds as good, and for how many training tokens?

    FTRAY_DATA=… python tests/bench/search.py [--steps 90] [--samples 32] [--lanes 16] [--data ROWS] [--held-out ROWS]
        [--seeds 1]

E2E rows on stories260K, LoRA. The space has 4 rates × 4 ranks × 2 batch sizes = 32 combinations; the grid trains every
one of them to its end, as lanes; ASHA draws its samples from the same space at random, and lets a third of them
go on after a ninth and after a third of the steps. Prints a markdown table, and leaves the searches' folders with their
reports.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

SPACE = {
    "train.learning_rate": {"choice": [1e-3, 3e-3, 1e-2, 3e-2]},
    "method.rank": {"choice": [2, 4, 8, 16]},
    "train.batch_rows": {"choice": [8, 16]},
}


def a_search(name: str, folder: Path, arguments: argparse.Namespace, **keys: Any) -> Any:
    import yaml

    from ftray.config.search import parse_search

    every = max(1, arguments.steps // 9)
    raw = {
        "name": name,
        "run": "e2e-lora-stories260k",
        "overrides": {
            "train": {"steps": arguments.steps, "evaluate_every": every, "commit_every": None},
            "data.sources.0.limit": arguments.data,
            "data.held_out.0.limit": arguments.held_out,
            "data.cache": str(folder / "data"),
            "logging.tensorboard": False,
        },
        "space": SPACE,
        "concurrency": arguments.lanes,
        "output": str(folder / name),
    }
    return parse_search(yaml.safe_dump(raw | keys), name)


def measure(spec: Any) -> dict[str, Any]:
    from ftray.evaluate.search_report import write_search_report
    from ftray.tune.driver import search

    started = time.perf_counter()
    found = search(spec, on_event=lambda _: None, stop=threading.Event())
    write_search_report(spec.folder)
    return found | {"wall": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--lanes", type=int, default=16)
    parser.add_argument("--data", type=int, default=4000, help="rows of E2E to train on")
    parser.add_argument("--held-out", type=int, default=100, help="rows that every evaluation takes the loss of")
    parser.add_argument("--seeds", type=int, default=1, help="searches by ASHA, each with a seed of its own")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "ftray-bench-search")
    arguments = parser.parse_args()
    os.environ.setdefault("FTRAY_DATA", str(Path("../shared").resolve()))

    from ftray.session import ray_session

    grace = max(1, arguments.steps // 9)
    scheduler = {"name": "asha", "grace": grace, "reduction": 3}
    rows = []
    with ray_session():
        grid = measure(a_search("grid", arguments.folder, arguments, sampler="grid"))
        rows.append(("grid", grid))
        for seed in range(arguments.seeds):
            keys = {"samples": arguments.samples, "scheduler": scheduler, "seed": seed}
            rows.append((f"ASHA, seed {seed}", measure(a_search(f"asha-{seed}", arguments.folder, arguments, **keys))))
    print("| search | trials | to the end | best loss | of the grid's | training tokens | share | wall, s | best |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---|")
    for name, found in rows:
        value, whole = found["best"]["values"]["loss"], grid["best"]["values"]["loss"]
        best = " ".join(f"{key.rsplit('.')[-1]}={v:g}" for key, v in found["best"]["parameters"].items())
        print(
            f"| {name} | {found['trials']} | {found['finished']} | {value:.4f} | {value / whole:.3f} |"
            f" {found['target_tokens']:,.0f} | {found['target_tokens'] / grid['target_tokens']:.1%} |"
            f" {found['wall']:.0f} | {best} |"
        )
    print(f"\nreports: {arguments.folder}/*/report.html")


if __name__ == "__main__":
    main()
