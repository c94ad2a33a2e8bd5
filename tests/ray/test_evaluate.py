"""`ftray evaluate` on Ray's actors: what they find is what one process finds, also when one of them dies."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from ftray.config import Decoding, Evaluation, Model, Run
from ftray.errors import ArtefactError, ConfigError, RunError
from ftray.evaluate import crew, places
from ftray.evaluate.crew import Crew
from ftray.evaluate.evaluation import evaluate, task_of
from ftray.evaluate.systems import BaseKey, System, resolved
from tests.evaluate.runs import cheese_run
from tests.ray.holding import held
from tests.ray.runs import processes

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def lora(folder) -> Run:
    return cheese_run(folder / "lora", steps=6)


def test_two_workers_find_what_one_process_does(folder, lora, monkeypatch):
    cheese_run(folder / "prompt", "{name: prompt, tokens: 6}", steps=2)
    monkeypatch.setattr(crew, "_AT_ONCE", 4)
    killed: list[int] = []

    def kill_a_worker(event: dict[str, Any]) -> None:
        if event["kind"] == "progress" and event["what"] == "answers" and not killed:
            killed.append(processes("ray::_Actor")[0].pid)
            os.kill(killed[0], signal.SIGKILL)

    settings = Evaluation(metrics=["chrf"], examples=[0, 1], decoding=Decoding(max_tokens=12))
    with resolved([str(folder / "lora"), str(folder / "prompt")]) as systems:
        task = task_of(systems, settings=settings)
        alone = evaluate(systems, task, lambda event: None)
        spread = evaluate(systems, task, kill_a_worker, workers=partial(Crew, count=2))
    assert killed
    for one, other in zip(alone.outcomes, spread.outcomes, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
        assert [answer.text for answer in other.answers] == [answer.text for answer in one.answers]
        assert other.shown == one.shown
    assert not psutil.wait_procs(processes("ray::_Actor"), timeout=60)[1]


def test_workers_that_get_no_place_are_not_waited_for(folder, lora, monkeypatch):
    """The one that has a place does all; with none at all, that is told after a while."""
    monkeypatch.setattr(crew, "_AT_ONCE", 4)
    cpus = int(ray.cluster_resources()["CPU"])
    told: list[dict[str, Any]] = []
    with resolved([str(folder / "lora")]) as systems:
        task = task_of(systems, settings=Evaluation())
        with held(cpus - 1):
            found = evaluate(systems, task, told.append, workers=partial(Crew, count=cpus, on_event=told.append))
        assert found.outcomes[1].loss < found.outcomes[0].loss
        assert f"1 of {cpus} workers are there; the others join as they get a place" in [e.get("text") for e in told]
        monkeypatch.setattr(places, "_TOLD_AFTER", 0.5)
        monkeypatch.setattr(places, "WAIT_SECONDS", 2.0)
        with held(cpus), pytest.raises(RunError, match=r"for 2 s no node had 1 CPU free for a worker. Nodes: .*4 CPU"):
            evaluate(systems, task, told.append, workers=partial(Crew, count=cpus, on_event=told.append))
    assert "waiting for a worker's place, 1 CPU, for at most 2 s" in [event.get("text") for event in told]
    with pytest.raises(ConfigError, match=f"{cpus + 1} workers × 1 CPU take {cpus + 1}, and the cluster has {cpus}"):
        Crew(BaseKey(Model(path="embedded"), False, "fp32"), [], count=cpus + 1)


def test_what_is_wrong_with_an_adapter_is_told_as_it_is(folder, lora):
    key = BaseKey(Model(path="embedded"), False, "fp32")
    other = System("x", "adapter", "x", key, folder / "lora/artefact", "k", lora, base_sha256="0" * 64)
    with pytest.raises(ArtefactError, match="is not the base that it was trained on"):
        Crew(key, [other], count=1)
