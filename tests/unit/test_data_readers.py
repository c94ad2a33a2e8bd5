"""Readers: files cut anywhere give the same rows; one bad line costs no good neighbour."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import string

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftray import config
from ftray.data import sources
from ftray.data.readers import read
from ftray.data.rows import MAX_ROW_BYTES, shortened
from ftray.data.sources import files_of, fragments_of
from ftray.errors import DataError

TEXT = config.TextFormat(name="text")
ANY_FILE = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def fragments(path, *, format=TEXT, **keys):
    source = config.Source(path=str(path), format=format, **keys)
    return fragments_of(source, files_of(source), 0, "train")


def rows(path, **keys):
    """[(row number in its file, value or reason)] over all fragments, blank lines left out."""
    found, before, last = [], 0, None
    for fragment in fragments(path, **keys):
        before = before if fragment.uri == last else 0
        last, lines = fragment.uri, 0
        for raw in read(fragment):
            lines = max(lines, raw.number + raw.lines - 1)
            if not raw.is_blank:
                found.append((before + raw.number, raw.problem.reason if raw.problem else raw.value))
        before += lines
    return found


def values(path, **keys):
    return [value for _, value in rows(path, **keys)]


@ANY_FILE
@given(
    lines=st.lists(st.sampled_from(['{"text": "a"}', "", "no", '{"text": "' + "long " * 30 + '"}', "  "]), max_size=40),
    ends=st.sampled_from(["\n", "\r\n"]),
    last=st.booleans(),
    size=st.integers(1, 300),
)
def test_json_lines_cut_anywhere(tmp_path, monkeypatch, lines, ends, last, size):
    path = tmp_path / "x.jsonl"
    path.write_bytes((ends.join(lines) + (ends if last else "")).encode())
    read_as = {"no": "not JSON"}
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    expected = [(number, read_as.get(line) or json.loads(line)) for number, line in numbered]
    monkeypatch.setattr(sources, "FRAGMENT_BYTES", size)
    assert rows(path) == expected


@ANY_FILE
@given(
    table=st.lists(st.lists(st.text(st.sampled_from('ab,"\n é'), max_size=8), min_size=2, max_size=2), max_size=20),
    size=st.integers(1, 120),
)
def test_csv_cut_anywhere(tmp_path, monkeypatch, table, size):
    text = io.StringIO(newline="")
    csv.writer(text).writerows([["x", "y"], *table])
    path = tmp_path / "x.csv"
    path.write_bytes(text.getvalue().encode())
    monkeypatch.setattr(sources, "FRAGMENT_BYTES", size)
    assert values(path) == [dict(zip("xy", row, strict=True)) for row in table]


def test_csv_row_numbers_are_lines_even_over_fragments(tmp_path, monkeypatch):
    path = tmp_path / "x.csv"
    path.write_text('x,y\n1,"two\nlines"\n\n2,b\n3,c\n4,"again\n\ntwo"\n5,e\n')
    expected = [(2, "1"), (5, "2"), (6, "3"), (7, "4"), (10, "5")]
    for size in (1000, 12, 1):
        monkeypatch.setattr(sources, "FRAGMENT_BYTES", size)
        assert [(number, value["x"]) for number, value in rows(path)] == expected


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b'9,"never closed', "a quote is never closed"),
        (b'9,"closed" and more', "not CSV"),
        (b"9", "wrong number of fields"),
        (b"9,9,9", "wrong number of fields"),
        (b"9,\xff\xfe", "not UTF-8"),
        (b"9,\x00\x01", "binary data"),
        (b"9," + b"z" * (MAX_ROW_BYTES + 5), "longer than 4 MiB of text"),
    ],
)
@pytest.mark.parametrize("size", [30, 10**9])
def test_a_bad_csv_line_costs_itself_alone(tmp_path, monkeypatch, bad, reason, size):
    """Also when the lines after it hold quotes, which an open one would pair up with."""
    path = tmp_path / "x.csv"
    path.write_bytes(b'x,y\n1,a\n2,"b, b"\n' + bad + b'\n3,"c, c"\n4,"d\nd"\n5,e\n')
    monkeypatch.setattr(sources, "FRAGMENT_BYTES", size)
    assert values(path) == [
        {"x": "1", "y": "a"}, {"x": "2", "y": "b, b"}, reason,
        {"x": "3", "y": "c, c"}, {"x": "4", "y": "d\nd"}, {"x": "5", "y": "e"},
    ]  # fmt: skip


def test_an_inch_sign_is_no_quote(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('x,y\n1,5" pipe\n2,b\n')
    assert values(path) == [{"x": "1", "y": '5" pipe'}, {"x": "2", "y": "b"}]


def test_tabs_and_byte_order_mark(tmp_path):
    (tmp_path / "x.tsv").write_bytes(b"\xef\xbb\xbfx\ty\n1\ta, b\n")
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"text": 1}\n')
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbffirst\r\n\r\nthird\n")
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf [{"text": 1}]\n')
    assert values(tmp_path / "x.tsv") == [{"x": "1", "y": "a, b"}]
    assert values(tmp_path / "x.jsonl") == [{"text": 1}]
    assert rows(tmp_path / "x.txt") == [(1, {"text": "first"}), (3, {"text": "third"})]
    assert values(tmp_path / "x.json") == [{"text": 1}]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"{", "not JSON"),
        (b'{"text": "a"} {"text": "b"}', "not JSON"),
        (b"[1, 2]", "not a mapping of columns"),
        (b"null", "not a mapping of columns"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b"\x00\x01\x02", "binary data"),
        (b'{"text": "\xff\x00"}', "binary data"),
        (b'{"a":' * 100_000, "not JSON"),
        (b'{"text": "' + b"z" * MAX_ROW_BYTES + b'"}', "longer than 4 MiB of text"),
    ],
)
@pytest.mark.parametrize("size", [20, 10**9])
def test_a_bad_json_line_costs_itself_alone(tmp_path, monkeypatch, bad, reason, size):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + bad + b'\n{"text": "b"}\n')
    monkeypatch.setattr(sources, "FRAGMENT_BYTES", max(size, len(bad) // 50))
    assert rows(path) == [(1, {"text": "a"}), (2, reason), (3, {"text": "b"})]


def test_a_lone_surrogate_is_json_and_judged_later(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "\\ud800"}\n')
    assert values(tmp_path / "x.jsonl") == [{"text": "\ud800"}]


def test_one_json_list(tmp_path):
    path = tmp_path / "x.json"
    wanted = [{"text": "é" * 100, "n": i, "deep": [[{}]]} for i in range(20_000)]  # several buffers long
    path.write_text(json.dumps(wanted, ensure_ascii=False, indent=1))
    assert values(path) == wanted
    path.write_text('["one", {"text": "two"}, 3, null, ["x"]]')
    wrong = "not a mapping of columns"
    assert rows(path) == [(1, {"text": "one"}), (2, {"text": "two"}), (3, wrong), (4, wrong), (5, wrong)]
    path.write_text("[]")
    assert values(path) == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[{"a": 1}, {"a": ]', "not JSON after character"),
        ('[{"a": 1} {"a": 2}]', "expected a comma"),
        ('[{"a": 1}', "ends within the list"),
        ("3", "not one JSON list"),
        ("[" + "[" * 50_000, "nested too deeply"),
    ],
)
def test_a_broken_json_list_is_an_error_of_the_file(tmp_path, text, says):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(DataError, match=says) as caught:
        rows(path)
    assert caught.value.where == str(path)


def test_json_lines_under_a_json_name(tmp_path):
    (tmp_path / "x.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert values(tmp_path / "x.json") == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize(
    ("ending", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_compressed_files(tmp_path, ending, compress):
    lines = "".join(f'{{"text": "{i}"}}\n' for i in range(5000))
    path = tmp_path / f"x.jsonl{ending}"
    path.write_bytes(compress(lines.encode()))
    assert [v["text"] for v in values(path)] == [str(i) for i in range(5000)]
    table = tmp_path / f"x.csv{ending}"
    table.write_bytes(compress(b"text,b\n1,2\n"))
    assert values(table) == [{"text": "1", "b": "2"}]


def test_a_cut_off_archive_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 10_000)[:-20])
    with pytest.raises(DataError, match="cannot be read to its end") as caught:
        rows(path)
    assert str(path) in str(caught.value)


def test_parquet_by_row_groups(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "x.parquet"
    texts = [f"row {i}" for i in range(1000)]
    pq.write_table(pa.table({"text": texts, "other": list(range(1000))}), path, row_group_size=100)
    monkeypatch.setattr(sources, "FRAGMENT_BYTES", 3000)
    assert len(fragments(path)) > 3
    assert rows(path) == [(i + 1, {"text": text}) for i, text in enumerate(texts)]
    path.write_bytes(b"PAR1 this is none")
    with pytest.raises(DataError, match="this Parquet file cannot be read"):
        fragments(path)


def test_parquet_text_that_is_not_utf8(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    values_ = pa.array([b"good", b"\xff\xfe", b"also"]).view(pa.string())
    pq.write_table(pa.table({"text": values_}), tmp_path / "x.parquet")
    assert rows(tmp_path / "x.parquet") == [(1, {"text": "good"}), (2, "not UTF-8"), (3, {"text": "also"})]


def test_datasets_on_disk(tmp_path, monkeypatch):
    import datasets

    whole = datasets.Dataset.from_dict({"text": [str(i) for i in range(100)]})
    datasets.DatasetDict({"train": whole, "test": whole.select(range(3))}).save_to_disk(tmp_path / "d")
    whole.save_to_disk(tmp_path / "one")
    monkeypatch.setattr(sources, "_DATASET_ROWS", 30)
    assert len(fragments(tmp_path / "d")) == 4
    assert rows(tmp_path / "d") == [(i + 1, {"text": str(i)}) for i in range(100)]
    assert len(rows(tmp_path / "d", split="test")) == 3
    assert len(rows(tmp_path / "one", limit=35)) == 35
    with pytest.raises(DataError, match="no split 'dev'") as caught:
        rows(tmp_path / "d", split="dev")
    assert "train, test" in caught.value.hint


def test_limit_takes_the_first_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "FRAGMENT_BYTES", 40)
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("\n".join(f'{{"text": "{name}{i}"}}\n' for i in range(10)))
    expected = [f"a{i}" for i in range(10)] + [f"b{i}" for i in range(10)]
    for limit in (1, 4, 10, 13, 20, 99):
        assert [v["text"] for v in values(tmp_path, limit=limit)] == expected[:limit]


def test_globs_folders_and_uris(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl", ".hidden.jsonl", "deep/_skipped.jsonl", "notes.doc"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
    texts = ["a.jsonl", "b.jsonl", "deep/c.jsonl"]
    assert [v["text"] for v in values(tmp_path)] == texts
    assert [v["text"] for v in values(f"file://{tmp_path}")] == texts
    assert [v["text"] for v in values(tmp_path / "*.jsonl")] == texts[:2]
    assert [v["text"] for v in values(f"{tmp_path}/**/*.jsonl")] == [*texts[:2], "deep/_skipped.jsonl", "deep/c.jsonl"]
    odd = tmp_path / "odd [1].jsonl"
    odd.write_text('{"text": "odd"}')
    assert values(odd) == [{"text": "odd"}]


def test_any_file_system(tmp_path):
    import fsspec

    with fsspec.open("memory://bucket/x.jsonl", "w") as file:
        file.write('{"text": "a"}\n{"text": "b"}\n')
    assert values("memory://bucket/*.jsonl") == [{"text": "a"}, {"text": "b"}]


def test_nothing_found_says_what_is_there(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match="no file is found here") as caught:
        fragments(tmp_path / "missing" / "trian.jsonl")
    assert caught.value.hint == f"{tmp_path} is there, with train.jsonl"
    with pytest.raises(DataError, match="no file is found here"):
        fragments(tmp_path / "*.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no file that can be read"):
        fragments(tmp_path / "empty")
    (tmp_path / "x.doc").write_text("")
    with pytest.raises(DataError, match="ending says nothing") as caught:
        fragments(tmp_path / "x.doc")
    assert "set `reader`" in caught.value.hint


def test_a_csv_without_a_usable_header(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("a,b,a\n1,2,3\n")
    with pytest.raises(DataError, match="names column 'a' twice"):
        fragments(path)
    path.write_text("")
    with pytest.raises(DataError, match="no header"):
        fragments(path)


def test_a_hub_name_that_is_not_reachable(monkeypatch):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="neither a folder written by save_to_disk nor a data set") as caught:
        fragments("nobody/nothing-here-at-all", reader="datasets")
    assert "subset" in caught.value.hint


@given(st.one_of(st.text(), st.binary(), st.none(), st.dictionaries(st.text(), st.text()), st.lists(st.text())))
def test_samples_are_short_printable_and_utf8(value):
    text = shortened(value)
    assert len(text) <= 160
    assert text.isprintable()
    text.encode()
    assert shortened("\ud800") == "\\ud800"
    assert set(shortened(b"\xff\x00ab")) <= set(string.printable)
