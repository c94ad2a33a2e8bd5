"""An endpoint with one replica a host: either host's proxy answers, for any replica."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from serve.tenants import new_key
from tests.hosts.conftest import Hosts
from tests.ray.runs import wait_for

pytestmark = [pytest.mark.hosts, pytest.mark.root, pytest.mark.timeout(2400)]
PORT = 8000
READY_SECONDS = 900
RAY_SERVE = Path(sys.executable).parent / "serve"
BODY = {"model": "base", "messages": [{"role": "user", "content": "Which cheese?"}], "max_tokens": 8, "temperature": 0}


def write_files(folder: Path) -> tuple[Path, str, str]:
    """(a SERVE.yaml, a tenant's key, the admin's)"""
    (key, digest), (admin, admins_digest) = new_key(), new_key()
    tenants = folder / "tenants.yaml"
    tenants.write_text(yaml.safe_dump({"tenants": {"anna": {"keys": [{"sha256": digest}]}}}))
    args: dict[str, Any] = {
        "model": {"path": "embedded"},
        "tenants": str(tenants),
        "admin_key_sha256": admins_digest,
        "engine": {"slots": 4},
        "cache": {"folder": str(folder / "cache")},
        "replicas": {"min": 2, "max": 2, "cpus": 2, "threads": 1, "gpus": 0, "drain_seconds": 5},
    }
    file = folder / "serve.yaml"
    application = {"name": "ftray", "import_path": "serve.app:build", "args": args}
    file.write_text(
        yaml.safe_dump(
            {
                "http_options": {"host": "0.0.0.0", "port": PORT},
                "proxy_location": "EveryNode",
                "applications": [application],
            }
        )
    )
    return file, key, admin


@pytest.fixture(params=["ftray serve", "serve deploy"])
def endpoint(request: pytest.FixtureRequest, hosts: Hosts, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """(a tenant's key, the admin's) of an endpoint that was deployed in either way."""
    file, key, admin = write_files(tmp_path)
    try:
        if request.param == "ftray serve":
            done = hosts.ftray("head", "serve", str(file))
        else:
            done = hosts.run("client", str(RAY_SERVE), "deploy", str(file))
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        yield key, admin
    finally:
        hosts.run("client", str(RAY_SERVE), "shutdown", "-y")
        wait_for(lambda: not engines(hosts), 300, every=1)


def engines(hosts: Hosts) -> list[str]:
    """Hosts of the engine's replicas."""
    return [host for host in ("head", "worker1") for _ in hosts.named(host, "ServeReplica:ftray:Engine")]


def ask(url: str, key: str) -> httpx.Response:
    return httpx.post(
        f"{url}/v1/chat/completions",
        json=BODY,
        headers={"Authorization": f"Bearer {key}"},
        timeout=120,
        trust_env=False,
    )


def written(url: str, admin: str) -> dict[str, float]:
    """Tokens that each replica has written so far, as the metrics page has them."""
    page = httpx.get(
        f"{url}/metrics", headers={"Authorization": f"Bearer {admin}"}, timeout=120, trust_env=False
    ).raise_for_status()
    found = re.findall(r'^ftray_engine_written_tokens_total\{.*?replica="(.*?)".*\} (\S+)$', page.text, flags=re.M)
    return {replica: float(value) for replica, value in found}


def test_either_hosts_proxy_answers(hosts: Hosts, endpoint: tuple[str, str]) -> None:
    key, admin = endpoint
    texts = set()
    for host in ("head", "worker1"):
        url = f"http://{hosts.addresses[host]}:{PORT}"

        def answered(url: str = url) -> httpx.Response | None:
            try:
                response = ask(url, key)
            except httpx.TransportError:  # the proxy is not there yet
                return None
            return response if response.status_code == 200 else None

        response = wait_for(answered, READY_SECONDS, every=1)
        assert response, host
        for _ in range(4):
            texts.add(ask(url, key).json()["choices"][0]["message"]["content"])
        assert ask(url, "ftray-nobody").status_code == 401
    assert len(texts) == 1, texts
    assert sorted(engines(hosts)) == ["head", "worker1"]
    url = f"http://{hosts.addresses['head']}:{PORT}"
    wait_for(lambda: len(written(url, admin)) == 2, 60, every=1)  # an ingress asks its replicas now and then
    before = written(url, admin)
    with ThreadPoolExecutor(6) as crowd:  # one after the other all would go to the same replica, the least busy one
        assert [answer.status_code for answer in crowd.map(lambda _: ask(url, key), range(24))] == [200] * 24

    def both_wrote() -> bool:
        after = written(url, admin)
        return all(after.get(replica, 0.0) > tokens for replica, tokens in before.items())

    wait_for(both_wrote, 60, every=1)
