"""Order and cursor: every row exactly as often as its weight says, whatever the sizes, batches and workers."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftray.data.order import Order, assign, permute, step_range

SIZES = st.lists(st.integers(0, 300), min_size=1, max_size=4).filter(any)


@given(n=st.integers(1, 3000), key=st.integers(0, 2**63))
def test_permutation_is_one(n, key):
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


@given(st.integers(2, 2**40), st.integers(0, 2**63), st.data())
def test_a_position_alone_is_what_it_is_among_others(n, key, data):
    some = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)))
    together = permute(some, n, key)
    assert ((together >= 0) & (together < n)).all()
    assert [int(permute(some[i : i + 1], n, key)[0]) for i in range(len(some))] == together.tolist()
    assert len(set(together.tolist())) == len(set(some.tolist()))


@given(SIZES, st.data(), st.integers(0, 2**31 - 1), st.integers(0, 5))
def test_whole_weights_visit_every_row_that_often(sizes, data, seed, epoch):
    weights = data.draw(st.lists(st.integers(1, 3), min_size=len(sizes), max_size=len(sizes)))
    order = Order(seed, sizes, weights)
    n = order.rows_per_epoch
    seen = Counter(order.rows(epoch * n, (epoch + 1) * n).tolist())
    first = np.cumsum([0, *sizes])
    expected = {i: w for s, w in enumerate(weights) for i in range(first[s], first[s + 1])}
    assert seen == expected


@given(st.integers(1, 200), st.floats(0.01, 3.99), st.integers(0, 99), st.integers(1, 40))
def test_fractional_weights_are_fair_over_epochs(n, weight, seed, epochs):
    order = Order(seed, [n], [weight])
    assert abs(order.rows_per_epoch - weight * n) <= max(0.5, 1 - weight * n)
    seen = np.bincount(order.rows(0, epochs * order.rows_per_epoch), minlength=n)
    assert seen.max() - seen.min() <= 1


def test_a_half_is_another_half_in_the_next_epoch():
    order = Order(3, [100], [0.5])
    first, second = (set(order.rows(e * 50, (e + 1) * 50).tolist()) for e in (0, 1))
    assert len(first) == len(second) == 50
    assert first | second == set(range(100))


@given(SIZES, st.integers(0, 99), st.lists(st.integers(0, 400), min_size=1, max_size=8))
def test_any_way_to_cut_the_positions_gives_the_same_rows(sizes, seed, cuts):
    order = Order(seed, sizes, [1] * len(sizes))
    cuts = sorted({0, *cuts})
    whole = order.rows(0, cuts[-1])
    pieces = [order.rows(a, b) for a, b in pairwise(cuts)]
    assert np.array_equal(np.concatenate([np.empty(0, int), *pieces]), whole)


def test_seeds_and_epochs_differ_and_repeat():
    n = 500
    order = Order(1, [n], [1])
    assert np.array_equal(order.rows(0, n), Order(1, [n], [1]).rows(0, n))
    assert not np.array_equal(order.rows(0, n), order.rows(n, 2 * n))
    assert not np.array_equal(order.rows(0, n), Order(2, [n], [1]).rows(0, n))


@pytest.mark.parametrize("n", [8, 37])
def test_positions_are_uniform(n):
    """Chi-square of (position, row) over many epochs: a shuffle without a favourite."""
    epochs = 3000
    order = Order(5, [n], [1])
    counts = np.zeros((n, n))
    for epoch in range(epochs):
        counts[np.arange(n), order.rows(epoch * n, (epoch + 1) * n)] += 1
    expected = epochs / n
    chi2, freedom = ((counts - expected) ** 2 / expected).sum(), (n - 1) ** 2
    assert abs(chi2 - freedom) < 5 * np.sqrt(2 * freedom)


def test_a_billion_rows_need_no_list_of_them():
    order = Order(0, [10**9, 10**9], [1, 2])
    ids = order.rows(2_999_999_990, 3_000_000_010)
    assert len(ids) == 20
    assert (ids < 2 * 10**9).all()


@given(st.integers(1, 50), st.integers(1, 200), st.integers(0, 4))
def test_steps_tile_the_epochs(batch_rows, per_epoch, epochs):
    cursor, ends = 0, []
    while cursor < epochs * per_epoch:
        start, stop = step_range(cursor, batch_rows, per_epoch)
        assert start == cursor < stop <= start + batch_rows
        assert start // per_epoch == (stop - 1) // per_epoch
        cursor = stop
        ends.append(stop)
    assert all(e * per_epoch in ends for e in range(1, epochs + 1))


@given(
    lengths=st.lists(st.integers(1, 5000), max_size=60),
    workers=st.integers(1, 9),
    micro=st.integers(1, 9),
    padded=st.booleans(),
)
def test_assign_loses_and_repeats_nothing(lengths, workers, micro, padded):
    ids = np.arange(len(lengths)) * 7 + 3
    dealt = assign(ids, np.array(lengths, int), workers, micro, padded=padded)
    assert len(dealt) == workers
    assert len({len(batches) for batches in dealt}) == 1
    assert all(len(batch) <= micro for batches in dealt for batch in batches)
    assert sorted(i for batches in dealt for batch in batches for i in batch.tolist()) == ids.tolist()
    share = -(-len(ids) // workers)
    assert all(sum(map(len, batches)) <= share for batches in dealt)
    assert len(dealt[0]) == max(1, -(-share // micro))


def test_assign_balances_tokens_and_repeats_itself():
    rng = np.random.default_rng(0)
    lengths = rng.integers(10, 1000, 64)
    dealt = assign(np.arange(64), lengths, 4, 4)
    tokens = [sum(int(lengths[b].sum()) for b in batches) for batches in dealt]
    assert max(tokens) < 1.05 * min(tokens)
    again = assign(np.arange(64), lengths, 4, 4)
    assert all(np.array_equal(a, b) for x, y in zip(dealt, again, strict=True) for a, b in zip(x, y, strict=True))


def test_padded_micro_batches_hold_rows_of_like_length():
    lengths = np.array([100, 10] * 8)
    waste = {}
    for padded in (False, True):
        [batches] = assign(np.arange(16), lengths, 1, 8, padded=padded)
        waste[padded] = sum(int(lengths[b].max() * len(b) - lengths[b].sum()) for b in batches)
    assert waste == {False: 720, True: 0}


@settings(max_examples=25)
@given(
    SIZES,
    st.integers(1, 20),
    st.lists(st.integers(1, 5), min_size=1, max_size=6),
    st.integers(1, 4),
    st.integers(0, 99),
)
def test_an_epoch_over_changing_workers_trains_every_row_once(sizes, batch_rows, workers, micro, seed):
    """The run may stop after any step and go on with another number of workers: the cursor is all it needs."""
    order = Order(seed, sizes, [1] * len(sizes))
    lengths = np.arange(sum(sizes)) % 50 + 1
    cursor, step, trained = 0, 0, []
    while cursor < order.rows_per_epoch:
        start, cursor = step_range(cursor, batch_rows, order.rows_per_epoch)
        ids = order.rows(start, cursor)
        for batches in assign(ids, lengths[ids], workers[step % len(workers)], micro):
            trained += [i for batch in batches for i in batch.tolist()]
        step += 1
    assert sorted(trained) == list(range(sum(sizes)))
