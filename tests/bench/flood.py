"""One tenant floods at ten times its quota: what becomes of another tenant's p99.

    python tests/bench/flood.py [--rounds 4] [--requests 150] [--quota 120]

The endpoint on Ray Serve with the embedded base. A quiet tenant asks one question after the other, 24 tokens each,
alone and beside another tenant that sends ten times what its quota of requests a minute allows, from a process of its
own. Rounds alternate; a percentile is of all rounds' requests, since a hundredth of one round is one request.
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
    found: dict[str, list[float]] = {"alone": [], "beside the flood": []}
    sent: Counter[int] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tenants.yaml")
        file.write_text(json.dumps({"tenants": tenants}))
        args = {"model": {"path": "embedded"}, "tenants": str(file)}
        application = {"import_path": "serve.app:build", "args": args}
        served = parse_serve(json.dumps({"http_options": {"port": port}, "applications": [application]}), "bench")
        with session(served), running(served) as url:
            quiet(url, 20)
            for number in range(arguments.rounds):
                found["alone"] += quiet(url, arguments.requests)
                over, counts = spawn.Event(), spawn.Queue()
                loud = spawn.Process(target=flood, args=(url, arguments.quota / 6, over, counts))
                loud.start()
                time.sleep(5)  # its libraries are loaded, and what it had saved up is spent
                began = time.perf_counter()
                found["beside the flood"] += quiet(url, arguments.requests)
                seconds = time.perf_counter() - began
                over.set()
                sent.update(counts.get())
                loud.join()
                print(f"  round {number + 1}: {seconds:.0f} s beside the flood", flush=True)
    print("\n| quiet tenant | requests | median, ms | p95, ms | p99, ms |\n|---|---:|---:|---:|---:|")
    for name, seconds in found.items():
        figures = np.percentile(np.array(seconds) * 1000, [50, 95, 99])
        print(f"| {name} | {len(seconds)} | " + " | ".join(f"{figure:.0f}" for figure in figures) + " |")
    alone, beside = (float(np.percentile(seconds, 99)) for seconds in found.values())
    print(
        f"\np99 {beside / alone:.2f} times that alone, mark {MARK}; the loud tenant's answers by status: {dict(sent)}"
    )


if __name__ == "__main__":
    main()
