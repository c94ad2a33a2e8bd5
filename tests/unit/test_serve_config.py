"""SERVE.yaml: strict where Ray is not, and still a file that Ray takes."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import yaml

from ftray.errors import ConfigError
from serve.config import EXAMPLE, ServeConfig, load_serve, parse_args, parse_serve, with_absolute_paths

SMALL = """
http_options: {host: 127.0.0.1, port: 8001}
applications:
- name: ftray
  import_path: serve.app:build
  args:
    model: {path: embedded}
"""


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        parse_serve(text, "serve.yaml", overrides)
    return str(error.value)


def test_the_example_and_defaults() -> None:
    file = parse_serve(EXAMPLE, "example")
    assert file.config.registry == "registry"
    assert file.config.engine.slots == 32
    assert file.http_options.host == "127.0.0.1"
    small = parse_serve("applications: [{import_path: 'serve.app:build', args: {model: {path: a/b-c}}}]", "small")
    assert small.http_options.host == "127.0.0.1"
    assert small.config.name_of_base == "b-c"
    assert small.config.quantization == "nf4"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("modle={path: x}", "applications.0.args.modle: unknown key; did you mean 'model'?"),
        ("engine.slot=3", "applications.0.args.engine.slot: unknown key; did you mean 'slots'?"),
        ("http_options.prot=1", "http_options.prot: unknown key; did you mean 'port'?"),
        ("applications.0.arg={}", "applications.0.arg: unknown key; did you mean 'args'?"),
        ("applications.0.deployments=[]", "applications.0.deployments: unknown key"),
        ("applications.0.import_path=serve.api:build", "applications.0.import_path"),
        ("applications.0.route_prefix=/x", "applications.0.route_prefix"),
        ("replicas={min: 3, max: 2}", "replicas.max 2 is less than replicas.min 3"),
        ("engine.slots=0", "greater than or equal to 1"),
        ("admin_key_sha256=secret", "admin_key_sha256"),
        ("quantization=int8", "quantization"),
        ("http_options.host=0.0.0.0", "without keys the endpoint answers this machine alone"),
        ("proxy_location=Everywhere", "proxy_location"),
    ],
)
def test_refused(override: str, said: str) -> None:
    assert said in refusal(SMALL, override)


def test_keys_of_rays_that_it_would_ignore_are_refused() -> None:
    from ray.serve.schema import ServeDeploySchema

    wrong = SMALL.replace("http_options", "http_optoins")
    ServeDeploySchema.model_validate(yaml.safe_load(wrong))
    assert "http_optoins: unknown key; did you mean 'http_options'?" in refusal(wrong)


def test_whoever_deploys_is_told_to_check_first() -> None:
    from ftray.cli.commands.artefacts import serve

    root = Path(__file__).parents[2]
    for text in ((root / "README.md").read_text(encoding="utf-8"), serve.__doc__ or "", EXAMPLE):
        assert "serve deploy" in text
        assert "--check" in text


def test_the_endpoint_on_kubernetes_says_where_the_admin_key_goes() -> None:
    """Without one Prometheus is refused there."""
    text = (Path(__file__).parents[2] / "cluster" / "kuberay" / "rayservice.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(text)["spec"]["serveConfigV2"]
    assert parse_serve(config, "rayservice").config.admin_key_sha256 is None
    filled = config.replace("# admin_key_sha256: …", f"admin_key_sha256: {'a' * 64}")
    assert parse_serve(filled, "rayservice").config.admin_key_sha256 == "a" * 64


def test_two_applications_are_refused() -> None:
    raw = yaml.safe_load(SMALL)
    raw["applications"] *= 2
    assert "one application is expected, here are 2" in refusal(yaml.safe_dump(raw))


@pytest.mark.parametrize("text", [SMALL, EXAMPLE], ids=["small", "example"])
def test_ray_takes_the_same_file(text: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    raw = yaml.safe_load(text)
    deployed = ServeDeploySchema.model_validate(raw)
    whole = ServeDeploySchema.model_validate(parse_serve(text, "x").dump())  # with every default filled in
    for schema in (deployed, whole):
        [application] = schema.applications
        assert application.import_path == "serve.app:build"
        assert parse_args(application.args) == parse_serve(text, "x").config
    assert whole.http_options.host == "127.0.0.1"


def test_build_checks_again_and_the_error_survives_the_way_back() -> None:
    with pytest.raises(ConfigError) as error:
        parse_args({"model": {"path": "embedded"}, "registri": "x"})
    assert "registri: unknown key; did you mean 'registry'?" in str(error.value)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_overrides_reach_both_parts_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(SMALL)
    found = load_serve(file, ["engine.slots=4", "http_options.port=9", "registry=memory://r"])
    assert (found.config.engine.slots, found.http_options.port, found.config.registry) == (4, 9, "memory://r")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_serve(tmp_path / "none.yaml")


def test_local_paths_become_absolute_and_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    config = ServeConfig.model_validate(
        {"model": {"path": "base"}, "registry": "adapters", "tenants": "s3://b/t.yaml", "cache": {"folder": "~/c"}}
    )
    found = with_absolute_paths(config)
    assert found.model.path == str(tmp_path / "base")
    assert found.registry == str(tmp_path / "adapters")
    assert found.tenants == "s3://b/t.yaml"
    assert found.cache.folder == str(Path("~/c").expanduser())
    assert found.name_of_base == "base"
    hub = ServeConfig.model_validate({"model": {"path": "org/name"}})
    assert with_absolute_paths(hub).model.path == "org/name"


def test_every_key_is_documented() -> None:
    def undocumented(schema: dict, name: str) -> list[str]:
        return [f"{name}.{key}" for key, value in schema.get("properties", {}).items() if not value]

    schema = ServeConfig.model_json_schema()
    assert not undocumented(schema, "args")
