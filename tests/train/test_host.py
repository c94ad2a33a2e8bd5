"""A worker that holds a base, without Ray: what a trial takes over from another, and whom memory has room for."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ftray.config import Run
from ftray.data.prepared import PreparedData
from ftray.errors import ModelError, RunError, RunStopped
from ftray.manifest import join
from ftray.model.room import USED, need_of, room
from ftray.model.source import find_shapes
from ftray.train import commits
from ftray.tune.host import Host
from tests.toys import MemoryData, random_rows, toy_run

ROWS, HELD_OUT = random_rows(64, longest=24), random_rows(8, seed=1, longest=24)
POPULATION = ["train.steps=30", "train.evaluate_every=10", "train.keep_last=8", "train.schedule=constant"]
POPULATION += ["data.held_out_fraction=0.1"]  # the rows are in memory


@pytest.fixture(autouse=True)
def _rows_in_memory(monkeypatch):
    monkeypatch.setattr("ftray.data.prepare.prepare", lambda run, emit: "")
    monkeypatch.setattr(PreparedData, "open", lambda uri: MemoryData(ROWS, HELD_OUT))


def a_trial(folder: Path, number: int, *overrides: str) -> Run:
    return toy_run(folder / f"{number:04d}", *POPULATION, *overrides)


async def evaluations(host: Host, trial: str, until: int | None = None) -> list[dict[str, Any]]:
    """What the lane tells up to its evaluation at step `until`, or to its end."""
    told = []
    while True:
        told.append(await host.next(trial))
        if told[-1]["kind"] == "end" or told[-1]["step"] == until:
            return told


def tensors(folder: str) -> dict[str, torch.Tensor]:
    return load_file(join(folder, "model.safetensors"))


def test_a_trial_that_goes_on_from_anothers_weights_comes_to_an_artefact_of_these(tmp_path):
    """Population based training: what the trial had itself, and where the other one was best, count no more."""
    good, bad = a_trial(tmp_path, 0, "train.learning_rate=5e-3"), a_trial(tmp_path, 1, "train.learning_rate=1e-5")
    changed = a_trial(tmp_path, 1, "train.learning_rate=1e-12")  # so that the weights stay what they were taken as

    async def search() -> dict[str, Any]:
        host = Host(1)
        await host.join("0000", good.dump(), waits=True)
        await host.join("0001", bad.dump(), waits=True)
        of_good = await evaluations(host, "0000", 20)
        await evaluations(host, "0001", None)  # further than the other one, to its end
        await host.leave("0001")
        source = await host.commit("0000")
        commit = commits.read(source)
        commit.progress.best_loss, commit.progress.best_step = 1e-3, 10  # it has been better than it is
        commits.write(good.folder, commit)
        await host.join("0001", changed.dump(), waits=True, source=source)
        told = await evaluations(host, "0001")
        for trial in ("0000", "0001"):
            await host.leave(trial)
        return {"of_good": of_good, "told": told, "source": tensors(source)}

    found = asyncio.run(search())
    summary = found["told"][-1]["summary"]
    losses = {event["step"]: event["loss"] for event in found["of_good"]}
    assert [event["step"] for event in found["told"][:-1]] == [30], "it goes on where the other one stood"
    assert summary["best_step"] in (20, 30)
    assert summary["best_loss"] == pytest.approx(losses[20], rel=1e-4)
    made = load_file(join(changed.folder, "artefact", "adapter_model.safetensors"))
    assert len(made) == len(found["source"])
    for name, tensor in found["source"].items():
        assert torch.allclose(made[name.replace(".default", "")], tensor, atol=1e-6), name


def test_what_stands_behind_the_commit_that_was_taken_is_gone(tmp_path):
    ahead, behind = a_trial(tmp_path, 0), a_trial(tmp_path, 1)

    async def search() -> None:
        host = Host(1)
        await host.join("0000", ahead.dump(), waits=True)
        await evaluations(host, "0000")
        await host.leave("0000")
        await host.join("0001", behind.dump(), waits=True)
        await evaluations(host, "0001", 10)
        source = await host.commit("0001")
        again = a_trial(tmp_path, 0, "train.learning_rate=1e-3")
        await host.join("0000", again.dump(), waits=True, source=source)
        assert commits.steps_of(again.folder) == [10]
        lines = (tmp_path / "0000" / "metrics.jsonl").read_text()
        assert '"step":10,' in lines
        assert '"step":11,' not in lines
        for trial in ("0000", "0001"):
            await host.leave(trial)

    asyncio.run(search())


def test_weights_of_another_shape_are_refused_before_anything_is_lost(tmp_path):
    wide, narrow = a_trial(tmp_path, 0, "method.rank=8"), a_trial(tmp_path, 1, "method.rank=2")

    async def search() -> None:
        host = Host(1)
        for trial, run in (("0000", wide), ("0001", narrow)):
            await host.join(trial, run.dump(), waits=True)
            await evaluations(host, trial, 20)
        source = await host.commit("0000")
        await host.leave("0001")
        before = commits.steps_of(narrow.folder)
        with pytest.raises(ModelError, match="in the commit"):
            await host.join("0001", narrow.dump(), waits=True, source=source)
        assert commits.steps_of(narrow.folder) == before
        await host.leave("0000")

    asyncio.run(search())


# ---------------------------------------------------------------------------------------------------------------- room


def short(folder: Path, number: int, *overrides: str) -> Run:
    return toy_run(folder / f"{number:04d}", "train.steps=4", "train.batch_rows=2", *overrides)


@pytest.fixture
def room_for_two(tmp_path, monkeypatch) -> Run:
    """There is memory for two lanes of this run, and a half."""
    run = short(tmp_path, 0)
    shapes = find_shapes(run.model)[0]
    need, fixed = need_of(run, shapes), room(run, shapes, 1 << 30, 1).fixed
    memory = int((fixed + need.tokens * need.token + 2.5 * need.own) / USED)
    monkeypatch.setattr("ftray.tune.host.free_on", lambda device: memory)
    return run


def test_a_lane_waits_until_there_is_room_and_says_so(tmp_path, room_for_two):
    """Three of the first one's size; two fit, and stand still until they are asked."""
    held = ["train.evaluate_every=2", "data.held_out_fraction=0.1"]
    runs = {name: short(tmp_path, number, *held) for number, name in enumerate("abc")}

    async def play() -> None:
        host = Host(1)
        assert await host.load() == {"lanes": 0, "room": 1}
        for name in "ab":
            await host.join(name, runs[name].dump(), waits=True)
            await host.next(name)
        assert await host.load() == {"lanes": 2, "room": 0}
        waiting = asyncio.ensure_future(host.join("c", runs["c"].dump(), waits=True, tells=True))
        told = await first_event(host, "c")
        assert told["kind"] == "status"
        assert "waits until other lanes have ended" in told["text"]
        assert not waiting.done()
        assert (await evaluations(host, "a"))[-1]["summary"]["steps"] == 4
        await asyncio.wait_for(waiting, 60)  # in the place of one that nobody told to leave
        assert (await evaluations(host, "c"))[-1]["summary"]["steps"] == 4
        for trial in "abc":
            await host.leave(trial)
        assert await host.load() == {"lanes": 0, "room": 2}

    asyncio.run(play())


def test_first_come_is_first_prepared_and_first_in_the_queue_for_room(tmp_path, room_for_two, monkeypatch):
    """Also when it is slower on the way there."""
    from ftray.train import sharing

    refusal, wide = sharing.refusal, {str(number): short(tmp_path, number, "method.rank=16") for number in (2, 3)}

    def slowly(run: Run) -> str | None:
        if run.folder == wide["2"].folder:
            time.sleep(0.3)
        return refusal(run)

    monkeypatch.setattr(sharing, "refusal", slowly)

    async def play() -> None:
        host = Host(1)
        held = short(tmp_path, 1, "train.evaluate_every=2", "data.held_out_fraction=0.1")
        await host.join("1", held.dump(), waits=True)
        await host.next("1")
        joins = [asyncio.ensure_future(host.join(n, run.dump(), waits=False, tells=True)) for n, run in wide.items()]
        while not any((told := {name: await host.events(name) for name in wide}).values()):
            await asyncio.sleep(0.01)
        assert [name for name, events in told.items() if events] == ["2"]
        for name in wide:
            await host.stop(name)
        assert all(isinstance(end, RunStopped) for end in await asyncio.gather(*joins, return_exceptions=True))
        await host.leave("1")

    asyncio.run(play())


async def first_event(host: Host, trial: str) -> dict[str, Any]:
    for _ in range(2000):
        if events := await host.events(trial):
            return events[0]
        await asyncio.sleep(0.05)
    raise TimeoutError


def test_a_larger_lane_than_the_first_is_planned_as_what_it_is(tmp_path, room_for_two):
    """And one that waits can be told to stop, or to leave."""
    held = short(tmp_path, 1, "train.evaluate_every=2", "data.held_out_fraction=0.1")
    wide = {str(number): short(tmp_path, number, "method.rank=16") for number in (2, 3)}

    async def play() -> None:
        host = Host(1)
        await host.join("1", held.dump(), waits=True)
        await host.next("1")
        assert (await host.load())["room"] == 1
        joins = [asyncio.ensure_future(host.join(n, run.dump(), waits=False, tells=True)) for n, run in wide.items()]
        assert "waits until other lanes have ended" in (await first_event(host, "2"))["text"]
        assert (await host.load())["room"] == 0
        await host.stop("2")
        await host.leave("3")
        stopped, left = await asyncio.gather(*joins, return_exceptions=True)
        assert isinstance(stopped, RunStopped)
        assert isinstance(left, RunError)
        await host.leave("1")
        assert (await host.load())["lanes"] == 0

    asyncio.run(play())
