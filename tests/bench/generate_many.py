"""`ftray generate` over many prompts with many adapters, killed (SIGKILL) twice and resumed.

    python -m tests.bench.generate_many [--rows 10000] [--adapters 25] [--tokens 8]

Checks that there is exactly one answer a row, in order, and prints the seconds of each of the three goes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ftray.config import Model
from ftray.registry.base import facts_of_base
from tests.adapters import change_facts, seal, write_adapter


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--adapters", type=int, default=25)
    parser.add_argument("--tokens", type=int, default=8)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        base = facts_of_base(Model(path="embedded"))
        for i in range(asked.adapters):
            write_adapter(root / f"a{i}", seed=i, base=base, scale=0.05)
            change_facts(root / f"a{i}", run=None)
            seal(root / f"a{i}")
        with (root / "prompts.jsonl").open("w") as file:
            for i in range(asked.rows):
                row = {"q": f"Tell me about cheese {i}.", "who": f"{root}/a{i % asked.adapters}"}
                file.write(json.dumps(row) + "\n")
        out = root / "out.jsonl"
        command = [sys.executable, "-m", "ftray.cli.main", "generate", str(root / "prompts.jsonl"), "--out", str(out)]
        command += ["--prompt", "{q}", "--adapter-column", "who", "--base", "embedded"]
        command += ["--max-tokens", str(asked.tokens)]
        parts = -(-asked.rows // 256)
        for kill_at in (parts // 4, parts // 2, None):
            began = time.monotonic()
            process = subprocess.Popen(command)
            while process.poll() is None:
                done = len(list(Path(f"{out}.parts").glob("part-*.json")))
                if kill_at is not None and done >= kill_at:
                    os.kill(process.pid, signal.SIGKILL)
                    process.wait()
                    break
                time.sleep(0.05)
            what = f"killed after {kill_at} of {parts} parts" if kill_at is not None else f"exit {process.returncode}"
            print(f"{what}: {time.monotonic() - began:.1f} s", flush=True)
        answers = [json.loads(line) for line in out.read_text().splitlines()]
        assert [answer["row"] for answer in answers] == list(range(1, asked.rows + 1))
        assert all(answer["adapter"] == f"{root}/a{i % asked.adapters}" for i, answer in enumerate(answers))
        failed = sum(answer["error"] is not None for answer in answers)
        print(f"{len(answers):,} answers, one a row, in order; {failed} failed")


if __name__ == "__main__":
    main()
