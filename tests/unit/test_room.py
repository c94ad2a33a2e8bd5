"""How many lanes fit beside a base: the memory plan turned around."""

from __future__ import annotations

import pytest

from ftray.config import parse_run
from ftray.model.plan import make_plan
from ftray.model.room import USED, room
from ftray.model.source import find_shapes

GIB = 1 << 30
RUN = """
name: room
model: {path: embedded}
method: {name: qlora, rank: 8}
data: {sources: [{path: unused.jsonl, format: text}], max_length: 128}
train: {steps: 1, batch_rows: 4, micro_batch_rows: 4}
"""


@pytest.fixture(scope="module")
def run():
    return parse_run(RUN, "room")


@pytest.fixture(scope="module")
def shapes(run):
    return find_shapes(run.model)[0]


def parts(run, shapes) -> tuple[int, float, int]:
    """(bytes of one lane, bytes a token, bytes of everything that is there once)"""
    plan = make_plan(run, shapes)
    lane = sum(i.bytes for i in plan.items if i.name in ("adapter weights", "gradients", "optimizer states"))
    passing = sum(i.bytes for i in plan.items if i.name in ("activations", "working set"))
    return lane, passing / plan.tokens, sum(i.bytes for i in plan.items) - lane - passing


@pytest.mark.parametrize("memory", [1.5 * GIB, 2 * GIB, 8 * GIB])
@pytest.mark.parametrize("most", [512, 2048, 65536])
def test_what_is_promised_fits(run, shapes, memory, most):
    found = room(run, shapes, int(memory), most)
    lane, token, fixed = parts(run, shapes)
    assert fixed + found.tokens * token + found.lanes * lane <= USED * memory
    assert fixed + found.tokens * token + (found.lanes + 1) * lane > USED * memory
    assert 4 * 128 <= found.tokens <= max(most, 4 * 128)


def test_more_memory_is_more_room(run, shapes):
    sizes = [room(run, shapes, gib * GIB, 4096).lanes for gib in (1, 2, 4, 8)]
    assert sizes == sorted(sizes)
    assert sizes[-1] > sizes[0]


def test_a_larger_rank_leaves_room_for_fewer(run, shapes):
    wide = parse_run(RUN, "room", ["method.rank=64"])
    assert room(wide, shapes, 2 * GIB, 2048).lanes < room(run, shapes, 2 * GIB, 2048).lanes / 4


def test_one_lane_is_always_tried(run, shapes):
    """Where even that is too much, the device says so itself."""
    found = room(run, shapes, GIB // 8, 2048)
    assert found.lanes == 1
    assert found.tokens == 4 * 128
