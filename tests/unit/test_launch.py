"""What a launch refuses before it prepares a row, without Ray."""

from __future__ import annotations

import contextlib
import re
import threading

import pytest

from ftray.errors import ConfigError
from ftray.train import launch, nodes
from tests.toys import toy_run

OFFLOAD = ("method={name: full}", "train.optimizer=adamw", "strategy={zero: 2, offload_optimizer: cpu}")


@pytest.fixture
def cluster(monkeypatch, tmp_path):
    """One local machine with four CPUs, where nothing is compiled and no row may be prepared."""
    node = {"Alive": True, "Resources": {"CPU": 4.0}, "NodeID": "0"}
    monkeypatch.setattr(launch, "ray_session", lambda **_: contextlib.nullcontext())
    monkeypatch.setattr("ray.cluster_resources", lambda: node["Resources"])
    monkeypatch.setattr("ray.nodes", lambda: [node])
    monkeypatch.setattr(nodes, "on_each", lambda _nodes, function, *arguments: [function(*arguments)])
    monkeypatch.setattr(launch, "prepare", lambda *_: pytest.fail("rows were prepared"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setenv("CXX", "no-such-compiler")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("workers.gpus=1",), r"^1 worker × 1 GPU = 1, the cluster has 0$"),
        (("workers.count=2", "workers.gpus=1"), r"^2 workers × 1 GPU = 2, the cluster has 0$"),
        (("workers={min: 1, max: 2, cpus: 8}",), r"^1 worker × 8 CPU = 8, the cluster has 4$"),
        (OFFLOAD, r"compiles DeepSpeed's cpu_adam, and \S+ has no no-such-compiler$"),
    ],
)
@pytest.mark.usefixtures("cluster")
def test_what_no_row_can_mend_is_said_before_rows_are_prepared(tmp_path, overrides, said):
    run = toy_run(tmp_path / "run", *overrides)
    with pytest.raises(ConfigError) as refused:
        launch.train(run, on_event=lambda _: None, stop=threading.Event())
    assert re.search(said, refused.value.what)
    assert not (tmp_path / "run").exists()
