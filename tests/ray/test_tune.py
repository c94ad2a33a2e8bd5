"""Searches on Ray Tune: what is recorded is not made again, whoever is killed; places are neither waited for in a
circle nor left behind."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import yaml
from ray.util import list_named_actors, placement_group_table

from ftray.cli.main import call
from ftray.config import load_run
from ftray.config.search import parse_search
from ftray.errors import RunStopped
from ftray.tune.driver import search
from ftray.tune.ledger import Ledger
from ftray.tune.samplers import sampler_of
from ftray.tune.space import draw
from tests.ray.curves import Abreast, Curves, loss_of
from tests.ray.runs import processes, train_alone, wait_for, write_run

pytestmark = pytest.mark.usefixtures("local_ray")
RATES = {"train.learning_rate": {"loguniform": [1e-4, 1e-1]}}
SPACE = RATES | {"method.rank": {"choice": [2, 4, 8]}}


def a_search(folder: Path, name: str, **keys: Any):
    run = write_run(folder, "base", train__steps=40, train__evaluate_every=5, workers__count=1)
    raw = {"name": name, "run": str(run), "space": SPACE, "samples": 6, "lanes": "off", "output": str(folder / name)}
    return parse_search(yaml.safe_dump(raw | keys), name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, local_ray) -> Path:
    return tmp_path_factory.mktemp("tune")


@pytest.fixture
def curves(monkeypatch):
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[Curves.__module__])
    for place in ("ordinary.Ordinary", "host.Host"):
        monkeypatch.setattr(f"ftray.tune.{place}", Curves)


def go(spec, on_event=lambda _: None, stop: threading.Event | None = None) -> dict[str, Any]:
    return search(spec, on_event=on_event, stop=stop or threading.Event())


def curves_of(spec) -> list[list[tuple[int, float]]]:
    return [[(r["step"], r["loss"]) for r in trial.results] for trial in Ledger(spec.folder).trials]


def made(spec) -> Counter:
    """How often each step of each trial was trained."""
    lines = (Path(spec.folder) / "trained.jsonl").read_text().splitlines()
    return Counter(tuple(json.loads(line)) for line in lines)


def expected(spec, index: int) -> list[tuple[int, float]]:
    drawn = draw(spec, index)
    return [(s, loss_of(drawn["train.learning_rate"], drawn["method.rank"], s)) for s in range(5, 41, 5)]


@pytest.mark.usefixtures("curves")
def test_failures_are_tried_again_then_set_aside_and_the_search_goes_on(folder):
    space = {"method.rank": {"choice": [2, 13, 8]}, "train.learning_rate": {"choice": [1e-2, 5.0]}}
    spec = a_search(folder, "failing", space=space, sampler="grid", retries=2)
    found = go(spec)
    assert (found["finished"], found["aside"]) == (2, 4)
    trials = Ledger(spec.folder).trials
    assert [t.state for t in trials] == ["finished", "aside", "aside", "aside", "finished", "aside"]
    assert [t.failures for t in trials] == [0, 1, 3, 1, 0, 1], "a user's mistake is not tried again"
    assert "no finite loss" in trials[2].error
    assert "fits no base" in trials[1].error
    best = yaml.safe_load(Path(found["best_file"]).read_text())
    assert (best["method"]["rank"], best["train"]["learning_rate"]) == (8, 1e-2)
    assert go(spec)["best"] == found["best"]


@pytest.mark.usefixtures("curves")
def test_broken_off_and_taken_up_again(folder):
    """Ctrl-C twice; then the worker and a trial's actor are killed. In whatever order trials of this seed come to their
    evaluations, two of them at least are stopped, and there are 29 results at least."""
    spec = a_search(folder, "broken", scheduler={"name": "asha", "grace": 5, "reduction": 2}, samples=8, seed=320)
    for results in (5, 12):
        stop, seen = threading.Event(), []

        def on_event(event, results=results, stop=stop, seen=seen):
            seen.append(event["kind"])
            if seen.count("trial_result") == results:
                stop.set()

        with pytest.raises(RunStopped):
            go(spec, on_event, stop)
    killed = []

    def kill(event):
        if event["kind"] == "trial_result" and len(killed) < 2:
            victim = processes(("ray::Curves", "ray::Follower")[len(killed)])[0]
            killed.append(victim.pid)
            victim.kill()

    found = go(spec, kill)
    assert len(killed) == 2
    assert found["open"] == found["aside"] == 0
    for index, curve in enumerate(curves_of(spec)):
        assert curve == expected(spec, index)[: len(curve)], "a trial's curve is a function of its parameters alone"
        assert len(curve) == 8 or Ledger(spec.folder).trials[index].state == "stopped"
    assert found["stopped"] >= 2
    again = made(spec)
    assert max(again.values()) == 1, "no step was trained twice: all kills fell on committed steps"
    go(spec)
    assert made(spec) == again


@pytest.mark.usefixtures("curves")
def test_one_trial_at_a_time_decides_as_if_nothing_had_been_killed(folder):
    """With several at once ASHA decides by who is there first. Kills fall anywhere, on the worker or the trial."""
    keys = {"scheduler": {"name": "asha", "grace": 5, "reduction": 2}, "samples": 8, "concurrency": 1}
    found = go(whole := a_search(folder, "one-by-one", **keys))
    rng = random.Random(int(os.environ.get("FTRAY_TEST_SEED", "3")))
    at = {rng.randrange(2, 12): "ray::Curves", rng.randrange(12, 20): "ray::Follower"}
    seen = Counter()

    def kill(event):
        seen[event["kind"]] += 1
        if event["kind"] == "trial_result" and (name := at.pop(seen["trial_result"], None)):
            processes(name)[0].kill()

    again = go(broken := a_search(folder, "one-by-one-killed", **keys), kill)
    assert not at
    assert curves_of(broken) == curves_of(whole)
    states = [[trial.state for trial in Ledger(spec.folder).trials] for spec in (broken, whole)]
    assert states[0] == states[1]
    assert "stopped" in states[0]
    assert again["best"]["parameters"] == found["best"]["parameters"]


@pytest.mark.usefixtures("curves")
def test_the_other_samplers_and_schedulers_come_to_an_end(folder, monkeypatch):
    monkeypatch.setattr("ftray.tune.host.Host", Abreast)  # for pbt, which changes trials while others run
    for name, keys in {
        "tpe-hyperband": {"sampler": "optuna", "scheduler": {"name": "hyperband", "max_steps": 40}, "samples": 7},
        "pbt": {"scheduler": {"name": "pbt", "interval": 10}, "samples": 4, "lanes": "auto", "space": RATES},
        "two": {"sampler": {"name": "optuna", "startup": 2}, "metric": ["loss", "trained"]},
    }.items():
        spec = a_search(folder, name, **keys)
        found = go(spec)
        states = [t.state for t in Ledger(spec.folder).trials]
        assert set(states) <= {"finished", "stopped"}, (name, states)
        assert len(states) == found["trials"] == spec.samples
        assert found["best"] is not None
        assert json.loads((Path(spec.folder) / "outcome.json").read_text())["best"] == found["best"]
        if name == "two":
            assert len(found["front"]) >= 1
        if name == "pbt":
            changes = [change for t in Ledger(spec.folder).trials for change in t.changes]
            assert changes
            assert all(1e-4 <= c["parameters"]["train.learning_rate"] <= 1e-1 for c in changes)


@pytest.mark.usefixtures("curves")
def test_a_budget_ends_the_search_and_a_larger_one_goes_on(folder):
    found = go(a_search(folder, "budget", budget={"steps": 60}))
    assert found["reason"] == "budget"
    assert 60 <= found["steps"] <= 60 + 2 * 5
    found = go(a_search(folder, "budget"))
    assert (found["reason"], found["finished"], found["steps"]) == ("finished", 6, 6 * 40)
    assert max(made(a_search(folder, "budget")).values()) == 1


def killed_and_begun_again(spec, results: int, worker: str, *module: str) -> None:
    """The command `module` is killed at so many results; nothing that belonged to it may be left. Then the same command
    in this process, which has a Ray already, goes on with the search."""
    file = Path(f"{spec.folder}.yaml")
    file.write_text(spec.to_yaml())
    command = [sys.executable, "-m", *module, str(file)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT) as driver:
        wait_for(lambda: sum(map(len, curves_of(spec))) >= results)
        others = processes("ray::Follower", worker, below=driver.pid)
        assert others
        driver.kill()
    assert not psutil.wait_procs(others, timeout=60)[1]
    assert call(["tune", str(file)]) == 0


@pytest.mark.usefixtures("curves")
def test_the_driver_is_killed(folder, capsys):
    spec = a_search(folder, "driver", samples=8)
    killed_and_begun_again(spec, 21, "ray::Curves", "tests.ray.curves")
    assert curves_of(spec) == [expected(spec, index) for index in range(8)]
    assert sum(n - 1 for n in made(spec).values()) <= 4, "at most what was not recorded, a step of each that ran"
    assert "best.yaml" in capsys.readouterr().out


@pytest.mark.long
def test_ordinary_runs_of_one_and_two_workers_on_two_cpus(folder):
    """Six of one worker, three of two: no circle of waiting, and nothing is left behind."""
    space = {"workers.count": {"choice": [1, 2]}, "train.learning_rate": {"choice": [1e-3, 2e-3, 3e-3]}}
    space |= {"seed": {"integers": [0, 1], "when": {"workers.count": 1}}}
    keys = {"sampler": "grid", "space": space, "retries": 0}
    keys["overrides"] = {"train": {"steps": 2, "evaluate_every": 1}, "data.held_out.0.limit": 4, "workers.cpus": 1}
    spec = a_search(folder, "places", **keys)
    scratch = set(os.listdir(tempfile.gettempdir()))
    with two_cpus():
        found = go(spec)
    assert (found["finished"], found["trials"]) == (9, 9), [t.error for t in Ledger(spec.folder).trials]
    assert all((Path(spec.trial_folder(i)) / "artefact/ftray.json").exists() for i in range(9))
    wait_for(lambda: not [group for group in placement_group_table().values() if group["state"] != "REMOVED"])
    assert not [a for a in list_named_actors(all_namespaces=True) if "rain" in str(a)]
    ours = ("ray::RayTrainWo", "ray::Ordinary", "ray::TrainContr", "ray::Follower", "ray::Desk", "ray::Board")
    wait_for(lambda: not processes(*ours), 30)
    wait_for(lambda: ray.available_resources().get("CPU") == 4)

    def left() -> list[str]:
        return [name for name in set(os.listdir(tempfile.gettempdir())) - scratch if name.startswith("ftray")]

    wait_for(lambda: not left(), 60)  # those of others who test on this machine come and go


@contextmanager
def two_cpus():
    """The search may use two of the local Ray's four."""

    @ray.remote(num_cpus=2)
    class Holder:
        def ready(self) -> bool:
            return True

    holder = Holder.remote()
    ray.get(holder.ready.remote())
    yield
    ray.kill(holder)


def two_lanes(folder: Path, name: str):
    overrides = {"train": {"steps": 12, "evaluate_every": 3, "commit_every": None}}
    space = {"method.rank": {"choice": [2, 4]}}
    return a_search(folder, name, sampler="grid", space=space, lanes="auto", overrides=overrides)


@pytest.fixture(scope="module")
def whole(folder) -> list[list[tuple[int, float]]]:
    """Curves of the same trials, each trained by itself in this process, which nothing broke off."""
    spec, curves = two_lanes(folder, "whole"), []
    for index in range(2):
        run = spec.run_of(sampler_of(spec).propose(index, []), index)
        _, channel, _ = train_alone(run)
        curves.append([(e["step"], e["loss"]) for e in channel.of("evaluation") if e["step"]])
    return curves


def same_curves(broken, whole) -> None:
    for mine, theirs in zip(curves_of(broken), whole, strict=True):
        assert [step for step, _ in mine] == [step for step, _ in theirs] == [3, 6, 9, 12]
        assert [loss for _, loss in mine] == pytest.approx([loss for _, loss in theirs], rel=1e-4)


@pytest.mark.long
def test_lanes_of_one_base_and_the_driver_is_killed(folder, whole):
    """The command itself, with SIGKILL: nothing that belongs to it is left, and it goes on where it was."""
    spec = two_lanes(folder, "driver-of-lanes")
    killed_and_begun_again(spec, 3, "ray::Host", "ftray.cli.main", "tune")
    same_curves(spec, whole)


def test_lanes_of_one_base_and_the_host_is_killed(folder, whole):
    """The real thing, small: two trials on one base, whose process is killed; their curves are those of unbroken runs,
    and an artefact is a run's."""
    killed: list[psutil.Process] = []

    def on_event(event):
        if event["kind"] == "trial_result" and event["step"] == 6 and not killed:
            killed.extend(processes("ray::Host"))
            killed[0].kill()

    found = go(broken := two_lanes(folder, "broken-lanes"), on_event)
    assert len(killed) == 1
    assert found["finished"] == 2
    same_curves(broken, whole)
    best = load_run(found["best_file"])
    assert (Path(best.folder) / "artefact/adapter_model.safetensors").exists()
    assert json.loads((Path(best.folder) / "summary.json").read_text())["artefact"]
