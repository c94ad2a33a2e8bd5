"""Bad requests, unknown adapters, other people's adapters, keys, limits: the right 4xx, and nothing moves inside."""

from __future__ import annotations

import json
import random
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from serve.limits import Quotas
from serve.tenants import hash_of
from tests.serve.conftest import ADMIN_KEY, HTTP, KEYS, TENANTS, Running, eventually, idle

CHAT: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}


def post(running: Running, body: Any, path: str = "/v1/chat/completions", **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"content-type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
    return HTTP.post(running.url + path, content=content, headers=sent)


def is_refusal(answer: httpx.Response) -> bool:
    """Whether it is of OpenAI's shape."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return 400 <= answer.status_code < 500


def nested(depth: int) -> bytes:
    """A body with a schema so deep: orjson reads 1,024 levels, and json writes fewer."""
    schema = b'{"items":' * depth + b"{}" + b"}" * depth
    wanted = b'{"type":"json_schema","json_schema":{"name":"x","schema":' + schema + b"}}"
    return json.dumps(CHAT).encode()[:-1] + b',"response_format":' + wanted + b"}"


BAD: list[tuple[Any, str | None]] = [
    (b"", None),
    (b"{", None),
    (b"[]", None),
    (b'"text"', None),
    (b"\xff\xfe", None),
    ({}, "model"),
    ({**CHAT, "model": None}, "model"),
    ({**CHAT, "model": 3}, "model"),
    ({**CHAT, "model": ""}, "model"),
    ({"model": "base"}, "messages"),
    ({**CHAT, "messages": []}, "messages"),
    ({**CHAT, "messages": "Hello"}, "messages"),
    ({**CHAT, "messages": [{"role": "robot", "content": "x"}]}, "messages"),
    ({**CHAT, "messages": [{"role": "user"}]}, "messages"),
    ({**CHAT, "messages": [{"role": "user", "content": 3}]}, "messages"),
    ({**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
    ({**CHAT, "max_tokens": 0}, "max_tokens"),
    ({**CHAT, "max_tokens": -1}, "max_tokens"),
    ({**CHAT, "max_tokens": 1.5}, "max_tokens"),
    ({**CHAT, "max_tokens": "2"}, "max_tokens"),
    ({**CHAT, "max_tokens": 10, "max_completion_tokens": 11}, None),
    ({**CHAT, "temperature": -0.1}, "temperature"),
    ({**CHAT, "temperature": 2.1}, "temperature"),
    ({**CHAT, "temperature": "hot"}, "temperature"),
    (b'{"model":"base","messages":[{"role":"user","content":"x"}],"temperature":NaN}', None),
    ({**CHAT, "top_p": 0}, "top_p"),
    ({**CHAT, "top_p": 1.1}, "top_p"),
    ({**CHAT, "n": 0}, "n"),
    ({**CHAT, "n": 17}, "n"),
    ({**CHAT, "n": 10**9}, "n"),
    ({**CHAT, "stop": [""]}, "stop"),
    ({**CHAT, "stop": ["x"] * 17}, "stop"),
    ({**CHAT, "stop": 3}, "stop"),
    ({**CHAT, "seed": "x"}, "seed"),
    ({**CHAT, "seed": 2**80}, None),
    ({**CHAT, "logit_bias": {"x": 1}}, "logit_bias"),
    ({**CHAT, "logit_bias": {"1": 101}}, "logit_bias"),
    ({**CHAT, "logit_bias": {"99999999": 1}}, None),
    ({**CHAT, "presence_penalty": 3}, "presence_penalty"),
    ({**CHAT, "logprobs": 3}, "logprobs"),
    ({**CHAT, "top_logprobs": 3}, None),
    ({**CHAT, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({**CHAT, "stream": "yes"}, "stream"),
    ({**CHAT, "stream_options": {"include_usage": True}}, None),
    ({**CHAT, "response_format": {"type": "xml"}}, "response_format"),
    ({**CHAT, "response_format": {"type": "json_schema"}}, "response_format"),
    (nested(300), "response_format"),
    (nested(1000), "response_format"),
    (nested(5000), None),
    ({**CHAT, "tools": [{"type": "function"}]}, "tools"),
    ({**CHAT, "tool_choice": "auto"}, "tool_choice"),
    ({**CHAT, "modalities": ["audio"]}, "modalities"),
    ({**CHAT, "temprature": 0.5}, "temprature"),
    ({**CHAT, "messages": [{"role": "user", "content": "word " * 5000}]}, "messages"),
]
BAD_COMPLETIONS: list[tuple[Any, str | None]] = [
    ({"model": "base"}, "prompt"),
    ({"model": "base", "prompt": []}, "prompt"),
    ({"model": "base", "prompt": [[]]}, "prompt"),
    ({"model": "base", "prompt": [-1]}, "prompt"),
    ({"model": "base", "prompt": [2**40]}, "prompt"),
    ({"model": "base", "prompt": ["a", 1]}, "prompt"),
    ({"model": "base", "prompt": ["a"] * 17}, "n"),
    ({"model": "base", "prompt": ["a"] * 50_000}, "n"),
    ({"model": "base", "prompt": [{}] * 50_000}, "n"),
    ({"model": "base", "prompt": "a", "echo": True}, "echo"),
    ({"model": "base", "prompt": "a", "best_of": 3}, None),
    ({"model": "base", "prompt": "a", "suffix": "z"}, "suffix"),
    ({"model": "base", "prompt": "a", "logprobs": 21}, "logprobs"),
]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [("/v1/chat/completions", *case) for case in BAD] + [("/v1/completions", *case) for case in BAD_COMPLETIONS],
)
def test_a_bad_request_is_told_what_is_wrong(shared: Running, path: str, body: Any, param: str | None) -> None:
    answer = post(shared, body, path)
    assert answer.status_code == 400, answer.text
    assert is_refusal(answer)
    if param:
        assert answer.json()["error"]["param"] == param, answer.text


def test_near_names_are_told(shared: Running) -> None:
    error = post(shared, {**CHAT, "temprature": 0.5}).json()["error"]
    assert "did you mean 'temperature'?" in error["message"]


def test_routes_that_are_not_there_and_methods_that_do_not_fit(shared: Running) -> None:
    for path, status in (("/v1/none", 404), ("/v1/embeddings", 404), ("/v1//chat", 404), ("/../etc/passwd", 404)):
        answer = HTTP.get(shared.url + path)
        assert answer.status_code == status
        assert is_refusal(answer)
    answer = HTTP.get(shared.url + "/v1/chat/completions")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    assert is_refusal(answer)


def test_bodies_are_bounded_before_they_are_read(shared: Running) -> None:
    most = shared.endpoint.config.bounds.body_bytes
    answer = post(shared, b" " * (most + 1))
    assert answer.status_code == 413
    assert is_refusal(answer)

    def forever() -> Any:
        for _ in range(most // 1000 + 10):
            yield b" " * 1000

    kind = {"content-type": "application/json"}
    answer = HTTP.post(f"{shared.url}/v1/completions", content=forever(), headers=kind)  # its length is not told
    assert answer.status_code == 413
    inside = b" " * (most - 200) + json.dumps(CHAT).encode()
    assert post(shared, inside).status_code == 200


def test_2000_bad_requests_and_500_unknown_adapters_leave_nothing_behind(open_endpoint: Running) -> None:
    chances, process = random.Random(0), psutil.Process()
    client = open_endpoint.client()
    for model in ("acme/cheese", "acme/brie"):
        client.chat.completions.create(**{**CHAT, "model": model})
    before = open_endpoint.engine.stats()

    def bad(count: int, http: httpx.Client) -> None:
        for _ in range(count):
            body, _ = chances.choice(BAD)
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            answer = http.post(f"{open_endpoint.url}/v1/chat/completions", content=content)
            assert answer.status_code == 400

    def unknown(count: int, http: httpx.Client) -> None:
        for _ in range(count):
            name = f"t{chances.randrange(10**6)}/n{chances.randrange(10**9)}"
            answer = http.post(f"{open_endpoint.url}/v1/chat/completions", json={**CHAT, "model": name})
            assert answer.status_code == 404

    with httpx.Client(headers={"content-type": "application/json"}, timeout=60) as http:
        bad(500, http)
        unknown(100, http)
        for _ in range(3):  # the process is not ours alone: what they leave behind grows every time
            memory = process.memory_info().rss
            bad(1500, http)
            unknown(400, http)
            if (grown := process.memory_info().rss - memory) < 32 << 20:
                break
    assert grown < 32 << 20
    after = open_endpoint.engine.stats()
    assert after.resident == before.resident
    assert (after.adapter_loads, after.adapter_evictions) == (before.adapter_loads, before.adapter_evictions)
    assert idle(open_endpoint.engine)


# --------------------------------------------------------------------------------------------------- keys and tenants


def test_without_a_key_or_with_a_wrong_one(closed_endpoint: Running) -> None:
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": KEYS["acme"]},
        {"authorization": "Bearer"},
    ):
        models = HTTP.get(f"{closed_endpoint.url}/v1/models", headers=headers)
        for answer in (models, post(closed_endpoint, CHAT, **headers)):
            assert answer.status_code == 401
            assert is_refusal(answer)
            assert answer.headers["www-authenticate"] == "Bearer"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{closed_endpoint.url}/v1", api_key="wrong").models.list()


def test_a_tenant_has_its_own_names_and_those_it_is_given(closed_endpoint: Running) -> None:
    acme, other = closed_endpoint.client("acme"), closed_endpoint.client("other")
    assert [m.id for m in acme.models.list()] == ["embedded", "brie", "cheese", "shared/common"]
    assert [m.id for m in other.models.list()] == ["embedded", "cheese"]
    ask = {"messages": CHAT["messages"], "temperature": 0, "max_tokens": 12}
    mine = acme.chat.completions.create(model="cheese", **ask).choices[0].message.content
    theirs = other.chat.completions.create(model="cheese", **ask).choices[0].message.content
    assert mine != theirs
    assert acme.chat.completions.create(model="acme/cheese", **ask).choices[0].message.content == mine
    assert acme.chat.completions.create(model="shared/common", **ask).choices[0].message.content == mine
    assert acme.chat.completions.create(model="brie", **ask).choices[0].message.content == theirs


def test_what_is_foreign_and_what_is_not_there_is_one_and_the_same(closed_endpoint: Running) -> None:
    def refusal(model: str) -> tuple[int, str, dict[str, str]]:
        answer = post(closed_endpoint, {**CHAT, "model": model}, authorization=f"Bearer {KEYS['other']}")
        headers = {k: v for k, v in answer.headers.items() if k not in ("date", "content-length", "x-request-id")}
        error = answer.json()["error"]
        error["message"] = error["message"].replace(repr(model), "NAME")
        return answer.status_code, json.dumps(error), headers

    digest = closed_endpoint.endpoint.catalog.registry.resolve("acme", "cheese").digest  # type: ignore[union-attr]
    names = [
        "acme/cheese",
        f"acme/cheese@{digest}",
        f"cheese@{digest}",
        "shared/common",
        "brie",
        "other/none",
        "none/none",
    ]
    names += [
        "../acme/cheese",
        "acme/../acme/cheese",
        "ACME/cheese",
        "a/b/c",
        "@",
        "/",
        "x" * 200,
        "acme/cheese\n",
        "ü",
    ]
    seen = {json.dumps(refusal(name)) for name in names}
    assert len(seen) == 1, seen
    assert json.loads(seen.pop())[0] == 404
    assert closed_endpoint.engine.stats().adapter_loads == 0


def test_keys_are_rotated_without_a_restart(closed_endpoint: Running, tenants_file: Path) -> None:
    def status(key: str) -> int:
        return post(closed_endpoint, CHAT, authorization=f"Bearer {key}").status_code

    def write(*keys: tuple[str, datetime | None]) -> None:
        text = TENANTS.format(**{name: hash_of(key) for name, key in KEYS.items()})
        own = "".join(f"{{sha256: {hash_of(k)}{f', not_after: {t.isoformat()}' if t else ''}}}, " for k, t in keys)
        tenants_file.write_text(text.replace(f"{{sha256: {hash_of(KEYS['acme'])}}}", own))

    def broken() -> bool:
        assert status("new key") == 200
        return "tenants" in HTTP.get(f"{closed_endpoint.url}/readyz").json()

    assert status(KEYS["acme"]) == 200
    now = datetime.now(UTC)
    write((KEYS["acme"], now + timedelta(hours=1)), ("new key", None))
    assert eventually(lambda: status("new key") == 200)
    assert status(KEYS["acme"]) == 200
    write((KEYS["acme"], now - timedelta(seconds=1)), ("new key", None))
    assert eventually(lambda: status(KEYS["acme"]) == 401)
    assert status("new key") == 200
    tenants_file.write_text("tenants: {broken")
    assert eventually(broken)
    ready = HTTP.get(f"{closed_endpoint.url}/readyz").json()
    assert "the last good ones" in ready["tenants"]


def test_limits_of_one_tenant_are_not_anothers(closed_endpoint: Running) -> None:
    closed_endpoint.endpoint.quotas = Quotas(clock=lambda: 0.0)  # what is spent does not come back
    with httpx.Client(headers={"authorization": f"Bearer {KEYS['poor']}"}, timeout=60) as poor:
        url, unknown = f"{closed_endpoint.url}/v1/chat/completions", {**CHAT, "model": "none"}
        answers = [poor.post(url, json=unknown) for _ in range(70)]
    assert [a.status_code for a in answers] == [404] * 60 + [429] * 10
    refused = answers[60:]
    assert all(int(a.headers["retry-after"]) >= 1 for a in refused)
    assert refused[0].json()["error"]["code"] == "rate_limit_exceeded"
    assert post(closed_endpoint, CHAT, authorization=f"Bearer {KEYS['acme']}").status_code == 200


def test_concurrency_counts_choices_and_comes_back(closed_endpoint: Running) -> None:
    client = closed_endpoint.client("poor")
    with pytest.raises(openai.BadRequestError, match="concurrency"):
        client.chat.completions.create(**{**CHAT, "n": 3})
    for _ in range(5):
        client.chat.completions.create(**{**CHAT, "n": 2})


# ------------------------------------------------------------------------------------------------------- this machine


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "evil.example:8000"},
        {"host": "127.0.0.1.evil.example"},
        {"x-forwarded-for": "203.0.113.9"},
        {"forwarded": "for=203.0.113.9"},
    ],
)
def test_without_keys_only_this_machine_is_answered(shared: Running, headers: dict[str, str]) -> None:
    """A page elsewhere that has its name lead to 127.0.0.1 is not this machine, nor is what a proxy passes on."""
    answer = HTTP.post(f"{shared.url}/v1/chat/completions", json=CHAT, headers=headers)
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "loopback_only"
    assert HTTP.get(f"{shared.url}/", headers=headers).status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "http://127.0.0.1:1"},
        {"origin": "http://127.0.0.1.evil.example"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
        {"sec-fetch-site": "same-site", "sec-fetch-mode": "cors"},
        {"via": "1.1 proxy"},
        {"x-real-ip": "203.0.113.9"},
    ],
    ids=str,
)
def test_without_keys_no_page_from_elsewhere_is_answered(shared: Running, headers: dict[str, str]) -> None:
    """It could not read the answer, and would have it computed."""
    written = shared.engine.stats().written_tokens
    answer = HTTP.post(f"{shared.url}/v1/chat/completions", json=CHAT, headers=headers)
    assert answer.status_code == 403
    assert is_refusal(answer)
    assert HTTP.get(f"{shared.url}/v1/models", headers=headers).status_code == 403
    assert shared.engine.stats().written_tokens == written


def test_our_own_page_is_answered_and_may_be_linked_to(shared: Running) -> None:
    own = {"origin": shared.url, "sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}
    assert HTTP.post(f"{shared.url}/v1/chat/completions", json=CHAT, headers=own).status_code == 200
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert HTTP.get(f"{shared.url}/", headers=link).status_code == 200
    typed = {"sec-fetch-site": "none", "sec-fetch-mode": "navigate"}
    assert HTTP.get(f"{shared.url}/", headers=typed).status_code == 200


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_body_that_is_not_called_json_is_refused(shared: Running, path: str, kind: str | None) -> None:
    headers = {"content-type": kind} if kind else {}
    answer = HTTP.post(f"{shared.url}{path}", content=json.dumps(CHAT).encode(), headers=headers)
    assert answer.status_code == 415
    assert is_refusal(answer)
    assert "Content-Type: application/json" in answer.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-8", "Application/JSON"])
def test_json_by_any_of_its_names_is_taken(shared: Running, kind: str) -> None:
    assert post(shared, CHAT, content_type=kind).status_code == 200


def test_with_keys_any_host_name_will_do(closed_endpoint: Running) -> None:
    for more in ({"host": "models.example"}, {"origin": "https://app.example", "sec_fetch_site": "cross-site"}):
        answer = post(closed_endpoint, CHAT, authorization=f"Bearer {KEYS['acme']}", **more)
        assert answer.status_code == 200, more


# --------------------------------------------------------------------------------------------------------------- admin


def test_admin_calls_need_the_admin_key(closed_endpoint: Running) -> None:
    url = f"{closed_endpoint.url}/admin/adapters"
    assert HTTP.get(url).status_code == 401
    assert HTTP.get(url, headers={"authorization": f"Bearer {KEYS['acme']}"}).status_code == 401
    found = HTTP.get(url, headers={"authorization": f"Bearer {ADMIN_KEY}"})
    assert found.status_code == 200
    names = [adapter["name"] for adapter in found.json()["adapters"]]
    assert names == ["acme/brie", "acme/cheese", "other/cheese", "shared/common"]


def test_admin_pins_rolls_back_and_removes(closed_endpoint: Running, artefacts: dict[str, Path]) -> None:
    from ftray.registry.publish import publish

    store = closed_endpoint.endpoint.catalog.registry
    assert store is not None
    http = httpx.Client(base_url=closed_endpoint.url, headers={"authorization": f"Bearer {ADMIN_KEY}"}, timeout=60)
    first, second = store.resolve("acme", "cheese").digest, store.resolve("acme", "brie").digest
    acme, ask = closed_endpoint.client("acme"), {"messages": CHAT["messages"], "temperature": 0, "max_tokens": 12}

    def said() -> str | None:
        return acme.chat.completions.create(model="cheese", **ask).choices[0].message.content

    before = said()
    publish(artefacts["second"], store, "acme", "cheese")
    assert http.post("/admin/refresh").json() == {"refreshed": True}
    after = said()
    assert after != before
    found = http.get("/admin/adapters", params={"tenant": "acme"}).json()["adapters"]
    versions = {v["digest"]: v for v in next(a for a in found if a["name"] == "acme/cheese")["versions"]}
    assert set(versions) == {first, second}
    assert versions[first]["resident"]
    assert versions[second]["resident"]

    assert http.post("/admin/adapters/acme/cheese/rollback", json={}).json()["digest"] == first
    assert said() == before
    assert http.post("/admin/adapters/acme/cheese/pin", json={"digest": second[:8]}).status_code == 200
    assert http.delete("/admin/adapters/acme/cheese", params={"digest": second}).status_code == 409
    assert http.post("/admin/adapters/acme/cheese/unpin", json={"digest": second}).json()["unpinned"] is True
    assert http.delete("/admin/adapters/acme/cheese", params={"digest": second}).json() == {"removed": [second]}
    assert http.delete("/admin/adapters/acme/cheese", params={"digest": second}).status_code == 404
    assert http.delete("/admin/adapters/acme/cheese").json() == {"removed": [first]}
    with pytest.raises(openai.NotFoundError):
        said()
    assert http.delete("/admin/adapters/acme/none").status_code == 404
    assert http.delete("/admin/adapters/ACME/none").status_code == 400
    assert http.post("/admin/adapters/acme/brie/pin", json={"diget": "x"}).status_code == 400
    assert http.get("/admin/replicas").json()["replicas"][0]["slots"] == 4


def test_what_stands_in_the_way_of_a_change_is_called_by_its_name(closed_endpoint: Running) -> None:
    store = closed_endpoint.endpoint.catalog.registry
    assert store is not None
    http = httpx.Client(base_url=closed_endpoint.url, headers={"authorization": f"Bearer {ADMIN_KEY}"}, timeout=60)

    def code(answer: httpx.Response) -> str:
        assert answer.status_code == 409, answer.text
        assert is_refusal(answer)
        return answer.json()["error"]["code"]

    digest = store.resolve("acme", "cheese").digest
    assert code(http.delete("/admin/adapters/acme/cheese", params={"digest": digest})) == "adapter_in_use"
    assert code(http.post("/admin/adapters/acme/cheese/rollback", json={})) == "no_earlier_version"
    assert http.post("/admin/adapters/acme/cheese/pin", json={"digest": digest}).status_code == 200
    assert code(http.delete("/admin/adapters/acme/cheese")) == "adapter_in_use"
    folder = Path(store.uri) / "acme" / "brie"
    version = next(path for path in folder.iterdir() if path.is_dir())
    twin = version.name[:8] + "0" * 56
    shutil.copytree(version, folder / twin)
    assert code(http.post("/admin/adapters/acme/brie/pin", json={"digest": version.name[:8]})) == "ambiguous_digest"
    assert code(http.post("/admin/adapters/acme/brie/rollback", json={"digest": twin[:8]})) == "ambiguous_digest"
    (folder / "current.json").write_text("{")
    assert code(http.post("/admin/adapters/acme/brie/rollback", json={})) == "adapter_damaged"
    assert code(http.post("/admin/adapters/acme/brie/pin", json={})) == "adapter_damaged"


def test_metrics_are_for_this_machine_or_the_admin(closed_endpoint: Running) -> None:
    url = f"{closed_endpoint.url}/metrics"
    elsewhere = {"x-forwarded-for": "203.0.113.9"}
    assert HTTP.get(url).status_code == 200
    assert HTTP.get(url, headers=elsewhere).status_code == 401
    assert HTTP.get(url, headers={**elsewhere, "authorization": f"Bearer {ADMIN_KEY}"}).status_code == 200
