"""What runs on the clusters of cluster/: Ray of our version, an endpoint, runs and entrypoints that we and Ray take."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

from ftray.config import load_run
from ftray.config.search import load_search
from ftray.errors import ConfigError
from serve.config import parse_serve
from tests.unit.cluster import CLUSTER, COMMANDS, PROJECT, TEXTS

# ------------------------------------------------------------------------------------------------------------- versions


def pinned(name: str) -> str:
    return next(line for line in PROJECT["dependencies"] if re.match(rf"{name}\b", line))


def test_every_ray_version_is_that_of_pyproject() -> None:
    low, high = re.findall(r"[<>]=?(\d+)\.(\d+)", pinned("ray"))
    found = [v for text in TEXTS.values() for v in re.findall(r"rayVersion: \"?([\d.]+)", text)]
    assert found
    for version in found:
        assert low <= tuple(version.split(".")[:2]) < high


# ---------------------------------------------------------------------------------------------------------------- Serve


def serve_text() -> str:
    document = yaml.safe_load(TEXTS[CLUSTER / "kuberay" / "rayservice.yaml"])
    return document["spec"]["serveConfigV2"]


def test_the_endpoint_on_kubernetes_is_one_that_we_and_ray_take() -> None:
    file = parse_serve(serve_text(), "rayservice.yaml")
    schema = importlib.import_module("ray.serve.schema").ServeDeploySchema
    deployed = schema.model_validate(yaml.safe_load(serve_text()))
    assert deployed.applications[0].import_path == "serve.app:build"
    assert importlib.util.find_spec("serve.app") is not None
    assert file.config.tenants, "everybody in the namespaces that are let in may ask"
    document = yaml.safe_load(TEXTS[CLUSTER / "kuberay" / "rayservice.yaml"])
    group = document["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    replicas = file.config.replicas
    assert replicas.max * replicas.gpus <= group["maxReplicas"] * int(limits["nvidia.com/gpu"])
    assert replicas.cpus + file.config.ingress.cpus <= int(limits["cpu"])


@pytest.mark.parametrize(
    ("was", "now"),
    [("tenants:", "tenant:"), ("serve.app:build", "serve.app:built"), ("slots: 32", "slot: 32"), ("host:", "hosts:")],
)
def test_a_misspelled_serve_file_is_refused(was: str, now: str) -> None:
    assert was in serve_text()
    with pytest.raises(ConfigError):
        parse_serve(serve_text().replace(was, now), "rayservice.yaml")


# ------------------------------------------------------------------------------------------------------------ run files


def test_the_runs_of_the_cluster_pass_check(tmp_path: Path) -> None:
    runs = CLUSTER / "kuberay" / "runs"
    run = load_run(runs / "train.yaml")
    assert run.folder.startswith("/mnt/ftray/")
    assert run.data.cache is not None
    assert run.data.cache.startswith("/mnt/ftray/")
    # in a pod the folder is /etc/ftray/runs
    moved = tmp_path / "search.yaml"
    moved.write_text((runs / "search.yaml").read_text(encoding="utf-8").replace("/etc/ftray/runs", str(runs)))
    search = load_search(moved)
    assert search.folder.startswith("/mnt/ftray/")
    assert (search.raw_run()["workers"]["count"], run.workers.number) == (1, "1 to 2")
    job = yaml.safe_load(TEXTS[CLUSTER / "kuberay" / "rayjob-train.yaml"])
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert run.workers.most == group["replicas"] * int(limits["nvidia.com/gpu"])
    assert (run.workers.cpus or 1) <= int(limits["cpu"])


def test_every_entrypoint_is_a_command_of_ours_and_every_run_it_names_is_there() -> None:
    entrypoints = [
        line for file, text in TEXTS.items() for line in re.findall(r"^ *entrypoint: (.*)$", text, flags=re.M)
    ]
    assert len(entrypoints) == 2
    for entrypoint in entrypoints:
        program, command, path = entrypoint.split()
        assert program in PROJECT["scripts"]
        assert command in COMMANDS
        assert (CLUSTER / "kuberay" / "runs" / Path(path).name).is_file()
        assert path.startswith("/etc/ftray/runs/")
