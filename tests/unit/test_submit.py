"""What travels with a job and what is refused, what a job ends as, its log through lost connections, and which runs
there are. No Ray."""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from ftray.cli.main import app, call
from ftray.cli.runs import runs_table
from ftray.cli.submit import _parsed
from ftray.errors import FtrayError, RunError, UserError
from ftray.jobs import follow as follow_module
from ftray.jobs.cluster import ConnectionLost, Job, address_of, use_token
from ftray.jobs.follow import Follower, OwnLines
from ftray.jobs.listing import FOLDERS, NAME, RunState, find, folders_in, from_events, is_ours, merged, of_job
from ftray.jobs.luggage import UPLOAD_LIMIT, Luggage
from ftray.jobs.outcome import outcome
from ftray.jobs.package import Package, pack, variables
from ftray.session import beside_the_job
from ftray.train import lease

RUN: dict[str, Any] = {
    "name": "a",
    "model": {"path": "embedded"},
    "method": {"name": "lora", "rank": 4},
    "data": {"sources": [{"path": "rows.jsonl", "format": "text"}], "max_length": 64},
    "train": {"steps": 4},
    "output": "s3://bucket/a",
}


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


def write(file: Path, **changes: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(RUN | changes))


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


# ----------------------------------------------------------------------------------------------------------------- log


class Server:
    """A job server at its edge: each connection shows the log up to where it is cut, and the job ends with the last."""

    address = "http://head:8265"

    def __init__(self, text: str, cuts: list[int], silent: int = 0) -> None:
        self.text, self.cuts, self.silent = text, cuts, silent

    def job(self, job: str) -> Job:
        if self.silent:
            self.silent -= 1
            raise ConnectionLost("connection refused")
        return Job(job, "RUNNING" if self.cuts else "SUCCEEDED", exit_code=None if self.cuts else 0)

    def logs(self, job: str) -> str:
        return self.text

    async def tail(self, job: str) -> AsyncIterator[str]:
        cut = self.cuts.pop(0) if self.cuts else None
        text = self.text[:cut]
        for i in range(0, len(text), 7):
            yield text[i : i + 7]
        if cut is not None:
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow_module, "_LONGEST_PAUSE", 0.01)
    sleep = follow_module.asyncio.sleep
    monkeypatch.setattr(follow_module.asyncio, "sleep", lambda seconds: sleep(min(seconds, 0.01)))


def followed(server: Server, **options: Any) -> tuple[str, list[str], Any]:
    follower = Follower(server, "a-1", **options)  # type: ignore[arg-type]
    follower.start()
    events = [event for event in follower.events(0.05) if event]
    return "".join(what for kind, what in events if kind == "text"), [kind for kind, _ in events], events[-1][1]


def test_a_log_is_whole_and_said_once_through_lost_connections(no_pause: None) -> None:
    text = "".join(f"step {i}\n" for i in range(40))
    shown, kinds, last = followed(Server(text, [10, 10, 33, 200], silent=2))
    assert shown == text
    assert kinds.count("lost") >= 1
    assert last.status == "SUCCEEDED"


def test_a_server_that_stays_away_is_given_up(no_pause: None) -> None:
    _, kinds, last = followed(Server("a\n", [1] * 10_000, silent=10**9), lost_seconds=0.3)
    assert kinds[-1] == "error"
    assert isinstance(last, RunError)
    assert "ftray runs logs -f a-1" in str(last)


def test_rays_own_lines_are_left_out() -> None:
    own = OwnLines()
    log = (
        "2026-11-21 20:00:00,001\tINFO job_manager.py:590 -- Runtime env is setting up.\n"
        "Running entrypoint for job a-1: ftray train run.yaml\n"
        "starting Ray\nRank 0\n"
        "2026-11-21 20:00:00,001\tINFO worker.py:1 -- Connecting to existing Ray cluster at address: 1.2.3.4:6379...\n"
        "2 warnings\nlast"
    )
    shown = "".join(own(log[i : i + 5]) for i in range(0, len(log), 5)) + own.end()
    assert shown == "starting Ray\nRank 0\n2 warnings\nlast"


# --------------------------------------------------------------------------------------------------------------- runs

EVENTS: list[dict[str, Any]] = [
    {"kind": "start", "steps": 40, "step": 0},
    {"kind": "evaluation", "step": 0, "loss": 6.0},
    {"kind": "step", "step": 7, "loss": 2.5},
]


@pytest.mark.parametrize(
    ("more", "held", "state"),
    [
        ([], True, "running"),
        ([], False, "interrupted"),
        ([{"kind": "end", "reason": "finished"}], False, "finished"),
        ([{"kind": "end", "reason": "early stopping"}], False, "finished"),
        ([{"kind": "end", "reason": "stopped"}], False, "stopped"),
        ([{"kind": "end", "reason": "stopped"}], True, "running"),
        ([{"kind": "end", "reason": "stopped"}, {"kind": "start", "steps": 40}], False, "interrupted"),
    ],
)
def test_what_a_folder_says(more: list[dict[str, Any]], held: bool, state: str) -> None:
    found = from_events({"name": "a", "train": {"epochs": 1}}, "runs/a", [*EVENTS, *more], 10.0, held)
    assert (found.state, found.step, found.of, found.loss, found.held_out) == (state, 7, 40, 2.5, 6.0)


def a_lease(folder: Path, *, age: float) -> None:
    """Of a process of another machine."""
    told = {"host": "elsewhere", "pid": 1, "born": 1.0, "commanded": False, "beat": time.time() - age}
    (folder / lease.LEASE).write_text(json.dumps(told))


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    assert call(["runs", "list", "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_who_holds_the_lease_is_at_work_however_old_the_metrics_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On an object store they move only when something is committed."""
    write(tmp_path / "a/run.yaml")
    metrics = tmp_path / "a/metrics.jsonl"
    metrics.write_text("".join(json.dumps(event) + "\n" for event in EVENTS))
    assert listed(capsys, str(tmp_path))[0]["state"] == "interrupted", "moved a moment ago, by nobody who is there"
    hour_ago = time.time() - 3600
    os.utime(metrics, (hour_ago, hour_ago))
    for age, state in ((5, "running"), (3000, "interrupted")):
        a_lease(tmp_path / "a", age=age)
        (found,) = listed(capsys, str(tmp_path))
        assert (found["state"], found["step"]) == (state, 7)
        assert found["age_seconds"] > 3500


def test_a_search_is_at_work_while_its_lease_lives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search = tmp_path / "s"
    search.mkdir()
    (search / "search.yaml").write_text("name: s\nsamples: 8\n")
    (search / "search.jsonl").write_text("{}\n")
    assert listed(capsys, str(tmp_path))[0]["state"] == "interrupted"
    a_lease(search, age=5)
    assert listed(capsys, str(tmp_path))[0]["state"] == "running"
    (search / "outcome.json").write_text("{}\n")
    assert listed(capsys, str(tmp_path))[0]["state"] == "finished"
    (search / "outcome.json").write_text("{")
    (found,) = listed(capsys, str(tmp_path))
    assert (found["name"], found["state"]) == ("s", "?")
    assert "JSONDecodeError" in found["unread"]


def test_runs_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        write(tmp_path / name / "run.yaml", name=name)
    (tmp_path / "notes").mkdir()
    lines = [json.dumps(event) for event in [*EVENTS, {"kind": "end", "reason": "finished"}]]
    (tmp_path / "a/metrics.jsonl").write_text("\n".join(lines) + '\n{"kind": "st')
    assert folders_in(str(tmp_path)) == [f"{tmp_path}/a", f"{tmp_path}/b"]
    assert folders_in(str(tmp_path / "a")) == [str(tmp_path / "a")]
    assert call(["runs", "list", str(tmp_path)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].split() == ["run", "state", "command", "step", "loss", "moved", "folder"]
    assert told[2].split()[:5] == ["a", "finished", "train", "7/40", "2.5000"]
    assert told[3].split()[1] == "interrupted"
    assert call(["runs", "list", "--json", str(tmp_path / "a")]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["state"] == "finished"
    assert found["age_seconds"] < 600
    assert call(["runs", "show", str(tmp_path / "a")]) == 0
    assert "7/40" in capsys.readouterr().out
    assert call(["runs", "list", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err


def job(number: int, status: Any, folder: str = "s3://b/a", **more: Any) -> Job:
    metadata = {NAME: "a", FOLDERS: json.dumps([["a", folder]]), "ftray.command": "ftray train run.yaml"}
    return Job(f"a-{number}", status, started=1000.0 * number, metadata=metadata, **more)


def test_jobs_and_folders_are_told_once() -> None:
    folder = RunState("a", "interrupted", step=7, of=40, loss=2.5, folder="s3://b/a", changed=2500.0)
    running = merged([job(2, "RUNNING"), job(1, "STOPPED", ended=1500.0)], [folder])
    assert [(r.state, r.job, r.step, r.command) for r in running] == [("running", "a-2", 7, "train")]
    failed = merged([job(2, "FAILED", exit_code=3, ended=2600.0)], [folder])
    assert failed[0].state == "failed"
    assert "failed (3)" in runs_table(failed, 5000.0)
    gone_on = RunState("a", "finished", step=40, of=40, folder="s3://b/a", changed=9000.0)
    assert merged([job(2, "FAILED", exit_code=3, ended=2600.0)], [gone_on])[0].state == "finished"
    held = replace(folder, state="running")  # by somebody without a job; on an object store nothing has moved yet
    after = [merged([job(2, "FAILED", exit_code=3, ended=2600.0)], [held], now)[0].state for now in (2610.0, 3000.0)]
    assert after == ["failed", "running"]
    both = merged([job(1, "SUCCEEDED", ended=1500.0)], [RunState("z", "running", folder="z", changed=9000.0)])
    assert [r.name for r in both] == ["z", "a"]


def test_plain_jobs_and_those_of_others() -> None:
    plain = Job("raysubmit_1", "FAILED", "ftray train run.yaml", exit_code=75)
    assert is_ours(plain)
    assert [(s.name, s.state, s.command) for s in of_job(plain)] == [("raysubmit_1", "stopped", "train")]
    assert is_ours(Job("x", "RUNNING", "python -m ftray.cli.main tune s.yaml"))
    assert not is_ours(Job("x", "RUNNING", "python train.py --name ftrays"))


def test_a_job_is_found_by_what_it_fills() -> None:
    jobs = [job(2, "RUNNING"), job(1, "STOPPED")]
    for name in ("a", "a-2", "s3://b/a"):
        found = find(name, jobs)
        assert found is not None
        assert found.id == "a-2"
    assert find("a-1", jobs) == jobs[1]
    assert find("b", jobs) is None


class Known:
    """A cluster that knows these jobs."""

    def __init__(self, jobs: list[Job]) -> None:
        self.known = jobs

    def jobs(self) -> list[Job]:
        return self.known

    def job(self, job: str) -> Job:
        return next(found for found in self.known if found.id == job)

    def logs(self, job: str) -> str:
        return f"the log of {job}\n"

    def stop(self, job: str) -> bool:
        self.known = [replace(found, status="STOPPED", ended=1e9) for found in self.known if found.id == job]
        return True


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets `ftray runs` find these jobs."""

    def be(*jobs: Job) -> None:
        cluster = Known(list(jobs))
        monkeypatch.setattr("ftray.cli.runs.Cluster.open", lambda *_: cluster)
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://head:8265")

    return be


def test_a_store_without_a_key_here_is_told_and_hides_nothing_else(
    known: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("s3fs")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    write(tmp_path / "b/run.yaml", name="b")
    bucket = "s3://no-key-for-it"  # fsspec remembers the file systems of others
    known(job(3, "RUNNING", str(tmp_path / "b")), job(2, "RUNNING", f"{bucket}/a"), job(1, "FAILED", f"{bucket}/c"))
    assert call(["runs", "list"]) == 0
    told = capsys.readouterr().out.splitlines()
    rows = {line.split()[-1]: line.split() for line in told[2:5]}
    assert rows[f"{bucket}/a"][:4] == ["a", "running", "train", "?"]
    assert rows[str(tmp_path / "b")][1] == "running"
    assert told[-1].startswith(f"? {bucket}/a and 1 more there cannot be read from here: no credentials were found")
    assert call(["runs", "show", "a-2"]) == 0
    told = capsys.readouterr().out
    assert "no credentials were found" in told
    assert "a-2, RUNNING" in told
    assert call(["runs", "show", f"{bucket}/a"]) == 0
    assert "a-2, RUNNING" in capsys.readouterr().out
    assert call(["runs", "show", f"{bucket}/nobodys"]) == 3
    assert "no credentials were found" in capsys.readouterr().err
    assert call(["runs", "stop", "a-2"]) == 0
    assert "a-2 has ended" in capsys.readouterr().out


def test_a_run_is_known_by_its_file(known: Callable[..., None], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(here / "runs/a")
    write(here / "run.yaml", output=folder)
    write(here / "runs/a/run.yaml", output=folder)
    other = Job("b-1", "RUNNING", started=9e8, metadata=dict(job(9, "RUNNING", "s3://b/b").metadata))
    known(other, job(1, "STOPPED", folder, ended=1500.0))
    for given in ("run.yaml", folder, "a-1"):
        assert call(["runs", "show", "--json", given]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["folder"], found["of_job"]["id"]) == (folder, "a-1")
        assert call(["runs", "logs", given]) == 0
        assert capsys.readouterr().out == "the log of a-1\n"
    write(here / "moved.yaml", output="s3://elsewhere/{name}")
    assert call(["runs", "logs", "moved.yaml"]) == 0
    assert capsys.readouterr().out == "the log of b-1\n", "the newest job of a run of this name"
    search = {"name": "s", "run": "run.yaml", "space": {"train.learning_rate": {"choice": [1e-3, 2e-3]}}}
    more = {"overrides": {"data.held_out_fraction": 0.5}, "output": "s3://b/b"}
    (here / "search.yaml").write_text(yaml.safe_dump(search | more))
    assert call(["runs", "logs", "search.yaml"]) == 0
    assert capsys.readouterr().out == "the log of b-1\n"
    (here / "notes.yaml").write_text("a: 1\n")
    assert call(["runs", "logs", "notes.yaml"]) == 2


def test_errors_know_their_exit_codes() -> None:
    assert issubclass(ConnectionLost, FtrayError)
    assert ConnectionLost("x").exit_code == 3
