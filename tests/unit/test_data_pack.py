"""Packing and shards: nothing is lost, rows are exactly as long as asked, and come back as they were written."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftray.data.pack import best_fit, pack
from ftray.data.prepared import INDEX, PreparedData, Rows
from ftray.data.shards import Packed, ShardWriter
from ftray.errors import DataError
from ftray.manifest import seal, write_text


def rows_of(lengths):
    rows, value = [], 1
    for number, n in enumerate(lengths, 1):
        targets = np.ones(n, np.bool_)
        targets[0] = False
        rows.append(Packed(np.arange(value, value + n, dtype=np.int32), targets, (n,), (number,)))
        value += n
    return rows


@given(st.lists(st.integers(1, 64), max_size=200))
def test_best_fit_fills_bins_without_losing_any(lengths):
    bins = best_fit(lengths, 64)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in members) <= 64 for members in bins)
    fewest = -(-sum(lengths) // 64)
    assert len(bins) <= 11 / 9 * max(fewest, sum(n > 32 for n in lengths)) + 4


@given(st.lists(st.integers(1, 32), min_size=1, max_size=60))
def test_packed_rows_are_full_and_hold_every_sequence(lengths):
    packed = pack(rows_of(lengths), 32, pad_id=0)
    found = {}
    for row in packed:
        assert len(row.tokens) == len(row.targets) == sum(row.sequence_lengths) == 32
        at = 0
        for n in row.sequence_lengths:
            piece, targets = row.tokens[at : at + n], row.targets[at : at + n]
            at += n
            if piece[0] == 0:  # padding: the last, without targets
                assert at == 32
                assert not targets.any()
                assert not piece.any()
            else:
                found[int(piece[0])] = n
                assert targets.tolist() == [False] + [True] * (n - 1)
    starts = np.concatenate([[1], 1 + np.cumsum(lengths)[:-1]])
    assert found == dict(zip(starts.tolist(), lengths, strict=True))


def test_short_rows_pack_tightly():
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 60, 2000).tolist()
    assert len(best_fit(lengths, 256)) <= -(-sum(lengths) // 256) + 1


@pytest.fixture
def folder(tmp_path):
    """Two shards of a split, sealed as prepared data."""
    first, second = rows_of([3, 5, 2]), rows_of([4, 1])
    shards = []
    for number, (rows, source, start) in enumerate([(first, 0, 1), (second, 1, 11)]):
        writer = ShardWriter(str(tmp_path / f"train-{number}.arrow"))
        for row in rows:
            writer.add(row)
        facts = writer.close()
        assert facts["rows"] == len(rows)
        assert facts["tokens"] == sum(len(r.tokens) for r in rows)
        shards.append(
            {
                "file": f"train-{number}.arrow",
                "rows": len(rows),
                "source": source,
                "path": "a.jsonl",
                "first_row": start,
            }
        )
    index = {"shards": {"train": shards, "held_out": []}, "sizes": {"train": [3, 2], "held_out": []}}
    import json

    write_text(tmp_path / INDEX, json.dumps(index))
    seal(tmp_path, {"digest": "d", "weights": [1.0, 2.0]})
    return tmp_path


def test_rows_come_back_as_written(folder):
    data = PreparedData.open(str(folder))
    rows = data.train
    assert len(rows) == 5
    assert rows.sizes == (3, 2)
    assert rows.weights == (1.0, 2.0)
    assert data.held_out is None
    assert rows.lengths.tolist() == [3, 5, 2, 4, 1]
    assert rows.target_counts.tolist() == [2, 4, 1, 3, 0]
    for i, expected in enumerate([*rows_of([3, 5, 2]), *rows_of([4, 1])]):
        assert np.array_equal(rows[i].tokens, expected.tokens)
        assert np.array_equal(rows[i].targets, expected.targets)
        assert rows[i].targets.dtype == np.bool_
        assert rows[i].tokens.dtype == np.int32
    assert [rows.provenance(i) for i in (0, 2, 3, 4)] == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:11", "a.jsonl:12"]
    with pytest.raises(IndexError):
        rows[5]
    again = pickle.loads(pickle.dumps(rows))
    assert isinstance(again, Rows)
    assert np.array_equal(again[4].tokens, rows[4].tokens)


def test_a_shortened_shard_is_refused(folder):
    path = folder / "train-0.arrow"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"train-0.arrow has [\d,]+ bytes, its manifest says"):
        PreparedData.open(str(folder))


def test_an_unfinished_folder_is_refused(folder):
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match="never finished"):
        PreparedData.open(str(folder))


def test_provenance_of_a_packed_row_names_the_first_few(tmp_path):
    writer = ShardWriter(str(tmp_path / "t.arrow"))
    for row in pack(rows_of([2, 2, 2, 2, 1]), 9, 0):
        writer.add(row)
    writer.close()
    rows = Rows(str(tmp_path), [{"file": "t.arrow", "rows": 1, "path": "x", "first_row": 1}], [1], [1.0])
    assert rows.provenance(0) == "x:1, x:2, x:3, … (5 rows)"


def test_an_aborted_shard_leaves_nothing(tmp_path):
    writer = ShardWriter(str(tmp_path / "t.arrow"))
    writer.add(rows_of([2])[0])
    writer._flush()
    writer.abort()
    assert list(tmp_path.iterdir()) == []
