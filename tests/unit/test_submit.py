"""What travels with a job and what is refused, and what a job ends as. No Ray."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from ftray.cli.main import app, call
from ftray.cli.submit import _parsed
from ftray.errors import FtrayError, UserError
from ftray.jobs.cluster import ConnectionLost, Job, address_of, use_token
from ftray.jobs.luggage import UPLOAD_LIMIT, Luggage
from ftray.jobs.outcome import outcome
from ftray.jobs.package import Package, pack, variables
from ftray.session import beside_the_job
from tests.unit.job_runs import RUN, write


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a run file and its rows."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("FTRAY_REGISTRY", raising=False)
    (folder / "rows.jsonl").write_text('{"text": "a"}\n')
    write(folder / "run.yaml")
    return folder


def with_data(*paths: str, **more: Any) -> dict[str, Any]:
    return {"data": {"sources": [{"path": path, "format": "text"} for path in paths], "max_length": 64, **more}}


def commands() -> dict[str, Any]:
    return typer.main.get_command(app).commands  # type: ignore[attr-defined]


def packed(*arguments: str, upload: bool = False, shared: tuple[str, ...] = ()) -> Package:
    return pack(_parsed(arguments, commands()), Luggage(upload=upload, shared=shared))


def line(package: Package) -> str:
    return package.line.shell(["ftray"])


# ------------------------------------------------------------------------------------------------------------ packing


def test_data_that_are_only_here_are_refused_or_shipped(here: Path) -> None:
    with pytest.raises(UserError, match="on this machine") as refused:
        packed("train", "run.yaml")
    assert refused.value.where == "data.sources.0.path"
    assert "--upload-data" in str(refused.value)
    assert "--shared" in str(refused.value)
    package = packed("train", "run.yaml", upload=True)
    assert line(package) == "ftray train run.yaml"
    assert set(package.luggage.files) == {"rows.jsonl", "run.yaml"}
    assert package.runs == [("a", "s3://bucket/a")]
    package.luggage.lay_out(here / "laid")
    assert (here / "laid/rows.jsonl").read_text() == '{"text": "a"}\n'


def test_paths_outside_the_working_directory_get_a_place_and_the_command_names_it(here: Path) -> None:
    away = here.parent / "away"
    (away / "deep").mkdir(parents=True)
    for name in ("one.jsonl", "deep/two.jsonl"):
        (away / name).write_text('{"text": "b"}\n')
    write(away / "run.yaml", **with_data(str(away / "one.jsonl"), "../away/**/*.jsonl", str(away / "deep")))
    package = packed("train", "../away/run.yaml", "train.steps=2", upload=True)
    words = [word.text for word in package.line.words]
    assert words[0] == "uploaded/4/run.yaml"
    assert words[1:] == [
        "train.steps=2",
        'data.sources.0.path="uploaded/1/one.jsonl"',
        'data.sources.1.path="uploaded/2/**/*.jsonl"',
        'data.sources.2.path="uploaded/3/deep"',
    ]
    assert set(package.luggage.files) == {
        "uploaded/4/run.yaml",
        "uploaded/1/one.jsonl",
        "uploaded/2/one.jsonl",
        "uploaded/2/deep/two.jsonl",
        "uploaded/3/deep/two.jsonl",
    }


def test_what_all_hosts_see_stays_as_it_is(here: Path) -> None:
    rows = str(here / "rows.jsonl")
    write(here / "run.yaml", **with_data(rows, "s3://bucket/x.jsonl", "embedded:cheese/train", "/not/here.jsonl"))
    package = packed("train", "run.yaml", shared=(str(here),))
    assert line(package) == "ftray train run.yaml"
    assert set(package.luggage.files) == {"run.yaml"}
    assert package.luggage.theirs == ["/not/here.jsonl"], "it is told that this is taken as the cluster's"
    with pytest.raises(UserError, match="on this machine"):
        packed("train", "run.yaml", shared=(str(here) + "-not",))


def test_what_is_nowhere_is_refused(here: Path) -> None:
    write(here / "run.yaml", **with_data("nowhere/*.jsonl"))
    with pytest.raises(UserError, match=r"nowhere/\*.jsonl: no file is found here"):
        packed("train", "run.yaml", upload=True)


def test_too_much_is_refused_with_the_sizes(here: Path) -> None:
    with (here / "rows.jsonl").open("wb") as file:
        file.truncate(UPLOAD_LIMIT + 1)
    with pytest.raises(UserError, match=r"100\.0 MiB would travel with the job, and 100 MiB may"):
        packed("train", "run.yaml", upload=True)


def test_a_recipe_stays_a_name(here: Path) -> None:
    package = packed("train", "quickstart-cheese", "output=/nfs/runs/cheese")
    assert line(package) == "ftray train quickstart-cheese output=/nfs/runs/cheese"
    assert not package.luggage.files
    assert package.luggage.theirs == ["/nfs/runs/cheese"]


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        (("train", "run.yaml", "output=runs/{name}"), "output"),
        (("train", "run.yaml", "data.cache=prepared"), "data.cache"),
        (("train", "run.yaml", "logging.mlflow=mlruns"), "logging.mlflow"),
        (("evaluate", "s3://bucket/a", "--to", "results"), "--to"),
        (("evaluate", "s3://bucket/a", "--registry=here"), "--registry"),
        (("generate", "s3://bucket/prompts.csv", "--out", "answers.jsonl"), "--out"),
    ],
)
def test_what_would_be_written_into_the_jobs_own_folder_is_refused(
    arguments: tuple[str, ...], where: str, here: Path
) -> None:
    with pytest.raises(UserError, match="is relative") as refused:
        packed(*arguments, upload=True)
    assert refused.value.where == where
    assert "s3://" in str(refused.value)


def test_a_template_travels_like_the_run_file(here: Path) -> None:
    (here / "chat.jinja").write_text("{{ messages }}")
    write(here / "run.yaml", **with_data("s3://bucket/x.jsonl", chat_template="chat.jinja"))
    assert set(packed("train", "run.yaml").luggage.files) == {"run.yaml", "chat.jinja"}


def test_several_runs(here: Path) -> None:
    for name in ("b", "c"):
        write(here / f"{name}.yaml", name=name, output=f"s3://bucket/{name}", **with_data("rows.jsonl"))
    package = packed("train", "b.yaml", "c.yaml", "train.steps=3", upload=True)
    assert line(package) == "ftray train b.yaml c.yaml train.steps=3"
    assert package.runs == [("b", "s3://bucket/b"), ("c", "s3://bucket/c")]
    write(here / "c.yaml", name="c", output="s3://bucket/c", **with_data(str(here / "rows.jsonl")))
    with pytest.raises(UserError, match="keys count for all runs"):
        packed("train", "b.yaml", "c.yaml", upload=True)


def test_a_search_brings_its_run(here: Path) -> None:
    (here / "bases").mkdir()
    write(here / "bases/run.yaml", **with_data("rows.jsonl", held_out_fraction=0.5))
    search = {"name": "s", "run": "bases/run.yaml", "space": {"train.learning_rate": {"choice": [1e-3, 2e-3]}}}
    (here / "search.yaml").write_text(yaml.safe_dump(search | {"output": "s3://bucket/s"}))
    package = packed("tune", "search.yaml", "samples=2", upload=True)
    assert line(package) == "ftray tune search.yaml samples=2"
    assert set(package.luggage.files) == {"search.yaml", "bases/run.yaml", "rows.jsonl"}
    assert package.runs == [("s", "s3://bucket/s")]
    with pytest.raises(UserError, match="on this machine"):
        packed("tune", "search.yaml")


def test_prompts_and_systems(here: Path) -> None:
    out = ["--out", "s3://bucket/answers.jsonl", "--base=org/model", "--adapter", "anna/cheese"]
    with pytest.raises(UserError, match="on this machine"):
        packed("generate", "rows.jsonl", *out)
    package = packed("generate", "rows.jsonl", *out, "--chat", upload=True)
    assert line(package) == (
        "ftray generate rows.jsonl --out s3://bucket/answers.jsonl --base org/model --adapter anna/cheese --chat"
    )
    assert not package.runs
    assert line(packed("evaluate", "s3://b/a", "https://host/v1#m", "limit=3")) == (
        "ftray evaluate s3://b/a 'https://host/v1#m' limit=3"
    )


def test_an_endpoint(here: Path) -> None:
    args = {"model": {"path": "embedded"}, "registry": "s3://bucket/adapters", "tenants": "tenants.yaml"}
    file = {"applications": [{"import_path": "serve.app:build", "args": args}]}
    (here / "serve.yaml").write_text(yaml.safe_dump(file))
    (here / "tenants.yaml").write_text("tenants: {}\n")
    with pytest.raises(UserError, match=r"tenants\.yaml is on this machine"):
        packed("serve", "serve.yaml")
    assert set(packed("serve", "serve.yaml", upload=True).luggage.files) == {"serve.yaml", "tenants.yaml"}
    with pytest.raises(UserError, match="is relative"):
        packed("serve", "serve.yaml", "registry=adapters", upload=True)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "no such file"),
        ("http_options: {port: 9000}\n", "applications"),
        ("applications: []\n", "applications"),
        ("applications: [{import_path: 'serve.app:build'}]\n", "args"),
        ("applications: [{import_path: 'serve.app:build', args: {registry: s3://b/r}}]\n", "model"),
        ("applications: [{import_path: 'serve.app:build', args: {model: {path: embedded}, slots: 3}}]\n", "slots"),
    ],
)
def test_an_endpoint_that_is_none_is_told_with_place_and_key(
    text: str | None, told: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (here / "serve.yaml").write_text(text)
    assert call(["submit", "--dry-run", "--", "serve", "serve.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: serve.yaml: ")
    assert told in error


@pytest.mark.parametrize("words", [("serve", "a.yaml", "b.yaml"), ("tune", "a.yaml", "b.yaml")])
def test_one_file_where_one_is_taken(words: tuple[str, ...], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = {"model": {"path": "embedded"}}
    file = {"applications": [{"import_path": "serve.app:build", "args": args}]}
    (here / "a.yaml").write_text(yaml.safe_dump(file))
    assert call(["submit", "--dry-run", "--", *words]) == 2
    assert "one is taken" in capsys.readouterr().err


def test_other_commands_and_wrong_words_are_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["submit", "--", "publish", "runs/a"]) == 2
    assert "no job for a cluster" in capsys.readouterr().err
    assert call(["submit", "--", "train", "run.yaml", "--nope"]) == 2
    assert "--nope" in capsys.readouterr().err
    assert call(["submit", "--", "train", "run.yaml", "train.stepps=3"]) == 2
    assert "did you mean 'steps'" in capsys.readouterr().err


def test_a_dry_run_shows_what_would_be_sent(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["submit", "--dry-run", "--json", "--upload-data", "--", "train", "run.yaml"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["entrypoint"] == "ftray train run.yaml"
    assert shown["files"] == ["rows.jsonl", "run.yaml"]
    assert shown["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "600"}
    assert call(["submit", "--dry-run", "--with-ftray", "--upload-data", "--", "train", "run.yaml"]) == 0
    assert "python -m ftray.cli.main train run.yaml" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------ secrets


def test_variables_of_the_run_file_go_along_but_secrets_do_not(here: Path) -> None:
    text = yaml.safe_dump(RUN | with_data("${BUCKET}/x.jsonl", cache="${CACHE:-s3://bucket/c}"))
    (here / "run.yaml").write_text(text + "# ${HF_TOKEN} ${MIRROR} ${UNSET:-x}\n")
    os.environ["BUCKET"] = "s3://bucket"
    try:
        package = packed("train", "run.yaml")
    finally:
        del os.environ["BUCKET"]
    environment = {"BUCKET": "s3://bucket", "HF_TOKEN": "x", "MIRROR": "https://me:pass@host", "OTHER": "1"}
    found, theirs = variables(package, ["OTHER", "MORE=2"], environment)
    assert found == {"BUCKET": "s3://bucket", "OTHER": "1", "MORE": "2"}
    assert theirs == ["HF_TOKEN", "MIRROR"]
    for asked in ("HF_TOKEN", "WANDB_API_KEY=abc", "MIRROR"):
        with pytest.raises(UserError, match="looks like a secret") as refused:
            variables(package, [asked], environment)
        assert "abc" not in str(refused.value)
    with pytest.raises(UserError, match="the environment has no NOT_SET"):
        variables(package, ["NOT_SET"], environment)


def test_a_secret_in_the_command_is_refused_and_not_repeated(here: Path) -> None:
    with pytest.raises(UserError, match="looks like a secret") as refused:
        packed("train", "run.yaml", "logging.mlflow=https://me:hunter2secret@host", upload=True)
    assert "hunter2" not in str(refused.value)


def test_credentials_in_an_output_are_refused_and_not_repeated(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They come from a variable, and would stand in the job's metadata, filled in."""
    monkeypatch.setenv("PW", "hunter2")
    write(here / "run.yaml", output="s3://me:${PW}@bucket/{name}", **with_data("s3://bucket/x.jsonl"))
    for more in ([], ["--json"]):
        assert call(["submit", "--dry-run", *more, "--", "train", "run.yaml"]) == 2
        told = "".join(capsys.readouterr())
        assert "output of a: s3://***@bucket/a: credentials stand in this URI" in told
        assert "AWS_PROFILE" in told
        assert "hunter2" not in told


@pytest.mark.parametrize(
    "text",
    [
        "path: https://me:${PW}@host/x.jsonl",
        "path: https://${PW:-nobody}@host/${PLAIN}.jsonl",
        "path: https://host/x.jsonl?token=${PW}",
        "headers: {Authorization: Bearer ${PW}}",
    ],
)
def test_a_variable_among_credentials_is_a_secret_whatever_it_is_called(text: str, here: Path) -> None:
    package = Package(_parsed(["train", "run.yaml", "name=${PLAIN}"], commands()), Luggage(), texts=[text])
    environment = {"PW": "hunter2", "PLAIN": "a"}
    assert variables(package, [], environment) == ({"PLAIN": "a"}, ["PW"])
    with pytest.raises(UserError, match="looks like a secret"):
        variables(package, ["PW"], environment)


def test_variables_of_the_job_are_not_given_twice() -> None:
    job = {"runtime_env": {"env_vars": {"HF_HOME": "/nfs/hf"}}, "metadata": {}}
    environment = {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(job)}
    assert beside_the_job({"HF_HOME": "/nfs/hf", "FTRAY_X": "1"}, environment) == {"FTRAY_X": "1"}
    assert beside_the_job({"HF_HOME": "/nfs/hf"}, {}) == {"HF_HOME": "/nfs/hf"}


# ---------------------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("given", "environment", "address"),
    [
        (None, {}, "http://127.0.0.1:8265"),
        ("head", {}, "http://head:8265"),
        ("head:9000", {}, "http://head:9000"),
        ("http://head:8265/", {"RAY_ADDRESS": "http://other:8265"}, "http://head:8265"),
        (None, {"RAY_API_SERVER_ADDRESS": "https://ray.example", "RAY_ADDRESS": "http://x"}, "https://ray.example"),
        (None, {"RAY_ADDRESS": "http://head:8265"}, "http://head:8265"),
        (None, {"RAY_ADDRESS": "10.0.0.1:6379"}, "http://127.0.0.1:8265"),
    ],
)
def test_addresses(given: str | None, environment: dict[str, str], address: str) -> None:
    assert address_of(given, environment) == address


@pytest.mark.parametrize("given", ["ray://head:10001", "http://"])
def test_no_address(given: str) -> None:
    with pytest.raises(UserError, match="over HTTP"):
        address_of(given, {})


def test_where_nothing_listens_it_is_told_within_seconds(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started = time.process_time()
    assert call(["submit", "-a", "http://127.0.0.1:9", "--upload-data", "--", "train", "run.yaml"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: http://127.0.0.1:9: no Ray job server answers here: Connection refused")
    assert "8265" in told
    assert call(["runs", "list", "-a", "http://127.0.0.1:9"]) == 2
    assert time.process_time() - started < 5


def test_tokens(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("abc\n")
    environment = {"RAY_AUTH_TOKEN": "other"}
    use_token(str(file), environment)
    assert environment == {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)}
    file.write_text(" \n")
    with pytest.raises(UserError, match="is empty"):
        use_token(str(file), {})
    with pytest.raises(UserError, match="cannot be read"):
        use_token(str(tmp_path / "none"), {})


# ------------------------------------------------------------------------------------------------------------ outcomes


@pytest.mark.parametrize(
    ("status", "exit_code", "expected", "told"),
    [
        ("SUCCEEDED", 0, 0, "finished"),
        ("STOPPED", None, 75, "was stopped"),
        ("FAILED", 75, 75, "was stopped"),
        ("FAILED", 2, 2, "a mistake in what was given"),
        ("FAILED", 3, 3, "goes on from the last commit"),
        ("FAILED", 1, 1, "unexpected error"),
        ("FAILED", 127, 127, "--with-ftray"),
        ("FAILED", -9, 137, "SIGKILL"),
        ("FAILED", 143, 143, "SIGTERM"),
        ("FAILED", None, 3, "did not run: no working_dir"),
        ("FAILED", 42, 42, "exit code 42"),
    ],
)
def test_exit_codes_come_through(status: Any, exit_code: int | None, expected: int, told: str) -> None:
    found = outcome(Job("a-1", status, exit_code=exit_code, message="no working_dir\n"))
    assert found.exit_code == expected
    assert told in found.text


def test_errors_know_their_exit_codes() -> None:
    assert issubclass(ConnectionLost, FtrayError)
    assert ConnectionLost("x").exit_code == 3
