"""How many workers a cluster has room for, by arithmetic alone."""

from __future__ import annotations

import pytest

from ftray.errors import ConfigError, RunError
from ftray.evaluate.places import shared

LAPTOP = [{"CPU": 2.0}]


def test_a_gpu_each_or_a_machines_cores():
    assert shared(LAPTOP, None) == (1, {"num_cpus": 2})
    assert shared(LAPTOP, 2) == (2, {"num_cpus": 1})
    assert shared([{"CPU": 8.0}, {"CPU": 3.0}], None) == (2, {"num_cpus": 3})
    assert shared([{"CPU": 1.0}, {"CPU": 8.0}], 9) == (9, {"num_cpus": 1})
    assert shared([{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0}], None) == (4, {"num_gpus": 1, "num_cpus": 1})
    assert shared([{"CPU": 8.0, "GPU": 4.0}], None, parts=3) == (3, {"num_gpus": 1, "num_cpus": 1})
    assert shared([{"CPU": 1.0, "GPU": 4.0}], None) == (1, {"num_gpus": 1, "num_cpus": 1})  # each takes a CPU too


@pytest.mark.parametrize(
    ("nodes", "wanted", "words"),
    [
        (LAPTOP, 4, "4 workers × 1 CPU take 4, and the cluster has 2"),
        ([{"CPU": 8.0, "GPU": 2.0}], 3, "3 workers × 1 GPU take 3, and the cluster has 2"),
        ([{"CPU": 8.0}, {"CPU": 2.0}], 11, "the cluster has 10"),
    ],
)
def test_more_than_fit_are_refused(nodes, wanted, words):
    with pytest.raises(ConfigError, match=words) as raised:
        shared(nodes, wanted)
    assert raised.value.where == "--workers"
    assert shared(nodes, wanted, parts=1)[0] == 1


@pytest.mark.parametrize("nodes", [[], [{"memory": 1e9}], [{"CPU": 0.0, "GPU": 2.0}]])
def test_a_cluster_without_cpus(nodes):
    with pytest.raises(RunError, match="no node has a CPU for a worker"):
        shared(nodes, None)
