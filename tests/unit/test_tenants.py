"""Tenants, their keys and their limits."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftray.errors import ConfigError
from serve.errors import ApiError
from serve.limits import Quotas
from serve.tenants import Keyring, Limits, Tenants, _read, hash_of, new_key, parse_tenants


def tenants_text(*tenants: str) -> str:
    return "tenants:\n" + "\n".join(tenants)


def tenant(name: str, *keys: str, more: str = "") -> str:
    lines = "\n".join(f"    - {{sha256: {hash_of(key)}}}" for key in keys)
    return f"  {name}:\n    keys:\n{lines}\n{more}"


# --------------------------------------------------------------------------------------------------------------- keys


def test_a_new_key_is_long_and_random_and_only_its_hash_stands_in_the_file() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    for key, digest in keys:
        assert len(key) >= 48
        assert hash_of(key) == digest
        assert key not in tenants_text(tenant("acme", key))


def test_any_key_of_a_tenant_opens_until_its_end() -> None:
    now = datetime(2026, 6, 1, tzinfo=UTC)
    text = f"""
tenants:
  acme:
    keys:
    - {{sha256: {hash_of("old")}, not_after: 2026-06-02T00:00:00Z}}
    - {{sha256: {hash_of("new")}}}
  other:
    keys: [{{sha256: {hash_of("theirs")}}}]
"""
    ring = Keyring(parse_tenants(text, "t"))
    assert ring.tenant_of("old", now) == "acme"
    assert ring.tenant_of("new", now) == "acme"
    assert ring.tenant_of("theirs", now) == "other"
    assert ring.tenant_of("old", now + timedelta(days=1)) is None
    assert ring.tenant_of("new", now + timedelta(days=1)) == "acme"
    for wrong in ("", "ol", "old ", "OLD", hash_of("old"), "\ud800", "ключ"):
        assert ring.tenant_of(wrong, now) is None


def test_every_key_is_compared_and_each_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    compared: list[bytes] = []
    real = hmac.compare_digest
    monkeypatch.setattr("serve.tenants.hmac.compare_digest", lambda a, b: (compared.append(b), real(a, b))[1])
    text = tenants_text(*(tenant(f"t{i}", f"key {i}") for i in range(5)))
    ring = Keyring(parse_tenants(text, "t"))
    for key in ("key 0", "key 4", "none"):
        compared.clear()
        ring.tenant_of(key, datetime.now(UTC))
        assert len(compared) == 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tenants: {}", "at least 1"),
        ("tenants: {acme: {keys: []}}", "at least 1"),
        ("tenants: {Acme: {keys: [{sha256: ...}]}}", "tenants.Acme"),
        (tenants_text(tenant("acme", "a", more="    limit: {concurrency: 1}")), "did you mean 'limits'?"),
        (tenants_text(tenant("acme", "a", more="    limits: {concurency: 1}")), "did you mean 'concurrency'?"),
        (tenants_text(tenant("acme", "a", more="    limits: {concurrency: 0}")), "greater than or equal to 1"),
        (tenants_text(tenant("acme", "a", more="    adapters: [cheese]")), "adapters"),
        (tenants_text(tenant("acme", "a", more="    adapters: [../x/y]")), "adapters"),
        (tenants_text(tenant("acme", "same"), tenant("other", "same")), "same key"),
        ("tenants: {acme: {keys: [{sha256: secret}]}}", "sha256"),
        (f"tenants: {{acme: {{keys: [{{sha256: {hash_of('a')}, not_after: 2026-01-01T00:00:00}}]}}}}", "timezone"),
        ("tenants:\n  acme: {}\n  acme: {}", "stands twice"),
        ("- acme", "a mapping of keys"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_tenants(text, "tenants.yaml")
    assert said in str(error.value)
    assert "tenants.yaml" in str(error.value)


@pytest.mark.parametrize("key", ["concurrency", "requests_per_minute"])
def test_a_limit_that_cannot_be_divided_is_refused(key: str, tmp_path: Path) -> None:
    """Each of four ingresses would let one in: twice the limit."""

    def text(limit: int) -> str:
        return tenants_text(tenant("acme", "a", more=f"    limits: {{{key}: {limit}}}"))

    assert parse_tenants(text(4), "t", ingresses=4).tenants["acme"].limits
    with pytest.raises(ConfigError) as error:
        parse_tenants(text(2), "t", ingresses=4)
    assert f"tenants.acme.limits.{key}: 2 among 4 ingresses (ingress.replicas)" in str(error.value)
    assert "at least 4 each" in str(error.value)
    file = tmp_path / "tenants.yaml"
    file.write_text(text(4))
    tenants = Tenants(str(file), every=0, ingresses=4)
    file.write_text(text(2))
    assert "the last good tenants stay" in (tenants.refresh() or "")


# ----------------------------------------------------------------------------------------------------------- re-reading


def test_a_changed_file_is_taken_up_and_a_broken_one_is_not(tmp_path: Path) -> None:
    file = tmp_path / "tenants.yaml"
    file.write_text(tenants_text(tenant("acme", "one")))
    tenants = Tenants(str(file), every=0)
    assert tenants.tenant_of("one") == "acme"
    assert tenants.refresh() is None

    file.write_text(tenants_text(tenant("acme", "two")))
    said = tenants.refresh()
    assert said is not None
    assert "read again" in said
    assert tenants.tenant_of("one") is None
    assert tenants.tenant_of("two") == "acme"

    for broken in ("tenants: [", tenants_text(tenant("acme", "three", more="    adaptors: []"))):
        file.write_text(broken)
        said = tenants.refresh()
        assert said is not None
        assert "the last good tenants stay" in said
        assert tenants.status.error is not None
        assert tenants.refresh() is None, "said once"
        assert tenants.tenant_of("two") == "acme"

    os.unlink(file)
    assert "no such file" in (tenants.refresh() or "")
    assert tenants.tenant_of("two") == "acme"

    file.write_text(tenants_text(tenant("acme", "four")))
    assert "read again" in (tenants.refresh() or "")
    assert tenants.status.error is None
    assert tenants.tenant_of("four") == "acme"


def test_one_who_looks_at_a_store_that_stands_still_holds_up_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tenants.yaml"
    file.write_text(tenants_text(tenant("acme", "one")))
    tenants = Tenants(str(file), every=0)
    looking, goes_on, real = threading.Event(), threading.Event(), _read

    def stands_still(uri: str) -> str:
        looking.set()
        assert goes_on.wait(60)
        return real(uri)

    monkeypatch.setattr("serve.tenants._read", stands_still)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(tenants.refresh)
        assert looking.wait(60)
        assert threads.submit(tenants.refresh).result(60) is None
        goes_on.set()
        assert first.result(60) is None


def test_the_file_may_be_anywhere_fsspec_reads() -> None:
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.pipe("/tenants-test/t.yaml", tenants_text(tenant("acme", "one")).encode())
    tenants = Tenants("memory://tenants-test/t.yaml", every=0)
    fs.pipe("/tenants-test/t.yaml", tenants_text(tenant("acme", "two")).encode())
    tenants.refresh()
    assert tenants.tenant_of("two") == "acme"


def test_an_endpoint_does_not_start_without_its_keys(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file of tenants"):
        Tenants(str(tmp_path / "none.yaml"), every=1)


# --------------------------------------------------------------------------------------------------------------- limits


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_requests_a_minute() -> None:
    clock, limits = Clock(), Limits(requests_per_minute=6)
    quotas = Quotas(clock=clock)
    for _ in range(6):
        quotas.admit_request("acme", limits)
    with pytest.raises(ApiError) as error:
        quotas.admit_request("acme", limits)
    assert error.value.status == 429
    assert error.value.headers["retry-after"] == "10"
    quotas.admit_request("other", limits)
    clock.now = 10.01
    quotas.admit_request("acme", limits)
    with pytest.raises(ApiError):
        quotas.admit_request("acme", limits)


def test_tokens_a_minute_count_answers_too_and_what_is_owed_is_waited_for() -> None:
    clock, limits = Clock(), Limits(tokens_per_minute=600)
    quotas = Quotas(clock=clock)
    ticket = quotas.admit("acme", limits, tokens=100, answers=1)
    ticket.charge(1100)  # 600 owed
    ticket.close()
    with pytest.raises(ApiError) as error:
        quotas.admit("acme", limits, tokens=1, answers=1)
    assert error.value.headers["retry-after"] == "61"
    clock.now = 59.9
    with pytest.raises(ApiError):
        quotas.admit("acme", limits, tokens=1, answers=1)
    clock.now = 60.2
    quotas.admit("acme", limits, tokens=1, answers=1)


def test_concurrency_counts_answers_and_each_ticket_once() -> None:
    limits = Limits(concurrency=3)
    quotas = Quotas()
    first = quotas.admit("acme", limits, tokens=1, answers=2)
    with pytest.raises(ApiError) as error:
        quotas.admit("acme", limits, tokens=1, answers=2)
    assert error.value.status == 429
    first.close()
    first.close()
    quotas.admit("acme", limits, tokens=1, answers=2)
    with pytest.raises(ApiError):
        quotas.admit("acme", limits, tokens=1, answers=2)
    with pytest.raises(ApiError) as error:
        quotas.admit("acme", limits, tokens=1, answers=4)
    assert error.value.status == 400, "waiting would never help"


def test_new_limits_hold_at_once_and_open_tickets_still_count() -> None:
    quotas = Quotas()
    ticket = quotas.admit("acme", Limits(concurrency=5), tokens=1, answers=2)
    with pytest.raises(ApiError):
        quotas.admit("acme", Limits(concurrency=2), tokens=1, answers=1)
    ticket.close()
    quotas.admit("acme", Limits(concurrency=2), tokens=1, answers=2)


def test_a_share_is_told_as_one() -> None:
    quotas = Quotas(shares=4)
    with pytest.raises(ApiError, match=r"more than the 2 at one of 4 ingresses, which share .* concurrency of 8"):
        quotas.admit("acme", Limits(concurrency=8), tokens=1, answers=3)
    quotas.admit("acme", Limits(concurrency=8), tokens=1, answers=2)
    with pytest.raises(ApiError, match="8 answers at once, of which 4 ingresses have an even share each"):
        quotas.admit("acme", Limits(concurrency=8), tokens=1, answers=1)
    with pytest.raises(ApiError, match="more than this tenant's concurrency of 2"):
        Quotas().admit("acme", Limits(concurrency=2), tokens=1, answers=3)


@given(st.integers(1, 5), st.integers(1, 200), st.lists(st.floats(0, 30), min_size=1, max_size=60))
def test_several_ingresses_together_admit_no_more_than_the_limit(
    shares: int, per_minute: int, gaps: list[float]
) -> None:
    """Whatever the times of requests: in any span, no more than the span's amount, and a minute's in store."""
    clock, limits = Clock(), Limits(requests_per_minute=max(per_minute, shares))
    every = [Quotas(shares, clock) for _ in range(shares)]
    admitted = 0
    for gap in gaps:
        clock.now += gap
        for quotas in every:
            for _ in range(3):
                try:
                    quotas.admit_request("acme", limits)
                except ApiError:
                    continue
                admitted += 1
    most = max(per_minute, shares) * (1 + clock.now / 60)
    assert admitted <= most + 1e-6
