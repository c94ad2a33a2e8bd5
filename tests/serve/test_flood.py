"""A tenant that floods at ten times its limit, and the other tenant's answers meanwhile."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.conftest import KEYS, Running, config_of, idle, make_engine, serving

BODY: dict[str, Any] = {"model": "base", "prompt": "Once upon a time", "max_tokens": 24, "ignore_eos": True}
ROUNDS = 40
LIMIT = 120
"""Requests a minute of the one that floods."""


def p99(values: list[float]) -> float:
    return sorted(values)[math.ceil(0.99 * len(values)) - 1]


def other_asks(running: Running) -> float:
    """p99 of the other tenant's requests, one after the other, in seconds."""
    seconds = []
    with httpx.Client(headers={"authorization": f"Bearer {KEYS['other']}"}, timeout=60) as http:
        for _ in range(ROUNDS):
            began = time.monotonic()
            assert http.post(f"{running.url}/v1/completions", json=BODY).status_code == 200
            seconds.append(time.monotonic() - began)
    return p99(seconds)


@pytest.mark.long
def test_a_flood_is_refused_at_the_door_and_moves_nobody_else(
    registry: Any, base: Any, tmp_path: Path, tenants_file: Path
) -> None:
    text = tenants_file.read_text().replace("requests_per_minute: 60", f"requests_per_minute: {LIMIT}")
    tenants_file.write_text(text)
    config = config_of(registry, tenants=str(tenants_file), cache={"folder": str(tmp_path / "cache")})
    statuses: Counter[int] = Counter()
    over, refused = threading.Event(), threading.Event()

    def flood(running: Running, gap: float) -> None:
        with httpx.Client(headers={"authorization": f"Bearer {KEYS['poor']}"}, timeout=60) as http:
            while not over.is_set():
                status = http.post(f"{running.url}/v1/completions", json=BODY).status_code
                statuses[status] += 1
                if status == 429:
                    refused.set()
                over.wait(gap)

    with serving(config, make_engine(config, base)) as running:
        other_asks(running)  # warm
        alone = other_asks(running)
        began, workers = time.monotonic(), 8
        gap = workers / (10 * LIMIT / 60)  # together ten times the limit
        threads = [threading.Thread(target=flood, args=(running, gap)) for _ in range(workers)]
        for thread in threads:
            thread.start()
        assert refused.wait(30), "what it had saved up is spent"
        flooded = other_asks(running)
        over.set()
        for thread in threads:
            thread.join(60)
        minutes = (time.monotonic() - began) / 60
        assert statuses.keys() == {200, 429}
        assert statuses[200] <= LIMIT * (1 + minutes) + 1
        assert idle(running.engine)
    print(
        f"p99 of the other tenant, flooded / alone: {flooded / alone:.2f}"
    )  # a matter of the clock: told, not asserted
