"""cluster/ but for Kubernetes: every file is what its reader takes, and says what pyproject.toml says.

cluster/kuberay has tests of its own in test_cluster_kubernetes.py, cluster/local in tests/hosts.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import shutil
import signal
import stat
import subprocess
import sys
import time
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from ftray import __version__
from ftray.cli.main import app
from ftray.config import load_run
from ftray.config.search import load_search
from ftray.errors import ConfigError
from serve.config import parse_serve

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
COMMANDS = set(typer.main.get_command(app).list_commands(None))  # type: ignore[attr-defined, arg-type]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TEXTS = {
    file: file.read_text(encoding="utf-8")
    for file in sorted(CLUSTER.rglob("*"))
    if file.is_file() and "local" not in file.relative_to(CLUSTER).parts and "__pycache__" not in file.parts
}
DOCUMENTS = [CLUSTER / "README.md", CLUSTER / "RUNBOOK.md"]


def pinned(name: str) -> str:
    return next(line for line in PROJECT["dependencies"] if re.match(rf"{name}\b", line))


# ----------------------------------------------------------------------------------------------------------- versions


def test_every_ray_version_is_that_of_pyproject() -> None:
    low, high = re.findall(r"[<>]=?(\d+)\.(\d+)", pinned("ray"))
    found = [v for text in TEXTS.values() for v in re.findall(r"rayVersion: \"?([\d.]+)", text)]
    assert found
    for version in found:
        assert low <= tuple(version.split(".")[:2]) < high


def test_every_image_of_ours_is_of_this_version_and_has_a_dockerfile() -> None:
    used = {
        (f, i) for f, text in TEXTS.items() for i in re.findall(r"ghcr\.io/your-team/(ftray-[\w-]+(?::[\w.-]+)?)", text)
    }
    assert {file.parent.name for file, _ in used} >= {"docker", "kuberay", "ray-up"}
    for file, image in used:
        name, _, tag = image.partition(":")
        assert tag == __version__, f"{file}: {image}"
        assert (CLUSTER / "docker" / f"{name.removeprefix('ftray-')}.Dockerfile").is_file()


def test_the_python_of_both_images_is_the_one_that_is_tested() -> None:
    train = TEXTS[CLUSTER / "docker" / "train.Dockerfile"]
    serve = TEXTS[CLUSTER / "docker" / "serve.Dockerfile"]
    wanted = re.search(r"ARG PYTHON_VERSION=([\d.]+)", train)
    base = re.search(r"ARG PYTHON_TAG=(\d+\.\d+)", serve)
    mypy = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]["python_version"]
    assert wanted is not None
    assert base is not None
    assert wanted.group(1) == base.group(1) == mypy
    assert PROJECT["requires-python"] == f">={mypy}"


# -------------------------------------------------------------------------------------------------------------- images

DOCKERFILES = sorted((CLUSTER / "docker").glob("*.Dockerfile"))


def hadolint(text: str) -> subprocess.CompletedProcess[str]:
    beside = Path(sys.executable).with_name("hadolint")
    tool = str(beside) if beside.exists() else shutil.which("hadolint")
    if tool is None:
        pytest.skip("there is no hadolint here: pip install -e '.[test]'")
    return subprocess.run([tool, "-"], input=text, capture_output=True, text=True)


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda f: f.name)
def test_dockerfiles_pass_hadolint(file: Path) -> None:
    found = hadolint(TEXTS[file])
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize(
    ("was", "now"),
    [("WORKDIR /home/ftray", "WORKDIR home"), ("USER 1000:1000", "USERS 1000"), ("ENTRYPOINT [", "ENTRYPOINT tini [")],
)
def test_a_wrong_dockerfile_is_refused(was: str, now: str) -> None:
    text = TEXTS[DOCKERFILES[0]]
    assert was in text
    assert hadolint(text.replace(was, now)).returncode != 0


def stages(text: str) -> list[list[str]]:
    """[lines of a stage, …], continued lines joined."""
    lines = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.M)).splitlines()
    found: list[list[str]] = []
    for line in lines:
        if line.startswith("FROM "):
            found.append([])
        if found and line.strip():
            found[-1].append(line.strip())
    return found


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda f: f.name)
def test_images_are_pinned_staged_and_not_root(file: Path) -> None:
    text = TEXTS[file]
    for name, value in re.findall(r"^ARG (\w+_(?:TAG|VERSION))=(.*)$", text, flags=re.M):
        assert re.match(r"\d+\.\d+", value), f"{name} is not a version"
    parts = stages(text)
    assert len(parts) == 3, "uv, build, and what is shipped"
    assert all(re.match(r"FROM \S+:\$\{\w+\} AS \w+$", part[0]) for part in parts)
    last = parts[-1]
    assert "USER 1000:1000" in last
    assert not any(line.startswith("USER") for line in last[last.index("USER 1000:1000") + 1 :])
    assert not any(re.search(r"g\+\+|ninja|-dev", line) for line in last if line.startswith("COPY --from=uv"))
    copied = [word for line in re.findall(r"^COPY (?!--from)(.*)$", text, flags=re.M) for word in line.split()[:-1]]
    for source in (word for word in copied if not word.startswith("--")):
        assert (ROOT / source).exists(), source
        assert admitted(source), f".dockerignore leaves {source} out"


def admitted(source: str) -> bool:
    """Whether .dockerignore lets a path in."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    return "*" in lines and any(
        source == line[1:] or source.startswith(f"{line[1:]}/") for line in lines if line[0] == "!"
    )


def test_secrets_and_runs_stay_out_of_the_images() -> None:
    assert admitted("ftray/cli/main.py")
    assert not any(admitted(path) for path in ("runs/x", ".git/config", "tests/unit", ".env", "cluster/kuberay"))


@cache
def image_requirements() -> dict[str, Any]:
    return runpy.run_path(str(CLUSTER / "docker" / "requirements.py"))


def test_images_install_what_pyproject_says() -> None:
    requirements = image_requirements()["requirements"]
    train = requirements(PROJECT, ["s3"], False)
    assert {re.sub(r"\[.*?\]", "", line) for line in train} == {
        re.sub(r"\[.*?\]", "", line) for line in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["s3"]]
    }
    serve = requirements(PROJECT, [], True)
    assert not any(line.startswith("deepspeed") for line in serve)
    left_out = set(image_requirements()["TRAIN_ONLY"])
    names = {image_requirements()["name_of"](line) for line in PROJECT["dependencies"]}
    assert left_out <= names, "what is left out is a dependency"
    assert {image_requirements()["name_of"](line) for line in serve} == names - left_out
    with pytest.raises(SystemExit, match="no extra s4"):
        requirements(PROJECT, ["s4"], False)
    for file in DOCKERFILES:
        given = re.search(r"^ARG EXTRAS=(.*)$", TEXTS[file], flags=re.M)
        assert given is not None
        assert set(given.group(1).split(",")) <= PROJECT["optional-dependencies"].keys()


def test_nothing_of_the_endpoint_needs_what_its_image_leaves_out() -> None:
    """Every import, lazy ones too, of the modules that `ftray serve`, `publish` and `adapters` reach."""
    absent = {"py3langid", "datasets", "deepspeed", "matplotlib", "tensorboard", "optuna"}
    assert absent == set(image_requirements()["TRAIN_ONLY"])
    started = [
        "serve.app",
        "serve.local",
        "ftray.cli.main",
        "ftray.cli.serve",
        "ftray.cli.publish",
        "ftray.cli.adapters",
    ]
    at_once = reached(started, lazily=False)
    assert {"ftray.engine.engine", "ftray.registry.store", "serve.replica"} <= at_once
    for module in at_once:
        tops = {name.split(".")[0] for name in imports(module, lazily=False)}
        assert not tops & absent, module


def reached(modules: list[str], *, lazily: bool) -> set[str]:
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module in found or module.split(".")[0] not in ("ftray", "serve") or source_of(module) is None:
            continue
        found.add(module)
        # what `serve` and its engine import inside functions is needed too
        inside = lazily or module.startswith(("serve.", "ftray.engine", "ftray.registry"))
        waiting += imports(module, lazily=inside)
    return found


def source_of(module: str) -> Path | None:
    path = ROOT / module.replace(".", "/")
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def imports(module: str, *, lazily: bool) -> set[str]:
    """Modules that `module` imports, at its top or anywhere."""
    import ast

    file = source_of(module)
    assert file is not None
    tree = ast.parse(file.read_text(encoding="utf-8"))
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(tree) if lazily else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            whole = ".".join(part for part in (base, node.module) if part)
            found |= {whole, *(f"{whole}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize(
    ("given", "added"),
    [
        (["-D__AVX512__", "a.cpp"], "-march=x86-64-v4"),
        (["-march=native", "-D__AVX256__", "a.cpp"], "-march=x86-64-v3"),
        (["a.cpp"], None),
    ],
)
def test_the_compiler_of_the_image_names_no_processor(given: list[str], added: str | None) -> None:
    if os.uname().machine != "x86_64":
        pytest.skip("the wrapper changes nothing on other machines")
    environment = {**os.environ, "FTRAY_CXX": "echo"}
    out = subprocess.run(
        [CLUSTER / "docker" / "g++", *given], env=environment, capture_output=True, text=True, check=True
    )
    assert out.stdout.split() == [*given, *([added] if added else [])]


# -------------------------------------------------------------------------------------------------------------- ray up

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


# --------------------------------------------------------------------------------------------------------------- Serve


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


# ----------------------------------------------------------------------------------------------------------- run files


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
    job = yaml.safe_load(TEXTS[CLUSTER / "kuberay" / "rayjob-train.yaml"])
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert run.workers.count == group["replicas"] * int(limits["nvidia.com/gpu"])
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


# --------------------------------------------------------------------------------------------------------------- Slurm

SLURM = sorted((CLUSTER / "slurm").iterdir())


def shellcheck(*given: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    beside = Path(sys.executable).with_name("shellcheck")
    tool = str(beside) if beside.exists() else shutil.which("shellcheck")
    if tool is None:
        pytest.skip("there is no shellcheck here: pip install -e '.[test]'")
    return subprocess.run([tool, *given], input=text, capture_output=True, text=True, cwd=CLUSTER / "slurm")


@pytest.mark.parametrize("file", [*SLURM, CLUSTER / "docker" / "g++"], ids=lambda f: f.name)
def test_scripts_pass_bash_and_shellcheck(file: Path) -> None:
    subprocess.run(["bash", "-n", file], check=True)
    found = shellcheck("-x", str(file))
    assert found.returncode == 0, found.stdout


def test_a_wrong_script_is_refused() -> None:
    text = TEXTS[CLUSTER / "slurm" / "train.sbatch"]
    assert shellcheck("-", text=text.replace('"$code"', "$code").replace('cd "$SLURM', "cd $SLURM")).returncode != 0
    assert subprocess.run(["bash", "-n"], input=text + "\nif", text=True, capture_output=True).returncode != 0


def test_the_options_given_to_ray_are_known_to_it() -> None:
    """`ray symmetric-run` hands what it does not know to `ray start`, which runs on other machines, late."""
    scripts = importlib.util.find_spec("ray.scripts.scripts")
    assert scripts is not None
    assert scripts.origin is not None
    known = set(re.findall(r'"(--[a-z-]+)', Path(scripts.origin).read_text(encoding="utf-8")))
    text = TEXTS[CLUSTER / "slurm" / "symmetric.sh"]
    command = re.search(r"ray symmetric-run (.*?) -- ", text.replace("\\\n", " "), flags=re.S)
    assert command is not None
    options = set(re.findall(r"(--[a-z-]+)", command.group(1)))
    assert {"--address", "--min-nodes"} < options
    assert options - {"--address", "--min-nodes"} <= known
    assert not options & {"--head", "--node-ip-address", "--port", "--block"}
    drain = set(re.findall(r"ray drain-node ([^;]*);", "\n".join(TEXTS.values())))
    assert drain
    assert {option for each in drain for option in re.findall(r"(--[a-z-]+)", each)} <= known


FAKES = {
    "scontrol": 'if [ "$1" = show ]; then echo here; else echo "$@" >> "$LOG"; fi',
    "hostname": "echo 127.0.0.1 192.0.2.7",
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "ray": 'while [ "$1" != -- ]; do shift; done; shift; "$@"',
    "serve": "exit 0",
    "ftray": """
trap 'echo committed >> "$LOG"; exit 75' TERM
echo "$@ address=$RAY_ADDRESS mode=$RAY_AUTH_MODE" >> "$LOG"
if [ "$1" = serve ]; then exit 0; fi
if [ "$2" = broken ]; then exit 3; fi
while :; do sleep 0.1; done
""",
}
"""What a machine with Slurm has, as far as the scripts look at it."""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    for name, text in FAKES.items():
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/usr/bin/env bash\n{text}\n")
        file.chmod(0o755)
    return {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "LOG": str(tmp_path / "log"),
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "here",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "FTRAY_SLURM": str(CLUSTER / "slurm"),
    }


@pytest.mark.parametrize(
    ("script", "sent", "code", "again"),
    [
        ("train", signal.SIGUSR1, 0, True),
        ("train", signal.SIGUSR2, 75, False),
        ("tune", signal.SIGUSR1, 0, True),
        ("serve", signal.SIGUSR2, 75, False),
    ],
)
def test_a_job_that_is_told_to_go_commits_and_comes_again(
    slurm: dict[str, str], script: str, sent: signal.Signals, code: int, again: bool
) -> None:
    log = Path(slurm["LOG"])
    job = subprocess.Popen(["bash", CLUSTER / "slurm" / f"{script}.sbatch", "my.yaml", "a=b c"], env=slurm)
    try:
        deadline = time.monotonic() + 60
        while not log.exists() or not log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.3)
        job.send_signal(sent)
        assert job.wait(60) == code
    finally:
        job.kill()
    lines = log.read_text().splitlines()
    assert lines[0] == f"{script} my.yaml a=b c address=192.0.2.7:6379 mode=token"
    assert ("committed" in lines) == (script != "serve")
    assert ("requeue 17" in lines) == again
    token = Path(slurm["HOME"]) / ".ray" / "auth_token"
    assert re.fullmatch(r"[0-9a-f]{64}", token.read_text())
    assert stat.S_IMODE(token.stat().st_mode) == 0o600


def test_a_job_that_fails_says_so_and_does_not_come_again(slurm: dict[str, str]) -> None:
    done = subprocess.run(["bash", CLUSTER / "slurm" / "train.sbatch", "broken"], env=slurm)
    assert done.returncode == 3
    assert "requeue" not in Path(slurm["LOG"]).read_text()


# -------------------------------------------------------------------------------------------------------- observability

OBSERVABILITY = CLUSTER / "observability"
DASHBOARDS = [OBSERVABILITY / "training.json", ROOT / "serve" / "grafana.json"]
METRIC = re.compile(r"\b((?:ray|ftray)_[a-z0-9_]+)\b")


@cache
def known_metrics() -> frozenset[str]:
    """Series that somebody makes: ours by the code that counts, Ray's by the names in its own dashboards and code."""
    names: set[str] = set()
    for name in re.findall(r'"(ftray_[a-z_]+)"', (ROOT / "serve" / "metrics.py").read_text(encoding="utf-8")):
        names |= {name, *(f"{name}_{end}" for end in ("total", "bucket", "count", "sum"))}
    text = (ROOT / "ftray" / "train" / "gauges.py").read_text(encoding="utf-8")
    names |= {f"ray_{name}" for name in re.findall(r'"(ftray_train_[a-z_]+)"', text)}
    ray = importlib.util.find_spec("ray")
    assert ray is not None
    assert ray.submodule_search_locations is not None
    folder = Path(ray.submodule_search_locations[0]) / "dashboard" / "modules" / "metrics" / "dashboards"
    for file in folder.glob("*.py"):
        names |= set(re.findall(r"\b(ray_[a-z0-9_]+)\b", file.read_text(encoding="utf-8")))
    # written by the GCS, in C++, and read by Ray Data
    collector = Path(ray.submodule_search_locations[0]) / "data" / "_internal" / "usage" / "collector.py"
    names |= set(re.findall(r"\b(ray_[a-z_]+_total)\b", collector.read_text(encoding="utf-8")))
    agent = folder.parents[1] / "reporter" / "reporter_agent.py"
    names |= {f"ray_{name}" for name in re.findall(r'"(node_[a-z_]+)"', agent.read_text(encoding="utf-8"))}
    return frozenset(names)


def expression_errors(expression: str) -> str | None:
    import promql_parser

    plain = re.sub(r"\$\{?\w+\}?", "x", re.sub(r"\$__(rate_interval|range)\b", "5m", expression))
    try:
        promql_parser.parse(plain)
    except ValueError as error:
        return f"{expression}: {error}"
    unknown = set(METRIC.findall(expression)) - known_metrics()
    return f"{expression}: nobody makes {', '.join(sorted(unknown))}" if unknown else None


def dashboard_errors(board: dict[str, Any]) -> list[str]:
    """What Grafana would not show, or show on top of each other."""
    found = [f"no {key}" for key in ("title", "uid", "schemaVersion", "panels", "templating") if key not in board]
    cells: dict[tuple[int, int], str] = {}
    ids: set[int] = set()
    variables = {each["name"] for each in board["templating"]["list"]}
    for panel in board["panels"]:
        title = panel.get("title", "?")
        if unknown := panel.keys() - PANEL_KEYS:
            found.append(f"{title}: {', '.join(sorted(unknown))}")
        if panel.get("type") not in ("row", "stat", "timeseries", "heatmap", "table", "bargauge", "gauge", "barchart"):
            found.append(f"{title}: type {panel.get('type')}")
        if panel.get("id") in ids:
            found.append(f"{title}: id {panel['id']} a second time")
        ids.add(panel.get("id"))
        at = panel["gridPos"]
        for cell in ((x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])):
            if cell in cells or cell[0] >= 24:
                found.append(f"{title}: over {cells.get(cell, 'the edge')}")
                break
            cells[cell] = title
        if panel.get("type") != "row" and not panel.get("targets"):
            found.append(f"{title}: nothing to draw")
        for target in panel.get("targets", []):
            found += [error] if (error := expression_errors(target["expr"])) else []
            used = set(re.findall(r"\$\{?([a-z]\w*)\}?", target["expr"])) - {"__rate_interval", "__range"}
            found += [f"{title}: no variable {name}" for name in sorted(used - variables)]
    return found


PANEL_KEYS = {
    *("type", "title", "description", "datasource", "gridPos", "fieldConfig", "options", "targets", "id", "collapsed"),
    *("panels", "interval", "maxDataPoints", "transformations", "links", "repeat", "pluginVersion"),
}


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda f: f.name)
def test_dashboards_can_be_drawn(file: Path) -> None:
    assert dashboard_errors(json.loads(file.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda b: b.pop("uid"),
        lambda b: b["panels"][1].update(id=b["panels"][2]["id"]),
        lambda b: b["panels"][1].update(typ="stat"),
        lambda b: b["panels"][1].update(type="graphs"),
        lambda b: b["panels"][1]["gridPos"].update(b["panels"][2]["gridPos"]),
        lambda b: b["panels"][1]["targets"][0].update(expr="ray_ftray_train_stepp"),
        lambda b: b["panels"][1]["targets"][0].update(expr="sum(ray_ftray_train_step"),
        lambda b: b["panels"][1]["targets"][0].update(expr='ray_ftray_train_step{run=~"$runs"}'),
    ],
)
def test_a_wrong_dashboard_is_refused(spoil: Any) -> None:
    board = json.loads(TEXTS[OBSERVABILITY / "training.json"])
    spoil(board)
    assert dashboard_errors(board)


def test_the_training_dashboard_draws_all_that_a_run_tells() -> None:
    from ftray.train.gauges import GAUGES, STEP

    drawn = set(METRIC.findall(TEXTS[OBSERVABILITY / "training.json"]))
    assert {f"ray_{name}" for name, _ in [STEP, *GAUGES.values()]} <= drawn


def test_every_gauge_is_of_a_value_that_a_run_tells() -> None:
    from ftray.train.gauges import GAUGES
    from ftray.train.sinks import point_of

    step = point_of(
        dict.fromkeys(
            ("step", "loss", "learning_rate", "grad_norm", "target_tokens_per_second", "seconds", "epoch", "skipped"), 1
        )
        | {"kind": "step"}
    )
    held_out = point_of({"kind": "evaluation", "step": 1, "loss": 1.0})
    assert step is not None
    assert held_out is not None
    assert step.values.keys() | held_out.values.keys() >= GAUGES.keys()


def test_alerts_ask_for_what_exists_and_lead_to_the_runbook() -> None:
    groups = yaml.safe_load(TEXTS[OBSERVABILITY / "alerts.yaml"])["groups"]
    anchors = {anchor(title) for title in re.findall(r"^#+ (.*)$", TEXTS[CLUSTER / "RUNBOOK.md"], flags=re.M)}
    rules = [rule for group in groups for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert expression_errors(rule["expr"]) is None
        assert rule["annotations"].keys() == {"summary", "runbook"}
        file, _, place = rule["annotations"]["runbook"].partition("#")
        assert file == "RUNBOOK.md"
        assert place in anchors


@pytest.mark.parametrize(
    "expression", ["rate(ftray_request_total[5m])", "rate(ftray_requests_total[5m]", "ray_node_mem"]
)
def test_a_wrong_expression_is_refused(expression: str) -> None:
    assert expression_errors(expression)


def test_prometheus_asks_ports_and_labels_that_the_pods_have() -> None:
    config = yaml.safe_load(TEXTS[OBSERVABILITY / "prometheus.yaml"])
    assert config.keys() == {"global", "rule_files", "scrape_configs"}
    assert all((OBSERVABILITY / name).is_file() for name in config["rule_files"])
    known = {
        "job_name",
        "file_sd_configs",
        "static_configs",
        "kubernetes_sd_configs",
        "relabel_configs",
        "authorization",
    }
    for job in config["scrape_configs"]:
        assert job.keys() <= known
    text = TEXTS[CLUSTER / "kuberay" / "rayservice.yaml"]
    assert "name: serve, containerPort: 8000" in text
    assert "name: metrics, containerPort: 8080" in text


# ----------------------------------------------------------------------------------------------------------- documents


def anchor(title: str) -> str:
    """As GitHub makes them."""
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")


def link_errors(file: Path, text: str) -> list[str]:
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target) or target.startswith("local/"):
            continue
        path, _, place = target.partition("#")
        other = (file.parent / path).resolve() if path else file
        if not other.exists():
            found.append(f"{file.name}: no {target}")
        elif place and other.suffix == ".md":
            content = text if other == file else other.read_text(encoding="utf-8")
            if place not in {anchor(title) for title in re.findall(r"^#+ (.*)$", content, flags=re.M)}:
                found.append(f"{file.name}: no {target}")
    return found


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda f: f.name)
def test_every_link_leads_somewhere(file: Path) -> None:
    assert link_errors(file, TEXTS[file]) == []
    assert link_errors(file, "[a](nowhere.md)")
    assert link_errors(file, "[a](#nowhere)")


def commands_of(text: str) -> set[str]:
    """Words behind `ftray` in code."""
    code = re.findall(r"```sh\n(.*?)```", text, flags=re.S) + re.findall(r"`([^`\n]+)`", text)
    return {word for part in code for word in re.findall(r"(?:^|-- |; )ftray ([a-z]+)\b", part, flags=re.M)}


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda f: f.name)
def test_every_command_and_file_of_the_documents_exists(file: Path) -> None:
    named = commands_of(TEXTS[file])
    assert named >= {"train"}
    for command in named:
        assert command in COMMANDS, f"there is no `ftray {command}`"
    for path in re.findall(r"(?<![\w/])cluster/(?!local)[\w./-]*\w", TEXTS[file]):
        assert (ROOT / path).exists(), path


def test_every_recipe_of_the_documents_is_shipped() -> None:
    shipped = {recipe.stem for recipe in (ROOT / "ftray" / "recipes").rglob("*.yaml")}
    named = {
        name for file in DOCUMENTS for name in re.findall(r"\b(quickstart-[a-z]+|llama-[\w.-]*gpu)\b", TEXTS[file])
    }
    assert named
    assert named <= shipped
