"""How many lanes fit beside a base: the memory plan turned around."""

from __future__ import annotations

import pytest

from ftray.config import parse_run
from ftray.model.plan import make_plan
from ftray.model.room import USED, need_of, room
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
    lanes = found.more([], need_of(run, shapes))
    lane, token, fixed = parts(run, shapes)
    assert fixed + found.tokens * token + lanes * lane <= USED * memory + 1
    assert fixed + found.tokens * token + (lanes + 1) * lane > USED * memory - 1
    assert 4 * 128 <= found.tokens <= max(most, 4 * 128)


def lanes_in(gib: float, run, shapes) -> int:
    return room(run, shapes, int(gib * GIB), 2048).more([], need_of(run, shapes))


def test_more_memory_is_more_room(run, shapes):
    sizes = [lanes_in(gib, run, shapes) for gib in (1, 2, 4, 8)]
    assert sizes == sorted(sizes)
    assert sizes[-1] > sizes[0]


def test_a_larger_rank_leaves_room_for_fewer(run, shapes):
    wide = parse_run(RUN, "room", ["method.rank=64"])
    assert lanes_in(2, wide, shapes) < lanes_in(2, run, shapes) / 4


def test_one_lane_is_always_tried(run, shapes):
    """Where even that is too much, the device says so itself."""
    found, lane = room(run, shapes, GIB // 8, 2048), need_of(run, shapes)
    assert found.tokens == 4 * 128
    assert (found.more([], lane), found.more([lane], lane)) == (1, 0)
    assert found.fits([], lane)
    assert not found.fits([lane], lane)


def test_each_lane_counts_as_what_it_is(run, shapes):
    """A larger one that comes later takes what it takes, and a longer micro-batch makes a larger pass."""
    small, wide, long = (
        need_of(parse_run(RUN, "room", keys), shapes)
        for keys in ([], ["method.rank=512"], ["train.micro_batch_rows=64", "train.batch_rows=64"])
    )
    found = room(run, shapes, 2 * GIB, 2048)
    most = found.more([], small)
    there = [small] * (most - 1)
    assert found.fits(there, small)
    assert not found.fits([*there, small], small)
    assert not found.fits(there, wide)
    assert found.fits([], wide)
    assert found.more([wide], small) <= most - wide.own // small.own + 1
    assert long.tokens > found.tokens
    assert found.more([long], small) < found.more([small], small)


def test_the_arithmetic_of_a_refusal(run, shapes):
    found, lane = room(run, shapes, GIB, 2048), need_of(run, shapes)
    text = found.arithmetic([lane, lane], lane)
    terms, total = text.split(" GiB")[0].split(" = ")
    assert sum(float(term.split()[0]) for term in terms.split(" + ")) == pytest.approx(float(total), abs=0.03)
    assert f"of {USED * GIB / GIB:.2f} GiB" in text
