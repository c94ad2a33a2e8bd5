"""Preparing data with Ray Data: nothing is lost, what is put aside is named, what is there is used again."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from ftray import config
from ftray.cli.data import sample_rows
from ftray.config import Run
from ftray.data import sources
from ftray.data.prepare import make_plan, prepare
from ftray.data.prepared import PreparedData
from ftray.data.tokenizer import load_tokenizer
from ftray.errors import DataError
from ftray.manifest import MANIFEST, verify

pytestmark = pytest.mark.usefixtures("local_ray")

PAIR = {"name": "prompt_completion", "prompt": "{prompt}\n", "completion": "{completion}"}


def make_run(tmp_path, sources_, objective="sft", **data) -> Run:
    sources_ = sources_ if isinstance(sources_, list) else [sources_]
    return Run.model_validate(
        {
            "name": "test",
            "output": str(tmp_path / "run"),
            "model": {"path": "embedded"},
            "method": {"name": "lora"},
            "train": {"steps": 1},
            "objective": objective,
            "data": {"max_length": 64, "sources": sources_} | data,
        }
    )


def write_jsonl(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(count, start=0):
    return [{"prompt": f"ask {i}", "completion": f"answer {i * 7}"} for i in range(start, start + count)]


def prepared(run, events=None) -> PreparedData:
    return PreparedData.open(prepare(run, (events if events is not None else []).append))


def texts(rows, tokenizer=None):
    tokenizer = tokenizer or load_tokenizer(config.Model(path="embedded"))
    return [tokenizer.decode(rows[i].tokens, skip_special_tokens=True) for i in range(len(rows))]


BAD = {
    "not JSON": b'{"prompt": "x", "completion"',
    "missing column 'completion'": b'{"prompt": "x"}',
    "column 'completion' is a list, not text": b'{"prompt": "x", "completion": ["y"]}',
    "empty completion": b'{"prompt": "x", "completion": ""}',
    "lone surrogate": b'{"prompt": "x", "completion": "\\ud83d"}',
    "column 'completion' is null": b'{"prompt": "x", "completion": null}',
    "longer than 4 MiB of text": b'{"prompt": "x", "completion": "' + b"y" * 10_000_000 + b'"}',
    "not a mapping of columns": b"[[[[[[[[[[[[]]]]]]]]]]]]",
    "binary data": bytes(range(1, 10)) + b"\x00\xff\xfe",
    "not UTF-8": b'{"prompt": "x", "completion": "\xe9"}',
    "too long": b'{"prompt": "x", "completion": "' + b"word " * 500 + b'"}',
}


@pytest.mark.faults
@pytest.mark.parametrize("fragment_bytes", [1 << 23, 1 << 19])
def test_ten_kinds_of_bad_row_are_put_aside_one_by_one(tmp_path, monkeypatch, fragment_bytes):
    monkeypatch.setattr(sources, "FRAGMENT_BYTES", fragment_bytes)
    good = [json.dumps(row).encode() for row in pairs(len(BAD) + 1)]
    lines = [good[0]]
    for bad, row in zip(BAD.values(), good[1:], strict=True):
        lines += [bad, b"", row]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    run = make_run(tmp_path, {"path": str(tmp_path / "rows.jsonl"), "format": PAIR}, max_rejected=len(BAD))
    data = prepared(run)
    assert texts(data.train) == [f"ask {i}\nanswer {i * 7}" for i in range(len(BAD) + 1)]
    assert data.facts["rejected_by_reason"] == dict.fromkeys(BAD, 1)
    assert (
        data.facts["rows"] | {"read": 2 * len(BAD) + 1, "rejected": len(BAD), "blank": len(BAD)} == data.facts["rows"]
    )
    entries = [json.loads(line) for line in (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()]
    assert [entry["reason"] for entry in entries] == list(BAD)
    assert [entry["row"] for entry in entries] == [2 + 3 * i for i in range(len(BAD))]
    assert {entry["file"] for entry in entries} == {str(tmp_path / "rows.jsonl")}
    assert all(len(entry["sample"]) <= 160 for entry in entries)
    assert entries[1]["detail"] == "the row has prompt"
    assert [data.train.provenance(i) for i in (0, 1)] == [f"{tmp_path}/rows.jsonl:1", f"{tmp_path}/rows.jsonl:4"]


def test_wrong_order_of_roles_among_good_conversations(tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    user, assistant = {"role": "user", "content": "Brie?"}, {"role": "assistant", "content": "Brie."}
    rows = [[user, assistant], [assistant, user], [user, assistant, user, assistant], [user]]
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": m} for m in rows])
    run = make_run(tmp_path, {"path": path, "format": "messages"}, chat_template=str(template), max_rejected=2)
    data = prepared(run)
    assert data.facts["rejected_by_reason"] == {"wrong order of roles": 2}
    [first, _] = [parts for _, parts in sample_rows(run, data, 2)]
    assert [is_target for _, is_target in first] == [False, True]
    assert first[1][0].strip().startswith("Brie.")


@pytest.mark.faults
def test_too_many_bad_rows_stop_the_run_before_it_starts(tmp_path):
    rows = [*pairs(97), {"prompt": "x"}, {"prompt": "y"}, {"question": "z"}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    run = make_run(tmp_path, {"path": path, "format": PAIR}, max_rejected=0.02)
    with pytest.raises(DataError) as caught:
        prepare(run, lambda event: None)
    text = str(caught.value)
    assert "3 of 100 rows were put aside (3.0%), and data.max_rejected allows 0.02 × 100 = 2" in text
    assert "rows.jsonl:98: missing column 'completion' (the row has prompt)" in text
    assert "rejected.jsonl" in caught.value.hint
    assert len((tmp_path / "run" / "rejected.jsonl").read_text().splitlines()) == 3
    assert not list((tmp_path / "run").rglob(MANIFEST))
    data = prepared(run.model_copy(update={"data": run.data.model_copy(update={"max_rejected": 3})}))
    assert len(data.train) == 97
    with pytest.raises(DataError, match="3 of 100"):  # also of data that were prepared before
        prepare(run, lambda event: None)


def test_what_is_prepared_is_used_again_until_something_changes(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", pairs(50))
    run = make_run(tmp_path, {"path": path, "format": PAIR}, cache=str(tmp_path / "cache"))
    events = []
    where = prepare(run, events.append)
    assert json.loads((tmp_path / "run" / "data.json").read_text())["uri"] == where
    assert [e for e in events if e["kind"] == "progress"][-1]["done"] == 50
    verify(where)
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in Path(where).iterdir()}
    again = []
    assert prepare(run, again.append) == where
    assert not [e for e in again if e["kind"] == "progress"]
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in Path(where).iterdir()} == before

    def changed(**data):
        return make_plan(run.model_copy(update={"data": run.data.model_copy(update=data)})).digest

    digests = {make_plan(run).digest, changed(max_length=63), changed(too_long="truncate"), changed(packing="corpus")}
    digests.add(changed(held_out_fraction=0.1))
    other = run.data.sources[0].model_copy(update={"format": config.TextFormat(name="text", column="prompt")})
    digests.add(changed(sources=[other]))
    assert len(digests) == 6
    assert changed(max_rejected=7) == changed(packing="off") == make_plan(run).digest
    write_jsonl(tmp_path / "rows.jsonl", pairs(49))
    assert make_plan(run).digest not in digests


def test_an_unfinished_folder_is_completed(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "FRAGMENT_BYTES", 500)
    path = write_jsonl(tmp_path / "rows.jsonl", pairs(100))
    run = make_run(tmp_path, {"path": path, "format": PAIR})
    interrupted = RuntimeError("stopped in the middle")

    def stop_after_three(event):
        if event["kind"] == "progress" and event["done"] >= 30:
            raise interrupted

    with pytest.raises(RuntimeError, match="stopped in the middle"):
        prepare(run, stop_after_three)
    [folder] = (tmp_path / "run" / "data").iterdir()
    assert not (folder / MANIFEST).exists()
    done = sorted((folder / "work").glob("*.json"))
    assert done
    kept = {
        p: p.stat().st_mtime_ns for p in folder.glob("train-*.arrow") if folder / "work" / f"{p.stem[6:]}.json" in done
    }
    (folder / "train-000099.arrow.abc.part").write_bytes(b"left by a crash")
    data = prepared(run)
    assert texts(data.train) == [f"ask {i}\nanswer {i * 7}" for i in range(100)]
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items())
    names = {p.name for p in folder.iterdir()}
    assert names == {MANIFEST, *verify(folder)["files"]}


def test_rows_keep_their_order_whatever_the_fragments(tmp_path, monkeypatch):
    for name, start in (("b", 40), ("a", 0), ("c", 80)):
        write_jsonl(tmp_path / f"{name}.jsonl", pairs(40, start))
    source = {"path": str(tmp_path / "*.jsonl"), "format": PAIR}
    whole = prepared(make_run(tmp_path / "one", source))
    monkeypatch.setattr(sources, "FRAGMENT_BYTES", 300)
    cut = prepared(make_run(tmp_path / "two", source))
    assert texts(cut.train) == texts(whole.train) == [f"ask {i}\nanswer {i * 7}" for i in range(120)]
    assert [cut.train.provenance(i) for i in range(120)] == [whole.train.provenance(i) for i in range(120)]
    assert cut.train.provenance(41).endswith("b.jsonl:2")


def test_sources_of_every_kind_make_one_mixture(tmp_path):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_jsonl(tmp_path / "a.jsonl", pairs(5))
    (tmp_path / "b.json").write_text(json.dumps(pairs(4, 100)))
    (tmp_path / "c.csv").write_text(
        "prompt,completion\n" + "".join(f"ask {i},answer {i * 7}\n" for i in range(200, 203))
    )
    pq.write_table(pa.Table.from_pylist(pairs(2, 300)), tmp_path / "d.parquet")
    (tmp_path / "e.txt").write_text("one line\n\nanother\n")
    datasets.Dataset.from_list(pairs(6, 400)).save_to_disk(tmp_path / "f")
    listed = [{"path": str(tmp_path / n), "format": PAIR} for n in ("a.jsonl", "b.json", "c.csv", "d.parquet", "f")]
    listed[1]["weight"] = 2.5
    run = make_run(tmp_path, [*listed, {"path": f"file://{tmp_path}/e.txt", "format": "text"}])
    data = prepared(run)
    assert data.train.sizes == (5, 4, 3, 2, 6, 2)
    assert data.train.weights == (1.0, 2.5, 1.0, 1.0, 1.0, 1.0)
    numbers = [*range(5), *range(100, 104), *range(200, 203), 300, 301, *range(400, 406)]
    assert texts(data.train)[:20] == [f"ask {i}\nanswer {i * 7}" for i in numbers]
    assert texts(data.train)[20:] == ["one line", "another"]
    assert [s["rows"] for s in data.facts["sources"]] == [5, 4, 3, 2, 6, 2]
    assert data.train.provenance(9).endswith("c.csv:2")


def test_held_out_by_content_keeps_equal_rows_on_one_side(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", pairs(300) * 2)
    run = make_run(tmp_path, {"path": path, "format": PAIR}, held_out_fraction=0.2)
    data = prepared(run)
    train, held_out = texts(data.train), texts(data.held_out)
    assert len(train) + len(held_out) == 600
    assert not set(train) & set(held_out)
    assert 0.12 < len(held_out) / 600 < 0.28
    other_seed = prepared(make_run(tmp_path / "other", run.data.sources[0].model_dump(), held_out_fraction=0.2))
    assert texts(other_seed.held_out) == held_out
    seeded = run.model_copy(update={"seed": 1})
    assert set(texts(prepared(seeded).held_out)) != set(held_out)


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_each_side_gets_a_row_where_there_are_two_different_ones(tmp_path, fraction):
    path = write_jsonl(tmp_path / "rows.jsonl", pairs(4))
    data = prepared(make_run(tmp_path, {"path": path, "format": PAIR}, held_out_fraction=fraction))
    assert sorted([len(data.train), len(data.held_out)]) == [1, 3]


def test_held_out_by_file(tmp_path):
    train, held_out = write_jsonl(tmp_path / "a.jsonl", pairs(9)), write_jsonl(tmp_path / "b.jsonl", pairs(3, 50))
    run = make_run(tmp_path, {"path": train, "format": PAIR}, held_out=[{"path": held_out, "format": PAIR}])
    data = prepared(run)
    assert (len(data.train), len(data.held_out)) == (9, 3)
    assert texts(data.held_out)[0] == "ask 50\nanswer 350"
    assert data.held_out.provenance(2).endswith("b.jsonl:3")


def test_too_long_is_refused_or_truncated_and_counted(tmp_path):
    long = "word " * 200
    rows = [*pairs(5), {"prompt": "x", "completion": long}, {"prompt": long, "completion": "beyond"}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    source = {"path": path, "format": PAIR}
    data = prepared(make_run(tmp_path / "refuse", source, max_rejected=9))
    assert len(data.train) == 5
    assert data.facts["rejected_by_reason"] == {"too long": 2}
    data = prepared(make_run(tmp_path / "cut", source, max_rejected=9, too_long="truncate"))
    assert data.train.lengths.max() == 64
    assert len(data.train) == 6
    assert data.facts["rows"]["truncated"] == 1
    assert data.facts["rejected_by_reason"] == {"every target is beyond max_length": 1}
    with pytest.raises(DataError) as caught:
        prepare(make_run(tmp_path / "none", source), lambda event: None)
    assert "raise data.max_length (now 64)" in caught.value.hint


def test_preferences_are_rows_of_two_sequences(tmp_path):
    """Each side is what the same text would be as a prompt with a completion; both count against max_length alone."""
    long = "word " * 200
    good = [{"prompt": f"ask {i} " * 7, "chosen": f"yes {i}", "rejected": f"no {i} " * 4} for i in range(6)]
    bad = [
        {"prompt": "x", "chosen": "same", "rejected": "same"},
        {"prompt": "x", "chosen": "y"},
        {"prompt": "x", "chosen": " ", "rejected": "z"},
        {"prompt": "x", "chosen": "y", "rejected": "\n"},
        {"prompt": 3, "chosen": "y", "rejected": "z"},
        {"prompt": "x", "chosen": "y", "rejected": long},
        {"prompt": long, "chosen": "y", "rejected": "z"},
    ]
    source = {"path": write_jsonl(tmp_path / "rows.jsonl", [*good, *bad]), "format": "preference"}

    def run(name, **data):
        return make_run(tmp_path / name, source, "dpo", max_rejected=9, **data)

    sides = [
        {"path": write_jsonl(tmp_path / f"{side}.jsonl", [{"p": r["prompt"], "c": r[side]} for r in good])}
        | {"format": {"name": "prompt_completion", "prompt": "{p}", "completion": "{c}"}}
        for side in ("chosen", "rejected")
    ]
    alone = [prepared(make_run(tmp_path / f"side{i}", side)).train for i, side in enumerate(sides)]
    data = prepared(run("pairs"))
    assert len(data.train) == 6
    for i in range(6):
        row, (a, b) = data.train[i], (rows[i] for rows in alone)
        assert row.sequence_lengths.tolist() == [len(a.tokens), len(b.tokens)]
        assert row.tokens.tolist() == [*a.tokens, *b.tokens]
        assert row.targets.tolist() == [*a.targets, *b.targets]
    assert data.train.lengths.max() > 64  # both sides together
    assert data.facts["rejected_by_reason"] == {
        "chosen and rejected are the same": 1,
        "missing column 'rejected'": 1,
        "empty completion": 2,
        "column 'prompt' is a number, not text": 1,
        "too long": 2,
    }
    cut = prepared(run("cut", too_long="truncate"))
    assert len(cut.train) == 7
    assert cut.facts["rows"]["truncated"] == 1
    assert cut.facts["rejected_by_reason"]["every target is beyond max_length"] == 1
    (chosen, parts), (rejected, _) = sample_rows(run("pairs"), data, 1)
    assert "rows.jsonl:1 · chosen · " in chosen
    assert "rows.jsonl:1 · rejected · " in rejected
    assert [target for _, target in parts] == [False, True]
    assert "yes 0" in parts[1][0]


def test_packing_for_good(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", pairs(200))
    (tmp_path / "book.txt").write_text("a very long line " * 300 + "\nshort\n")
    listed = [{"path": path, "format": PAIR}, {"path": str(tmp_path / "book.txt"), "format": "text"}]
    packed = prepared(make_run(tmp_path / "a", listed, packing="corpus"))
    loose = prepared(make_run(tmp_path / "b", listed, too_long="truncate"))
    rows = [packed.train[i] for i in range(len(packed.train))]
    assert {len(row.tokens) for row in rows} == {64}
    assert all(row.sequence_lengths.sum() == 64 for row in rows)
    assert packed.facts["rows"]["cut_in_pieces"] == 1
    assert packed.facts["rows"]["truncated"] == 0
    whole = {tuple(loose.train[i].tokens.tolist()) for i in range(200)}
    found = set()
    for row in rows[: packed.train.sizes[0]]:
        starts = np.concatenate([[0], np.cumsum(row.sequence_lengths)])
        for a, b in pairwise(starts):
            assert not row.targets[a]
            if row.targets[a:b].any():
                found.add(tuple(row.tokens[a:b].tolist()))
    assert found == whole
    assert packed.facts["target_tokens"]["train"] > loose.facts["target_tokens"]["train"]  # nothing was cut off


def test_another_problem_of_a_file_is_one_line_that_names_it(tmp_path):
    (tmp_path / "x.json").write_text('[{"prompt": "a", "completion": "b"}, oops]')
    with pytest.raises(DataError, match="not JSON after character") as caught:
        prepare(make_run(tmp_path, {"path": str(tmp_path / "x.json"), "format": PAIR}), lambda event: None)
    assert caught.value.where == str(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(DataError, match="hold no row"):
        prepare(make_run(tmp_path, {"path": str(tmp_path / "x.json"), "format": PAIR}), lambda event: None)


def test_shipped_data_by_name(tmp_path):
    run = make_run(tmp_path, {"path": "embedded:restaurant/train.csv", "format": {"name": "text", "column": "x"}})
    with pytest.raises(DataError, match="missing column 'x'") as caught:
        prepare(run, lambda event: None)
    assert "name the columns that the rows have" in caught.value.hint
    assert "embedded:restaurant/train.csv:2" in str(caught.value)


@pytest.mark.ftray_data
def test_real_sets(tmp_path, ftray_data):
    listed = [
        {"path": f"{ftray_data}/data/instructions/instructions.json", "format": "instruction"},
        {
            "path": f"{ftray_data}/data/gsm8k/test.jsonl",
            "format": PAIR | {"prompt": "{question}", "completion": "{answer}"},
        },
        {"path": f"{ftray_data}/data/text/tinystories_1000.json", "format": "text"},
        {
            "path": f"{ftray_data}/data/e2e/devset.csv",
            "format": PAIR | {"prompt": "{mr}\n", "completion": "{ref}"},
            "limit": 1000,
        },
    ]
    run = make_run(tmp_path, listed, max_length=4096, max_rejected=0)
    data = prepared(run)
    assert data.train.sizes == (1100, 1319, 1000, 1000)
    assert int(data.train.lengths.sum()) == data.facts["tokens"]["train"]
    assert int(data.train.target_counts.sum()) == data.facts["target_tokens"]["train"]
    assert sum(data.facts["length_histogram"]["counts"]) == 4419
