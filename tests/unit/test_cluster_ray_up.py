"""cluster/ray-up: every file is what `ray up` takes, and asks for the token."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.cluster import CLUSTER, TEXTS

RAY_UP = sorted((CLUSTER / "ray-up").glob("*.yaml"))


@cache
def launcher() -> Any:
    from ray.autoscaler._private import util

    return util


def launcher_errors(config: dict[str, Any]) -> str | None:
    """What `ray up` refuses before it talks to anybody."""
    import jsonschema

    try:
        launcher().validate_config(launcher().prepare_config(json.loads(json.dumps(config))))
    except (jsonschema.ValidationError, ValueError, RuntimeError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("file", RAY_UP, ids=lambda f: f.name)
def test_ray_up_takes_its_files(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert launcher_errors(yaml.safe_load(TEXTS[file])) is None


@pytest.mark.parametrize("file", RAY_UP, ids=lambda f: f.name)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: c.update(dockers={}),
        lambda c: c["docker"].update(images="ftray"),
        lambda c: c.update(cluster_name=1),
        lambda c: c["auth"].update(ssh_user=1),
    ],
)
def test_ray_up_refuses_what_it_does_not_know(file: Path, spoil: Any) -> None:
    config = yaml.safe_load(TEXTS[file])
    spoil(config)
    assert launcher_errors(config)


@pytest.mark.parametrize("file", RAY_UP, ids=lambda f: f.name)
def test_a_cluster_of_ray_up_asks_for_the_token(file: Path) -> None:
    config = yaml.safe_load(TEXTS[file])
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"/home/ftray/.ray/auth_token": "~/.ray/auth_token"}
    commands = "\n".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in commands, "reached by `ray dashboard`, through ssh"
    head = config.get("available_node_types", {}).get("head")
    assert "--num-cpus=0" in commands or head["resources"] == {"CPU": 0}
