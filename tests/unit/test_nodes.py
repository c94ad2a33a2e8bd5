"""What is asked of a cluster before a run begins on it: its GPUs, its files. Without a cluster."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import WorkerCrashedError

from ftray.config import load_run
from ftray.config.search import load_search
from ftray.errors import ConfigError, RunError
from ftray.train import nodes
from ftray.train.launch import preflight
from ftray.train.nodes import refuse_unshared
from ftray.train.places import refuse_guessed_cpus
from ftray.tune.driver import search


@pytest.mark.parametrize(
    ("cluster", "parameters", "told"),
    [
        ({}, 10**6, "nor any node with work"),  # a head without work; an autoscaler starts the rest
        ({"memory": 1e9, "CPU": 0.0}, None, "nor any node with work"),
        ({"CPU": 8.0}, 8 * 10**9, "8.0 billion parameters"),
    ],
)
def test_auto_is_no_guess_that_workers_need_no_gpus(cluster, parameters, told):
    with pytest.raises(ConfigError, match=told) as raised:
        refuse_guessed_cpus("auto", cluster, parameters)
    assert raised.value.where == "workers.gpus"
    assert "workers.gpus=1 to wait for GPUs, workers.gpus=0" in (raised.value.hint or "")
    for said in (0, 1.0):
        assert refuse_guessed_cpus(said, cluster, parameters) is None


def test_on_a_cluster_of_cpus_a_small_base_is_trained_with_a_warning():
    for parameters in (1_700_000, None):
        assert "workers.gpus=1 to wait" in (refuse_guessed_cpus("auto", {"CPU": 4.0}, parameters) or "")
    assert refuse_guessed_cpus("auto", {"CPU": 4.0, "GPU": 2.0}, 8 * 10**9) is None


HEAD, FIRST, SECOND = "head", "first", "second"


def a_node(name: str, cpus: float = 2.0) -> dict[str, Any]:
    return {"NodeID": name, "Alive": True, "Resources": {"CPU": cpus} if cpus else {}}


class Cluster:
    """What `nodes` asks of Ray. `blind`: nodes that see no file of ours; `dying`: that are lost when they are asked."""

    def __init__(self, *there: dict[str, Any], blind: tuple[str, ...] = (), dying: tuple[str, ...] = ()) -> None:
        self.there, self.blind, self.dying = list(there), blind, dying
        self.asked: list[list[str]] = []

    def on_each(self, them: list[Mapping[str, Any]], _function: Any, places: dict[str, str]) -> list[Any]:
        assert all(Path(place).exists() for place in places.values())
        names = [node["NodeID"] for node in them]
        self.asked.append(names)
        if lost := [name for name in names if name in self.dying]:
            self.there = [node for node in self.there if node["NodeID"] not in lost]
            raise WorkerCrashedError
        return [(name, dict.fromkeys(places, "missing") if name in self.blind else {}) for name in names]


@pytest.fixture
def cluster(monkeypatch):
    """Puts a cluster in Ray's place, with this process on its head."""

    def put(*there: dict[str, Any], **how: Any) -> Cluster:
        made = Cluster(*there, **how)
        monkeypatch.setattr(ray, "nodes", lambda: made.there)
        monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: HEAD))
        monkeypatch.setattr(nodes, "on_each", made.on_each)
        return made

    return put


def test_one_node_with_work_beside_a_head_without_is_asked(cluster, tmp_path):
    found = cluster(a_node(HEAD, 0), a_node(FIRST), blind=(FIRST,))
    with pytest.raises(RunError, match="first does not see this folder") as raised:
        refuse_unshared({"output": str(tmp_path / "run")})
    assert raised.value.where == f"output {tmp_path / 'run'}"
    assert found.asked == [[FIRST]]
    assert not list(tmp_path.rglob(".seen-*"))


def test_the_drivers_own_node_is_not_asked(cluster, tmp_path):
    found = cluster(a_node(HEAD), blind=(HEAD,))
    refuse_unshared({"output": str(tmp_path / "run")})
    found.there.append(a_node(FIRST))
    refuse_unshared({"output": str(tmp_path / "run")})
    assert found.asked == [[FIRST]]
    assert not list(tmp_path.rglob(".seen-*"))


def test_nodes_that_come_later_are_asked_once(cluster, tmp_path):
    seen: set[str] = set()
    found = cluster(a_node(HEAD, 0))
    refuse_unshared({"output": str(tmp_path)}, seen)
    found.there.append(a_node(FIRST))
    refuse_unshared({"output": str(tmp_path)}, seen)
    found.there.append(a_node(SECOND))
    refuse_unshared({"output": str(tmp_path)}, seen)
    refuse_unshared({"output": str(tmp_path)}, seen)
    assert found.asked == [[FIRST], [SECOND]]


def test_a_node_that_is_lost_while_it_is_asked_does_not_end_the_run(cluster, tmp_path):
    found = cluster(a_node(HEAD), a_node(FIRST), a_node(SECOND), dying=(FIRST,))
    refuse_unshared({"output": str(tmp_path)})
    assert found.asked == [[FIRST, SECOND], [SECOND]]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A job of `ray job submit --working-dir .`, in the folder that Ray made for it."""
    folder = tmp_path / "working_dir_files" / "_ray_pkg_0123"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    given = {"runtime_env": {"working_dir": "gcs://_ray_pkg_0123.zip"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(given))
    return folder


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ([], "output"),
        (["output=/shared/runs/{name}", "data.cache=prepared"], "data.cache"),
    ],
)
def test_what_a_run_leaves_does_not_lie_in_its_jobs_own_folder(package, overrides, key):
    with pytest.raises(ConfigError, match="would lie in the job's own folder, and be lost with it") as raised:
        preflight(load_run("quickstart-cheese", overrides))
    assert raised.value.where == key
    assert f"{key}=s3://bucket/{{name}}" in (raised.value.hint or "")
    assert os.listdir(package) == []


def test_what_lies_elsewhere_and_what_is_no_job_is_not_refused(package, monkeypatch, tmp_path):
    preflight(load_run("quickstart-cheese", ["output=memory://bucket/{name}"]))
    preflight(load_run("quickstart-cheese", [f"output={tmp_path}/runs", f"data.cache={tmp_path}/prepared"]))
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    preflight(load_run("quickstart-cheese"))


def test_a_search_does_not_lie_there_either(package):
    import threading

    with pytest.raises(ConfigError, match="would lie in the job's own folder"):
        search(load_search("e2e-asha", []), on_event=lambda _: None, stop=threading.Event())
    assert os.listdir(package) == []
