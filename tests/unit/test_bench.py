"""What the measurements measure."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

from tests.bench.methods import peak_bytes


@dataclass(frozen=True)
class Event:
    at: int
    bytes: int
    kind: str = "[memory]"

    def name(self) -> str:
        return self.kind

    def nbytes(self) -> int:
        return self.bytes

    def start_ns(self) -> int:
        return self.at


def test_memory_of_the_steps_counts_what_is_there_before_and_nothing_after() -> None:
    events = [
        *(Event(1, 100), Event(2, 500), Event(3, -500)),  # weights; an evaluation
        *(Event(11, 40), Event(12, 30), Event(13, -70)),  # a step
        *(Event(14, 20), Event(15, 10_000, "aten::mm"), Event(16, -20)),
        *(Event(21, 900), Event(22, -900)),  # the artefact
    ]
    profiled = SimpleNamespace(profiler=SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: events[::-1])))
    assert peak_bytes(profiled, begin=10, end=20) == 170
    assert peak_bytes(profiled, begin=0, end=20) == 600
