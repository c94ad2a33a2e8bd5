"""What is counted, under which name. `serve/grafana.json` draws these, and a test holds the two together.

Each ingress counts what it sees, and asks the engine replicas for what they counted when somebody asks it: so the page
at `/metrics` is whole with one ingress, and with several each series says whose it is. Who asks several hears of the
engines several times: `max without (instance, job, pod)` counts each series once. Adapters are told apart by digest,
never by name.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest

disable_created_metrics()  # a series more for each, for what nobody draws
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
BETWEEN = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
WHO = ("tenant", "adapter")
"""Of most series: the tenant's id and the adapter's digest, cut to 12 digits; `base` without one."""


ENGINE_GAUGES = {
    "ftray_engine_slots": ("slots", "Requests that a replica can answer at once."),
    "ftray_engine_running": ("running", "Requests in a slot."),
    "ftray_engine_waiting": ("waiting", "Requests that wait for a slot or for their adapter."),
    "ftray_adapters_in_use": ("adapter_users", "References to adapters by requests in flight."),
    "ftray_adapters_in_memory": ("adapters", "Adapters in a replica's memory."),
    "ftray_adapter_memory_bytes": ("adapter_bytes", "What these take."),
}
"""Series by (field of a replica's stats, help)."""
ENGINE_COUNTERS = {
    "ftray_engine_steps": ("steps", "Forward passes."),
    "ftray_engine_prompt_tokens": ("prompt_tokens", "Tokens of prompts that were computed."),
    "ftray_engine_written_tokens": ("written_tokens", "Tokens of answers."),
}
ADAPTER_COUNTERS = {
    "ftray_adapter_loads": ("loads", "Adapters read into memory."),
    "ftray_adapter_load_failures": ("failures", "Adapters that could not be read."),
    "ftray_adapter_load_seconds": ("load_seconds", "Time that this took, the check of its files included."),
    "ftray_adapter_evictions": ("evictions", "Adapters that left memory to make room."),
}


MOST_SERIES = 1000
"""Pairs of tenant and adapter that are counted; beyond it the one that was used longest ago is forgotten."""
REASONS = ("stop", "length", "cancelled", "error")


class Metrics:
    """Of one ingress."""

    def __init__(self, ingress: str) -> None:
        self.registry = registry = CollectorRegistry()
        self._ingress = ingress
        self.requests = Counter(
            "ftray_requests", "Requests by route and HTTP status.", ("tenant", "route", "status"), registry=registry
        )
        self.refused = Counter("ftray_refused", "Requests refused with 429.", ("tenant", "code"), registry=registry)
        self.in_flight = Gauge("ftray_requests_in_flight", "Requests that are being answered.", registry=registry)
        counters = {
            "prompt_tokens": ("ftray_prompt_tokens", "Tokens of prompts."),
            "cached_tokens": ("ftray_cached_prompt_tokens", "Of these, those that were computed before."),
            "completion_tokens": ("ftray_completion_tokens", "Tokens of answers."),
        }
        histograms = {
            "first_token": (
                "ftray_time_to_first_token_seconds",
                "From a request's arrival to its first text; streamed answers.",
                SECONDS,
            ),
            "between_tokens": (
                "ftray_time_between_tokens_seconds",
                "From one streamed message to the next, divided by the tokens it carries.",
                BETWEEN,
            ),
            "latency": ("ftray_request_seconds", "From a request's arrival to its end.", SECONDS),
        }
        self._answers = Counter("ftray_answers", "Answers by how they ended.", (*WHO, "reason"), registry=registry)
        self._by_who: dict[str, Counter | Histogram] = {
            **{key: Counter(name, text, WHO, registry=registry) for key, (name, text) in counters.items()},
            **{
                key: Histogram(name, text, WHO, buckets=buckets, registry=registry)
                for key, (name, text, buckets) in histograms.items()
            },
        }
        self._series: OrderedDict[tuple[str, str], Series] = OrderedDict()

    def series(self, tenant: str, digest: str | None) -> Series:
        """What is counted of one tenant's requests for one adapter; `digest` None is the base."""
        who = tenant, short(digest)
        if who not in self._series:
            own: dict[str, Any] = {key: metric.labels(*who) for key, metric in self._by_who.items()}
            answers = {reason: self._answers.labels(*who, reason) for reason in REASONS}
            self._series[who] = Series(answers=answers, **own)
            if len(self._series) > MOST_SERIES:
                self._forget(next(iter(self._series)))
        self._series.move_to_end(who)
        return self._series[who]

    def _forget(self, who: tuple[str, str]) -> None:
        del self._series[who]
        for metric in self._by_who.values():
            metric.remove(*who)
        for reason in REASONS:
            self._answers.remove(*who, reason)

    def page(self, replicas: Iterable[Mapping[str, Any]]) -> bytes:
        """Prometheus's text format. `replicas` are what `EngineReplica.stats` gave."""
        whole = CollectorRegistry()
        whole.register(_Labelled(self.registry, self._ingress))
        whole.register(_Replicas(list(replicas)))
        return generate_latest(whole)


@dataclass(frozen=True)
class Series:
    """Of one tenant and one adapter."""

    answers: dict[str, Counter]
    prompt_tokens: Counter
    cached_tokens: Counter
    completion_tokens: Counter
    first_token: Histogram
    between_tokens: Histogram
    latency: Histogram


class _Labelled:
    """A registry's series, each with the ingress's name."""

    def __init__(self, registry: CollectorRegistry, ingress: str) -> None:
        self._registry, self._ingress = registry, ingress

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            family.samples = [s._replace(labels={**s.labels, "ingress": self._ingress}) for s in family.samples]
            yield family


class _Replicas:
    """Series of engine replicas."""

    def __init__(self, replicas: list[Mapping[str, Any]]) -> None:
        self._replicas = replicas

    def collect(self) -> Iterator[Metric]:
        for name, (field, text) in ENGINE_GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=["replica"])
            for stats in self._replicas:
                gauge.add_metric([stats["replica"]], stats[field])
            yield gauge
        for name, (field, text) in ENGINE_COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=["replica"])
            for stats in self._replicas:
                counter.add_metric([stats["replica"]], stats[field])
            yield counter
        for name, (field, text) in ADAPTER_COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=["replica", "tenant", "adapter"])
            for stats in self._replicas:
                for (tenant, digest), value in stats[field].items():
                    counter.add_metric([stats["replica"], tenant, short(digest)], value)
            yield counter


def short(digest: str | None) -> str:
    return digest[:12] if digest else "base"
