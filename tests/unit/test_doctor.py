"""`ftray doctor` on folders that are damaged for real: what it finds, what it mends, what it leaves alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import psutil
import pytest
import torch

from ftray.cli.main import call
from ftray.errors import EXIT_OK, EXIT_RUN, RunError
from ftray.manifest import digest_of, join, seal, write_text
from ftray.train import commits, lease
from ftray.train.commits import Commit, Progress, State
from ftray.train.doctor import SET_ASIDE, examine, mend

RUN = """
name: toy
model: {path: embedded}
method: {name: lora}
data: {sources: [{path: rows.jsonl, format: text}]}
train: {steps: 4}
"""


@pytest.fixture(params=["disk", "store"])
def folder(request, tmp_path):
    """A whole run of two commits that is not finished yet, on a disk and on an object store."""
    where = str(tmp_path / "run") if request.param == "disk" else f"memory://doctor-{digest_of(str(tmp_path))[:8]}/run"
    write_text(join(where, "run.yaml"), RUN + f"output: {where}\n")
    lines = [json.dumps({"kind": "step", "step": step}) + "\n" for step in (1, 2)]
    for step in (1, 2):
        progress = Progress(step=step, metrics_bytes=sum(map(len, lines[:step])))
        commits.write(where, Commit(progress, State({"a": torch.full((4,), float(step))}, {}), {"data_digest": "d"}))
    write_text(join(where, "metrics.jsonl"), "".join(lines))
    data = join(where, "data/abc")
    write_text(join(data, "rows.arrow"), "rows")
    if request.param == "disk":
        seal(data, {})
    else:
        seal(data, {}, {"rows.arrow": {"size": 4, "sha256": _sha256(b"rows")}})
    write_text(join(where, "data.json"), json.dumps({"uri": data, "digest": "abc"}))
    yield where
    if request.param == "store":
        fsspec.filesystem("memory").rm("/" + where.removeprefix("memory://").split("/")[0], recursive=True)


def _sha256(content: bytes) -> str:
    import hashlib

    return hashlib.sha256(content).hexdigest()


def _change(where: str, change) -> None:
    fs, path = fsspec.core.url_to_fs(where)
    fs.pipe_file(path, change(fs.cat_file(path)))


def _there(where: str) -> bool:
    fs, path = fsspec.core.url_to_fs(where)
    return fs.exists(path)


def test_nothing_is_wrong_with_a_whole_run(folder, capsys):
    found = examine(folder)
    assert found.findings == []
    assert (found.goes_on, found.goes_on_from, found.finished) == (True, 2, False)
    assert call(["doctor", folder]) == EXIT_OK
    assert "goes on, from step 2" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "manifest", "state"])
def test_a_damaged_commit_is_set_aside_and_the_one_before_goes_on(folder, damage):
    commit = commits.place_of(folder, 2)
    fs, path = fsspec.core.url_to_fs(commit)
    if damage == "flip":
        _change(f"{commit}/model.safetensors", lambda old: old[:-1] + bytes([old[-1] ^ 1]))
    elif damage == "cut":
        _change(f"{commit}/model.safetensors", lambda old: old[:-3])
    elif damage == "gone":
        fs.rm_file(f"{path}/model.safetensors")
    elif damage == "manifest":
        _change(f"{commit}/manifest.json", lambda old: old[: len(old) // 2])
    else:
        _change(f"{commit}/state.json", lambda old: b"{}" + old[2:])
    before = examine(folder)
    [finding] = before.findings
    assert "step-00000002" in finding.where
    assert {"manifest": "manifest", "state": "state.json"}.get(damage, "model.safetensors") in finding.what
    assert _there(commit), "examining touches nothing"
    assert before.goes_on_from == 1
    after = mend(before)
    assert after.findings == []
    assert (after.goes_on, after.goes_on_from) == (True, 1)
    assert not _there(commit)
    aside = fsspec.core.url_to_fs(join(folder, SET_ASIDE))
    assert any("step-00000002-" in name for name in aside[0].find(aside[1])), "nothing that counted is deleted"
    found = commits.latest(folder, pytest.fail)
    assert found
    assert found.progress.step == 1


def test_a_commit_that_was_never_completed_is_removed(folder):
    write_text(join(folder, "commits/step-00000003/model.safetensors"), "half")
    [finding] = examine(folder).findings
    assert "never completed" in finding.what
    assert not mend(examine(folder)).findings
    assert commits.steps_of(folder) == [1, 2]


def test_a_torn_line_is_cut_off_and_lost_lines_are_told(folder):
    where = join(folder, "metrics.jsonl")
    _change(where, lambda old: old + b'{"kind": "st')
    [finding] = examine(folder).findings
    assert "12 bytes" in finding.what
    assert not mend(examine(folder)).findings
    _change(where, lambda old: old[:30])
    assert any("lines were lost" in finding.what for finding in mend(examine(folder)).findings)


def test_artefacts_that_are_half_damaged_or_of_another_step(folder):
    def artefact(step: int, content: str = "weights") -> None:
        write_text(join(folder, "artefact/adapter_model.safetensors"), content)
        files = {"adapter_model.safetensors": {"size": 7, "sha256": _sha256(b"weights")}}
        write_text(join(folder, "artefact/ftray.json"), json.dumps({"files": files, "step": step}))

    progress = Progress(step=2, finished="finished", best_step=1)
    commits.write(folder, Commit(progress, State({"a": torch.ones(1)}, {})))
    [finding] = examine(folder).findings
    assert "missing" in finding.what
    artefact(1)
    assert examine(folder).findings == []
    assert examine(folder).finished
    artefact(2)
    [finding] = examine(folder).findings
    assert "is of step 2" in finding.what
    artefact(1, "weighty")
    [finding] = examine(folder).findings
    assert "SHA-256" in finding.what
    write_text(join(folder, "artefact/ftray.json"), "{")
    assert "damaged" in examine(folder).findings[0].what
    fs, path = fsspec.core.url_to_fs(join(folder, "artefact/ftray.json"))
    fs.rm_file(path)
    assert "half" in examine(folder).findings[0].what
    after = mend(examine(folder))
    assert [finding.what for finding in after.findings] == ["the run ended, and its artefact is missing"]
    assert after.goes_on


@pytest.mark.parametrize("damage", ["flip", "gone"])
def test_an_artefact_of_the_last_step_where_the_best_commit_is_lost(folder, damage):
    """As a run chooses. One that was made of the best before it was lost is right as well."""
    commits.write(folder, Commit(Progress(step=2, finished="finished", best_step=1), State({"a": torch.ones(1)}, {})))
    fs, path = fsspec.core.url_to_fs(commits.place_of(folder, 1))
    if damage == "flip":
        _change(f"{commits.place_of(folder, 1)}/model.safetensors", lambda old: old[:-1] + bytes([old[-1] ^ 1]))
    else:
        fs.rm(path, recursive=True)
    missing = [finding for finding in examine(folder).findings if finding.where.endswith("/artefact")]
    assert [finding.remedy for finding in missing] == ["the same command writes it anew, from the commit of step 2"]
    for step in (1, 2):
        write_text(join(folder, "artefact/ftray.json"), json.dumps({"files": {}, "step": step}))
        assert all("damaged commit" in finding.what for finding in examine(folder).findings)
        assert mend(examine(folder)).findings == []


def test_damaged_data_hinder_and_are_prepared_again(folder):
    _change(join(folder, "data/abc/rows.arrow"), lambda _: b"rowz")
    before = examine(folder)
    assert not before.goes_on
    assert call(["doctor", folder]) == EXIT_RUN
    assert mend(before).goes_on
    assert not _there(join(folder, "data/abc"))


def test_parts_of_data_that_nobody_uses_are_removed_and_those_in_use_kept(folder):
    write_text(join(folder, "data", "old", "work", "000000.json"), "{}")
    assert not mend(examine(folder)).findings
    assert not _there(join(folder, "data/old"))
    fs, path = fsspec.core.url_to_fs(join(folder, "data.json"))
    fs.rm_file(path)
    write_text(join(folder, "data", "new", "work", "000000.json"), "{}")
    assert ["broke off" in finding.what for finding in mend(examine(folder)).findings] == [True]
    assert _there(join(folder, "data", "new", "work", "000000.json"))


def test_a_run_file_that_cannot_be_read_is_said(folder, capsys):
    write_text(join(folder, "run.yaml"), "name: [")
    assert call(["doctor", folder, "--json"]) == EXIT_RUN
    told = json.loads(capsys.readouterr().out)
    assert told["goes_on"] is False
    assert "not valid YAML" in told["findings"][0]["what"]


def test_litter_on_a_disk(tmp_path):
    write_text(tmp_path / "run.yaml", RUN + f"output: {tmp_path}\n")
    (tmp_path / "commits/.step-00000003.0123abcd.part").mkdir(parents=True)
    (tmp_path / ".metrics.jsonl.0123abcd.part").write_text("x")
    (tmp_path / "data/abc").mkdir(parents=True)
    (tmp_path / "data/abc/train-000000.arrow.0123abcd.part").write_text("x")
    (tmp_path / "somebodys.part").write_text("mine")
    after = mend(examine(str(tmp_path)))
    assert [finding.what for finding in after.findings] == ["data whose preparation broke off"]
    assert not [path for path in tmp_path.rglob("*.part") if path.name != "somebodys.part"]
    assert (tmp_path / "somebodys.part").exists()


def test_a_run_that_is_being_written_is_not_touched(folder, monkeypatch):
    write_text(join(folder, "commits/step-00000003/model.safetensors"), "on its way")
    with lease.lease(folder):
        found = examine(folder)
        assert found.running
        assert not found.goes_on
        with pytest.raises(RunError, match="being written right now"):
            mend(found)
        monkeypatch.setattr(lease.socket, "gethostname", lambda: "another")
        assert "last heard" in (examine(folder).running or ""), "from another machine the lease's age tells"
        monkeypatch.setattr(lease, "_FRESH_SECONDS", 0.0)
        assert examine(folder).running is None
    assert _there(join(folder, "commits/step-00000003/model.safetensors"))
    assert not _there(join(folder, lease.LEASE))


def test_the_lease_of_a_killed_process_is_stale_at_once(tmp_path):
    code = f"""
import time
from ftray.train.lease import lease
with lease({str(tmp_path)!r}):
    print("ready", flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        [holder] = lease.holders(str(tmp_path))
        assert holder.alive
        assert str(process.pid) in holder.who
        process.kill()
    assert not psutil.pid_exists(process.pid)
    write_text(tmp_path / "run.yaml", RUN + f"output: {tmp_path}\n")
    [finding] = examine(str(tmp_path)).findings
    assert "gone" in finding.what
    assert not mend(examine(str(tmp_path))).findings


def test_a_folder_that_is_none(tmp_path, capsys):
    assert call(["doctor", str(tmp_path / "none")]) == 2
    (tmp_path / "file").write_text("")
    assert call(["doctor", f"file://{tmp_path}/file"]) == 2
    shutil.rmtree(tmp_path)
    assert not Path(tmp_path).exists()
