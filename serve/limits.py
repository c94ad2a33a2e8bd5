"""How much a tenant may ask: buckets that fill evenly over a minute, and a count of what is in the making."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from .errors import ApiError
from .tenants import Limits

_MINUTE = 60.0


@dataclass
class _Bucket:
    """Holds up to a minute's amount, and refills by it every minute. May be overdrawn: what is owed is waited for."""

    per_minute: float
    level: float
    filled_at: float

    def fill(self, now: float) -> None:
        self.level = min(self.per_minute, self.level + (now - self.filled_at) * self.per_minute / _MINUTE)
        self.filled_at = now

    def seconds_until(self, amount: float) -> float:
        return max(0.0, (amount - self.level) * _MINUTE / self.per_minute)


@dataclass
class _Account:
    limits: Limits = field(default_factory=Limits)
    requests: _Bucket | None = None
    tokens: _Bucket | None = None
    running: int = 0


@dataclass
class Ticket:
    """Leave for one request, given back once. `charge` is for tokens beyond those that were known at the start."""

    _account: _Account
    _count: int
    _clock: Callable[[], float]
    _open: bool = field(default=True)

    def charge(self, tokens: int) -> None:
        if self._account.tokens is not None:
            self._account.tokens.fill(self._clock())
            self._account.tokens.level -= tokens

    def close(self) -> None:
        if self._open:
            self._open = False
            self._account.running -= self._count


class Quotas:
    """Of one ingress, which keeps `1 / shares` of each limit. One thread alone uses it."""

    def __init__(self, shares: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self._shares, self._clock = shares, clock
        self._accounts: dict[str, _Account] = {}

    def admit_request(self, tenant: str, limits: Limits) -> None:
        """Count one request, good or bad. Raises ApiError 429."""
        account, now = self._account(tenant, limits), self._clock()
        bucket = account.requests
        if bucket is None:
            return
        bucket.fill(now)
        if bucket.level < 1:
            self._refuse(f"{limits.requests_per_minute} requests a minute{self._shared}", bucket.seconds_until(1))
        bucket.level -= 1

    def admit(self, tenant: str, limits: Limits, *, tokens: int, answers: int) -> Ticket:
        """Leave for `answers` over prompts of `tokens`. Raises ApiError 429."""
        account, now = self._account(tenant, limits), self._clock()
        most = None if limits.concurrency is None else max(1, limits.concurrency // self._shares)
        if most is not None and answers > most:
            what = f"this tenant's concurrency of {limits.concurrency}"
            if self._shares > 1:
                what = f"the {most} at one of {self._shares} ingresses, which share {what}"
            raise ApiError(400, f"{answers} answers at once are more than {what}.", code="concurrency")
        if most is not None and account.running + answers > most:
            self._refuse(f"{limits.concurrency} answers at once{self._shared}", 1.0)
        if account.tokens is not None:
            account.tokens.fill(now)
            if account.tokens.level <= 0:
                what = f"{limits.tokens_per_minute:,} tokens a minute{self._shared}"
                self._refuse(what, account.tokens.seconds_until(1))
            account.tokens.level -= tokens
        account.running += answers
        return Ticket(account, answers, self._clock)

    @property
    def _shared(self) -> str:
        return f", of which {self._shares} ingresses have an even share each" if self._shares > 1 else ""

    def _refuse(self, what: str, seconds: float) -> None:
        raise ApiError(
            429, f"This tenant's limit is {what}; try again later.", code="rate_limit_exceeded", retry_after=seconds
        )

    def _account(self, tenant: str, limits: Limits) -> _Account:
        account = self._accounts.setdefault(tenant, _Account())
        if account.limits != limits:  # in place: open tickets belong to it
            account.limits = limits
            account.requests = self._bucket(limits.requests_per_minute)
            account.tokens = self._bucket(limits.tokens_per_minute)
        return account

    def _bucket(self, per_minute: int | None) -> _Bucket | None:
        if per_minute is None:
            return None
        share = max(1.0, per_minute / self._shares)
        return _Bucket(share, share, self._clock())
