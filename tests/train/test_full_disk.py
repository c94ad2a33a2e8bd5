"""A full disk, for real (a small tmpfs, which only root may mount): the run says so, loses nothing, and goes on."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ftray.data.prepare import make_plan
from ftray.data.prepared import PreparedData
from ftray.data.sources import fragments_of
from ftray.data.work import Job, run_fragment
from ftray.errors import RunError
from ftray.manifest import verify
from ftray.train import commits
from ftray.train.doctor import examine
from ftray.train.loop import train_worker
from ftray.train.world import World
from tests.toys import MemoryData, Recorder, random_rows, toy_run, wait_until
from tests.unit.test_data_remote import prepare_here

pytestmark = [pytest.mark.root, pytest.mark.faults]
SIZE = 16 << 20
STEPS = ("train.steps=6", "train.commit_every=2")


@pytest.fixture
def disk(tmp_path):
    """A disk of 16 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(path)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)  # an error's traceback may hold a file open


def fill(disk: Path, left: int) -> Path:
    """All of it but `left` bytes."""
    room = os.statvfs(disk)
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(room.f_bavail * room.f_frsize - left))
    return ballast


class Filling(Recorder):
    """Fills the disk of a run after a step, once a commit counts, which is written meanwhile."""

    def __init__(self, disk: Path, step: int, left: int, commit: str) -> None:
        super().__init__()
        self.disk, self.step, self.left, self.commit = disk, step, left, commit

    def emit(self, event):
        super().emit(event)
        if event["kind"] == "step" and event["step"] == self.step:
            wait_until(lambda: commits.counts(self.commit))
            fill(self.disk, self.left)


@pytest.mark.parametrize("left", [100_000, 0], ids=["a commit", "a line of metrics"])
def test_while_committing(disk, tmp_path, left):
    def trained(folder: Path, channel: Recorder):
        return train_worker(toy_run(folder, *STEPS), MemoryData(random_rows(64)), World(), channel)  # type: ignore[arg-type]

    trained(tmp_path / "unbroken", Recorder())
    second = commits.place_of(str(disk / "run"), 2)
    with pytest.raises(RunError, match="no space is left") as raised:
        trained(disk / "run", Filling(disk, 3, left, second))
    assert str(disk) in (raised.value.where or "")
    assert "goes on" in (raised.value.hint or "")
    assert verify(second), "the older commit is whole"
    (disk / "ballast").unlink()
    assert not list((disk / "run/commits").glob(".*.part")), "what could not be written leaves its room"
    assert examine(str(disk / "run")).goes_on_from == 2
    summary = trained(disk / "run", Recorder())
    assert summary["resumed_from"] == 2
    mine, theirs = (load_file(f / "artefact/adapter_model.safetensors") for f in (disk / "run", tmp_path / "unbroken"))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    lines = [json.loads(line) for line in (disk / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, 7))


def test_while_preparing_data(disk, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {i} " + "word " * 100}) + "\n" for i in range(3000)))
    run = toy_run(disk / "run", f"data.sources=[{{path: {rows}, format: text}}]", "data.held_out_fraction=0.2")
    plan = make_plan(run)
    [fragment] = fragments_of(run.data.sources[0], plan.files["train"][0], 0, "train")
    job = Job(plan.folder, plan.vocabulary, {"train": [run.data.sources[0].format]}, 64, "truncate", "batch", 0, 0)
    (disk / "run/data").mkdir(parents=True)
    Path(plan.folder, "work").mkdir(parents=True)
    ballast = fill(disk, 200_000)
    error = run_fragment(0, fragment, job)["error"]
    assert isinstance(error, RunError)
    assert "no space is left" in error.what
    assert error.where == plan.folder
    assert not list(Path(plan.folder).glob("*.part"))
    ballast.unlink()
    folder, _ = prepare_here(run, least=1, too_long="truncate")
    verify(folder)
    assert len(PreparedData.open(folder).train) > 2000
