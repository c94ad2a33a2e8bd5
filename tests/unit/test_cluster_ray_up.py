"""cluster/ray-up: every file is what `ray up` takes, and asks for the token."""

from __future__ import annotations

import json
import re
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


def test_workers_on_google_cloud_have_a_service_account() -> None:
    """`ray up` gives its own to the head alone, and who has none reaches no bucket."""
    config = yaml.safe_load(TEXTS[CLUSTER / "ray-up" / "gcp.yaml"])
    google = (Path(launcher().__file__).parent / "gcp" / "config.py").read_text(encoding="utf-8")
    named = dict(re.findall(r'^(RAY|VERSION|SERVICE_ACCOUNT_EMAIL_TEMPLATE) = "(.*)"$', google, flags=re.M))
    assert 'DEFAULT_SERVICE_ACCOUNT_ID = RAY + "-sa-" + VERSION' in google
    own = named["SERVICE_ACCOUNT_EMAIL_TEMPLATE"].format(
        account_id=f"{named['RAY']}-sa-{named['VERSION']}", project_id=config["provider"]["project_id"]
    )
    types = config["available_node_types"]
    assert "serviceAccounts" not in types[config["head_node_type"]]["node_config"], "it gets Ray's"
    for name in types.keys() - {config["head_node_type"]}:
        (account,) = types[name]["node_config"]["serviceAccounts"]
        assert account == {"email": own, "scopes": ["https://www.googleapis.com/auth/cloud-platform"]}


def test_on_aws_the_head_may_start_machines_and_workers_may_not() -> None:
    text = TEXTS[CLUSTER / "ray-up" / "aws.yaml"]
    types = yaml.safe_load(text)["available_node_types"]
    profiles = {name: found["node_config"]["IamInstanceProfile"]["Name"] for name, found in types.items()}
    assert profiles["head"] not in {profile for name, profile in profiles.items() if name != "head"}
    said = text.split("cluster_name:")[0]
    assert all(profile in said for profile in profiles.values())
    for right in ("ec2:RunInstances", "TerminateInstances", "CreateTags", "Describe*", "iam:PassRole"):
        assert right in said, right
