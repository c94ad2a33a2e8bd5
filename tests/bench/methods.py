"""Every method on the same rows, base and steps: what it trains, holds, costs and reaches. A markdown table.

    FTRAY_DATA=… python tests/bench/methods.py [--steps 200] [--methods lora,prefix]

E2E rows on the embedded base, one process and one run after another, without Ray, each at the rate shown. Memory is
the most that all tensors took at once, weights included, in the first three steps. Evaluation, which is alike for all,
and the artefact are left out: each of its tensors is a mapping of a whole file, and torch counts every one of them.
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
from typing import Any

METHODS: dict[str, tuple[str, float]] = {
    "full": ("{name: full}", 1e-3),
    "freeze": ("{name: freeze, blocks: 2, norms: true}", 3e-3),
    "lora": ("{name: lora, rank: 16}", 1e-2),
    "dora": ("{name: dora, rank: 16}", 1e-2),
    "qlora": ("{name: qlora, rank: 16}", 1e-2),
    "qdora": ("{name: qdora, rank: 16}", 1e-2),
    "adalora": ("{name: adalora, rank: 12, target_rank: 8}", 1e-2),
    "vera": ("{name: vera, rank: 128}", 3e-2),
    "ia3": ("{name: ia3}", 3e-2),
    "bottleneck": ("{name: bottleneck, size: 32, placement: houlsby}", 3e-3),
    "prefix": ("{name: prefix, tokens: 20}", 3e-2),
    "prompt": ("{name: prompt, tokens: 20}", 3e-2),
    "p_tuning": ("{name: p_tuning, tokens: 20}", 3e-3),
    "mezo": ("{name: full}", 1e-5),
}


def a_run(method: str, rate: float, steps: int, data: Path, folder: Path) -> Any:
    from ftray.config import parse_run

    text, _ = METHODS[method]
    optimizer = ", optimizer: mezo, schedule: constant" if method == "mezo" else ""
    format = "{name: prompt_completion, prompt: '{mr}\\n', completion: '{ref}'}"
    return parse_run(
        f"""
        name: methods
        model: {{path: embedded}}
        method: {text}
        data:
          sources: [{{path: "{data}/e2e/trainset.csv", format: {format}, limit: 4000}}]
          held_out: [{{path: "{data}/e2e/devset.csv", format: {format}, limit: 500}}]
          max_length: 256
          cache: {folder}/data
        train: {{steps: {steps}, batch_rows: 16, micro_batch_rows: 16, learning_rate: {rate}{optimizer}}}
        output: {folder}/run
        """,
        "methods",
    )


def measure(method: str, rate: float, steps: int, data: Path, prepared: str) -> dict[str, Any]:
    """One run in this process."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from ftray.data.prepared import PreparedData
    from ftray.train.loop import train_worker
    from ftray.train.world import World

    class Times:
        def __init__(self) -> None:
            self.at: dict[str, list[int]] = {}

        def emit(self, event: dict[str, Any]) -> None:
            self.at.setdefault(event["kind"], []).append(time.time_ns())

        def stop_requested(self) -> bool:
            return False

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        run, rows = a_run(method, rate, steps, data, Path(scratch)), PreparedData.open(prepared)
        summary = train_worker(run, rows, World(), Times())
        few = run.model_copy(update={"train": run.train.model_copy(update={"steps": 3}), "output": f"{scratch}/few"})
        times = Times()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            train_worker(few, rows, World(), times)
    return {
        "trained": summary["trainable_parameters"],
        "share": summary["trainable_parameters"] / summary["parameters"],
        "peak": peak_bytes(profiled, times.at["evaluation"][0], times.at["step"][-1]),
        "tokens": summary["target_tokens_per_second"],
        "base": summary["base_loss"],
        "loss": summary["final_loss"],
        "rate": rate,
    }


def peak_bytes(profiled: Any, begin: int, end: int) -> int:
    """Most bytes of tensors alive at once between two times (in ns since 1970), those from before included."""
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.start_ns() > begin:
            peak = max(peak, alive)
        if event.start_ns() > end:
            break
        alive += event.nbytes()
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--prepared", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    data = Path(os.environ["FTRAY_DATA"]).resolve() / "data"
    if arguments.one:
        method, rate = arguments.one.split("@")
        print("RESULT " + json.dumps(measure(method, float(rate), arguments.steps, data, arguments.prepared)))
        return
    prepared = prepare_rows(data)
    print(f"| method | trained | share | peak, MiB | targets/s | held-out loss, {arguments.steps} steps | rate |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for method in arguments.methods.split(","):
        found = alone(method, METHODS[method][1], arguments.steps, prepared)
        name = "full, by MeZO" if method == "mezo" else method
        print(
            f"| {name} | {found['trained']:,} | {found['share']:.2%} | {found['peak'] / 2**20:,.0f} |"
            f" {found['tokens']:,.0f} | {found['base']:.3f} → {found['loss']:.3f} | {found['rate']:g} |",
            flush=True,
        )


def prepare_rows(data: Path) -> str:
    """Where the prepared rows are, the same for all runs."""
    from ftray.data.prepare import prepare
    from ftray.session import ray_session

    with ray_session(cpus=2):
        return prepare(
            a_run("lora", 1e-3, 1, data, Path(tempfile.gettempdir()) / "ftray-bench-methods"), lambda _: None
        )


def alone(method: str, rate: float, steps: int, prepared: str) -> dict[str, Any]:
    """One run in a process of its own."""
    command = [sys.executable, __file__, "--one", f"{method}@{rate}", "--steps", str(steps), "--prepared", prepared]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{method} at {rate} failed:\n{done.stderr[-3000:]}")
    return json.loads(lines[0].removeprefix("RESULT "))


if __name__ == "__main__":
    main()
