"""The OpenAPI description, and what a generator of requests finds with it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.serve.conftest import ADMIN_KEY, HTTP, Running, idle


def test_it_describes_every_route_and_both_bodies(shared: Running) -> None:
    found = HTTP.get(f"{shared.url}/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/healthz", "/readyz", "/metrics"} <= set(
        found["paths"]
    )
    chat = found["components"]["schemas"]["ChatRequest"]
    assert "messages" in chat["required"]
    assert chat["properties"]["max_tokens"]
    assert "422" not in str(found["paths"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("cases", "examples"), [(600, 50), pytest.param(2000, 250, marks=pytest.mark.long)])
def test_no_server_error_in_generated_requests(
    open_endpoint: Running, tmp_path: Path, cases: int, examples: int
) -> None:
    """Whole and broken ones, of every route, the admin's too. They are counted from our own metrics: those arrived."""
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        "run",
        f"{open_endpoint.url}/openapi.json",
        *("--url", open_endpoint.url),
        *("--header", f"Authorization: Bearer {ADMIN_KEY}"),
        *("--checks", "not_a_server_error"),
        *("--mode", "all"),
        *("--phases", "examples,coverage,fuzzing"),
        *("--max-examples", str(examples)),
        *("--request-timeout", "60"),
        *("--seed", "1"),
        "--continue-on-failure",
        "--no-color",
    ]
    root = Path(__file__).parents[2]
    environment = os.environ | {"SCHEMATHESIS_HOOKS": "tests.serve.schemathesis_hooks", "PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, cwd=tmp_path, env=environment)
    page = HTTP.get(f"{open_endpoint.url}/metrics").text
    statuses: Counter[str] = Counter()
    for line in page.splitlines():
        if line.startswith("ftray_requests_total{"):
            labels, value = line.rsplit(" ", 1)
            statuses[labels.split('status="')[1].split('"')[0]] += int(float(value))
    print(dict(statuses))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert not [status for status in statuses if status.startswith("5")], statuses
    assert sum(statuses.values()) >= cases, statuses
    assert statuses["200"] > cases / 10
    assert statuses["400"] > cases / 20
    assert idle(open_endpoint.engine)
