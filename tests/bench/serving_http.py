"""The endpoint's speed, through Ray Serve and HTTP, against the engine alone: whole answers, and streamed ones.

    python tests/bench/serving_http.py [--rounds 3] [--tokens 6000]

The base, slots, prompts and answers of serving.py, greedy and without adapters; twice as many clients as slots, in a
process of their own on the same machine, each with a new request for each that ends. Rounds go through all cases in
turn; printed are medians of tokens/s and of the ratios to the engine alone within a round [least–most], and the CPU
that each process took for a thousand tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import socket
import statistics
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench.serving import ANSWER, PROMPT, SLOTS, closed_loop, the_base

ENGINE: dict[str, Any] = {"slots": SLOTS, "context": 512, "reuse_prefixes": False}
MARKS = {"whole": 0.9, "streamed": 0.8}


async def ask_all(url: str, streams: bool, tokens: int) -> dict[str, float]:
    """tokens/s of 2 × SLOTS clients, from when all have begun until `tokens` have come."""
    import aiohttp
    import numpy as np

    random = np.random.default_rng(0)
    written, begun, over = 0, 0.0, asyncio.Event()

    async def client(session: aiohttp.ClientSession) -> None:
        nonlocal written
        while not over.is_set():
            prompt = random.integers(10, 2000, PROMPT).tolist()
            body = {"model": "base", "prompt": prompt, "max_tokens": ANSWER, "temperature": 0, "ignore_eos": True}
            async with session.post(f"{url}/v1/completions", json=body | {"stream": streams}) as answer:
                assert answer.status == 200, await answer.text()
                if streams:
                    last = b""
                    async for chunk in answer.content.iter_any():
                        last = (last + chunk)[-64:]
                    assert b"data: [DONE]" in last
                else:
                    assert (await answer.json())["usage"]["completion_tokens"] == ANSWER
            written += ANSWER
            if begun and written >= tokens:
                over.set()

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(600)) as session:
        clients = [asyncio.create_task(client(session)) for _ in range(2 * SLOTS)]
        while written < SLOTS * ANSWER:  # the slots are full by now, and not in step
            await asyncio.sleep(0.01)
        written, begun = 0, time.perf_counter()
        await over.wait()
        speed = written / (time.perf_counter() - begun)
        for task in clients:
            task.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
    return {"speed": speed}


def ask_engine(tokens: int) -> dict[str, float]:
    from ftray.config import Model
    from ftray.engine.engine import Engine, load_base
    from ftray.engine.options import EngineOptions

    engine = Engine(load_base(Model(path=str(the_base()))), None, EngineOptions(**ENGINE))  # type: ignore[arg-type]
    return closed_loop(engine, itertools.repeat(None), tokens)


def in_a_process(*arguments: str) -> dict[str, float]:
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def processor_seconds() -> dict[str, float]:
    """Of each kind of this process's descendants."""
    kinds = {"ServeReplica:ftray:Engine": "engine", "ServeReplica:ftray:Ingress": "ingress"}
    found: dict[str, float] = {}
    for process in psutil.Process().children(recursive=True):
        line = " ".join(process.cmdline())
        kind = next((kind for name, kind in kinds.items() if name in line), "Ray")
        found[kind] = found.get(kind, 0.0) + sum(process.cpu_times()[:2])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=6000, help="of each case in a round")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part == "engine":
        print(json.dumps(ask_engine(arguments.tokens)))
        return
    if arguments.part:
        print(json.dumps(asyncio.run(ask_all(arguments.url, arguments.part == "streamed", arguments.tokens))))
        return
    from serve.config import parse_serve
    from serve.local import running, session

    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    args = {"model": {"path": str(the_base())}, "engine": ENGINE}
    application = {"import_path": "serve.app:build", "args": args}
    file = parse_serve(json.dumps({"http_options": {"port": port}, "applications": [application]}), "bench")
    rounds: list[dict[str, float]] = []
    costs: dict[str, dict[str, float]] = {}
    with session(file), running(file) as url:
        for number in range(arguments.rounds):
            rounds.append({})
            for part in ("engine", *MARKS):
                before = processor_seconds()
                speed = in_a_process("--part", part, "--url", url, "--tokens", str(arguments.tokens))["speed"]
                after = processor_seconds()
                rounds[-1][part] = speed
                warm_up = 0 if part == "engine" else SLOTS * ANSWER
                thousands = (arguments.tokens + warm_up) / 1000
                costs[part] = {kind: (after[kind] - before.get(kind, 0)) / thousands for kind in after}
                print(f"  round {number + 1}, {part}: {speed:,.0f} tokens/s", flush=True)
    print("\n| case | tokens/s | of the engine alone | mark | CPU s for 1,000 tokens: engine, ingress, Ray |")
    print("|---|---:|---:|---:|---|")
    for part in rounds[0]:
        ratios = [each[part] / each["engine"] for each in rounds]
        shown = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}–{max(ratios):.2f}]"
        cost = ", ".join(f"{costs[part].get(kind, 0):.2f}" for kind in ("engine", "ingress", "Ray"))
        speed = statistics.median(each[part] for each in rounds)
        print(f"| {part} | {speed:,.0f} | {shown} | {MARKS.get(part, '')} | {cost} |")


if __name__ == "__main__":
    main()
