"""Training over two hosts: the same losses and rows as on one, and a network that is wrong is told first."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hosts.conftest import Hosts, events
from tests.ray.runs import steps_of

pytestmark = [pytest.mark.hosts, pytest.mark.root, pytest.mark.timeout(3600)]
STEPS = 12
PLACES = {"one": "workers.cpus=1", "two": "workers.cpus=2"}
"""Two workers on one host, where each host has two CPUs; or one on each."""
RUNS = {
    "qlora": ["quickstart-cheese", "method.rank=4", "data.max_length=128"],
    "zero2": ["tiny-full-zero2-offload", "strategy={zero: 2}", "data.max_length=128"],
    "zero3": ["tiny-full-zero3-offload", "strategy={zero: 3}", "data.max_length=128"],
}


def command(folder: Path, name: str, recipe: str, *overrides: str) -> list[str]:
    """`ftray train` of a shipped recipe, shortened and in fp32, since bf16 alone would differ by more."""
    return [
        *("train", recipe, f"name={name}", f"output={folder}/{{name}}", f"data.cache={folder}/prepared"),
        *("data.sources.0.limit=200", "data.held_out.0.limit=16", f"train.steps={STEPS}", "train.evaluate_every=null"),
        *("train.batch_rows=8", "train.micro_batch_rows=4", "train.precision=fp32", "train.optimizer=adamw"),
        *("train.learning_rate=1e-3", "workers.count=2", "workers.gpus=0", "logging.tensorboard=false"),
        *(*overrides, "--json"),
    ]


def told(output: str) -> str:
    """The line of how the workers are connected."""
    return next(e["text"] for e in events(output) if e["kind"] == "status" and e["text"].startswith("2 workers on"))


@pytest.mark.parametrize("kind", RUNS)
def test_one_worker_on_each_of_two_hosts_equals_two_on_one(hosts: Hosts, tmp_path: Path, kind: str) -> None:
    connected, losses, rows = {}, {}, {}
    for name, place in PLACES.items():
        done = hosts.ftray("head", *command(tmp_path, name, *RUNS[kind], place))
        assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
        connected[name] = told(done.stdout)
        steps = steps_of(tmp_path / name)
        losses[name] = [step["loss"] for step in steps]
        rows[name] = [(step["step"], step["cursor"], step["target_tokens"]) for step in steps]
    assert connected["one"] in ("2 workers on head", "2 workers on worker1")
    assert connected["two"].startswith("2 workers on 2 nodes, over gloo: ")
    for host in ("head", "worker1"):
        assert f"1 on {host} (eth0, {hosts.addresses[host]})" in connected["two"]
    assert len(losses["one"]) == STEPS
    assert rows["two"] == rows["one"]
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-4)
    assert losses["two"][-1] < losses["two"][0]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("eht0", ["GLOO_SOCKET_IFNAME=eht0 on ", "there is no such interface", "eth0 (10.", "is found by itself"]),
        ("lo", ["GLOO_SOCKET_IFNAME=lo", "is a loopback address, and the run's workers are on 2 nodes"]),
    ],
)
def test_a_wrong_interface_is_told_before_training(
    hosts: Hosts, tmp_path: Path, setting: str, words: list[str]
) -> None:
    line = command(tmp_path, "wrong", *RUNS["qlora"], PLACES["two"])
    done = hosts.ftray("head", *line, GLOO_SOCKET_IFNAME=setting)
    assert done.returncode == 3, done.stderr[-3000:]
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "wrong" / "metrics.jsonl").exists()


def test_a_folder_that_the_other_host_does_not_see_is_refused(hosts: Hosts, tmp_path: Path) -> None:
    private = hosts.scratch / "tmp" / "run"
    line = command(tmp_path, "private", *RUNS["qlora"], PLACES["two"], f"output={private}")
    done = hosts.ftray("head", *line)
    assert done.returncode == 3, done.stderr[-3000:]
    assert f"output {private}: worker1 does not see this folder as it is here" in done.stderr
    assert "that all nodes mount under one path" in done.stderr
