"""One tenant floods at ten times its quota: what becomes of another tenant's p99.

    python tests/bench/flood.py [--rounds 4] [--requests 150] [--quota 120]

The endpoint on Ray Serve with the embedded base. A quiet tenant asks one question after the other, 24 tokens each:
alone, beside another tenant that sends as many requests a minute as its quota allows, and beside one that sends ten
times as many, from a process of its own. Rounds alternate; a percentile is of all rounds' requests, since a hundredth
of one round is one request.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

BODY: dict[str, Any] = {"model": "base", "prompt": "Once upon a time", "max_tokens": 24, "ignore_eos": True}
KEYS = {"quiet": "the quiet one's key", "loud": "the loud one's key"}
MARK = 1.25
SENDERS = 8


def asked(url: str, tenant: str, http: httpx.Client) -> tuple[int, float]:
    """(status, seconds)"""
    began = time.perf_counter()
    answer = http.post(f"{url}/v1/completions", json=BODY, headers={"authorization": f"Bearer {KEYS[tenant]}"})
    return answer.status_code, time.perf_counter() - began


def flood(url: str, a_second: float, over: Any, counts: Any) -> None:
    statuses: Counter[int] = Counter()

    def send() -> None:
        with httpx.Client(timeout=60) as http:
            due = time.perf_counter()
            while not over.is_set():
                statuses[asked(url, "loud", http)[0]] += 1
                due = max(due + SENDERS / a_second, time.perf_counter() - 1)
                over.wait(max(0.0, due - time.perf_counter()))

    threads = [threading.Thread(target=send) for _ in range(SENDERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts.put(dict(statuses))


def quiet(url: str, requests: int) -> list[float]:
    with httpx.Client(timeout=60) as http:
        answers = [asked(url, "quiet", http) for _ in range(requests)]
    assert {status for status, _ in answers} == {200}
    return [seconds for _, seconds in answers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--requests", type=int, default=150, help="of the quiet tenant, in each half of a round")
    parser.add_argument("--quota", type=int, default=120, help="requests a minute of the loud tenant")
    arguments = parser.parse_args()
    from serve.config import parse_serve
    from serve.local import running, session
    from serve.tenants import hash_of

    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    tenants = {name: {"keys": [{"sha256": hash_of(key)}]} for name, key in KEYS.items()}
    tenants["loud"]["limits"] = {"requests_per_minute": arguments.quota}  # type: ignore[assignment]
    spawn = multiprocessing.get_context("spawn")
    rates = {"alone": 0.0, "beside one within its quota": arguments.quota / 60, "beside the flood": arguments.quota / 6}
    found: dict[str, list[float]] = {name: [] for name in rates}
    sent: dict[str, Counter[int]] = {name: Counter() for name in rates}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tenants.yaml")
        file.write_text(json.dumps({"tenants": tenants}))
        args = {"model": {"path": "embedded"}, "tenants": str(file)}
        application = {"import_path": "serve.app:build", "args": args}
        served = parse_serve(json.dumps({"http_options": {"port": port}, "applications": [application]}), "bench")
        with session(served), running(served) as url:
            quiet(url, 20)
            for number in range(arguments.rounds):
                for name, rate in rates.items():
                    over, counts = spawn.Event(), spawn.Queue()
                    loud = spawn.Process(target=flood, args=(url, rate, over, counts))
                    if rate:
                        loud.start()
                        time.sleep(12)  # its libraries are loaded, and what it had saved up is spent
                    found[name] += quiet(url, arguments.requests)
                    if rate:
                        over.set()
                        sent[name].update(counts.get())
                        loud.join()
                print(f"  round {number + 1} of {arguments.rounds}", flush=True)
    print("\n| quiet tenant | requests | median, ms | p95, ms | p99, ms |\n|---|---:|---:|---:|---:|")
    for name, seconds in found.items():
        figures = np.percentile(np.array(seconds) * 1000, [50, 95, 99])
        print(f"| {name} | {len(seconds)} | " + " | ".join(f"{figure:.0f}" for figure in figures) + " |")
    p99 = {name: float(np.percentile(seconds, 99)) for name, seconds in found.items()}
    alone, within, beside = p99.values()
    ratios = f"{beside / alone:.2f} times that alone, {beside / within:.2f} times that beside one within its quota"
    print(f"\np99 beside the flood: {ratios}; mark {MARK}")
    for name, statuses in sent.items():
        print(f"the loud tenant's answers by status, {name}: {dict(statuses)}")


if __name__ == "__main__":
    main()
