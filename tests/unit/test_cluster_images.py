"""cluster/docker: images of this version, pinned and staged, with what pyproject.toml says and their commands need."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import tomllib
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ftray import __version__
from tests.unit.cluster import CLUSTER, PROJECT, ROOT, TEXTS, tool

DOCKERFILES = sorted((CLUSTER / "docker").glob("*.Dockerfile"))


# ------------------------------------------------------------------------------------------------------------- versions


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


# ---------------------------------------------------------------------------------------------------------- Dockerfiles


def hadolint(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([tool("hadolint"), "-"], input=text, capture_output=True, text=True)


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


# ---------------------------------------------------------------------------------------------------- what is installed


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


def locked(image: str) -> dict[str, str]:
    """{package: its version} of an image's lock."""
    lines = [line for line in TEXTS[CLUSTER / "docker" / f"{image}.lock"].splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in lines), "a version, and none of one index alone"
    return dict(line.split("==") for line in lines)


def installs(image: str) -> list[Requirement]:
    """What the Dockerfile asks for."""
    extras = re.search(r"^ARG EXTRAS=(.*)$", TEXTS[CLUSTER / "docker" / f"{image}.Dockerfile"], flags=re.M)
    assert extras is not None
    lines = image_requirements()["requirements"](PROJECT, extras.group(1).split(","), image == "serve")
    return [Requirement(line) for line in lines]


def unmet(wanted: Iterable[Requirement], lock: dict[str, str], **environment: str) -> list[str]:
    """Those that have no version in the lock, or another than they take."""
    there = {"python_version": "3.11", "python_full_version": "3.11.9", "sys_platform": "linux", "os_name": "posix"}
    there |= {"platform_system": "Linux", "platform_machine": "x86_64", "implementation_name": "cpython", "extra": ""}
    found = []
    for requirement in wanted:
        version = lock.get(canonicalize_name(requirement.name))
        if requirement.marker is not None and not requirement.marker.evaluate(there | environment):
            continue
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{requirement}: {version}")
    return found


@pytest.mark.parametrize("image", ["train", "serve"])
def test_the_lock_pins_what_the_image_installs(image: str) -> None:
    lock = locked(image)
    assert unmet(installs(image), lock) == []
    assert lock.items() <= locked("train").items(), "both images have the same versions"
    assert {"deepspeed", "optuna"} & lock.keys() == ({"deepspeed", "optuna"} if image == "train" else set())
    text = TEXTS[CLUSTER / "docker" / f"{image}.lock"]
    assert "://" not in text
    made = re.search(r"^# +python cluster/docker/requirements.py (.*) \|$", text, flags=re.M)
    dockerfile = TEXTS[CLUSTER / "docker" / f"{image}.Dockerfile"]
    extras = re.search(r"^ARG EXTRAS=(.*)$", dockerfile, flags=re.M)
    assert made is not None
    assert extras is not None
    assert made.group(1) == f"{'--serve ' if image == 'serve' else ''}--extras {extras.group(1)}"
    assert f"--requirements requirements.txt --constraints {image}.lock" in dockerfile


@pytest.mark.parametrize("image", ["train", "serve"])
def test_the_lock_has_what_its_packages_need(image: str) -> None:
    """As far as they are installed here in these versions."""
    lock, looked = locked(image), 0
    wanted = {canonicalize_name(r.name): set(r.extras) for r in installs(image)}
    for name, version in lock.items():
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if distribution.version.split("+")[0] != version:
            continue
        looked += 1
        needs = [Requirement(line) for line in distribution.requires or []]
        for extra in ["", *wanted.get(name, ())]:
            assert unmet(needs, lock, extra=extra) == [], f"{name}[{extra}]"
    assert looked > 30, "the tests' own environment has much of it"


def test_what_a_lock_lacks_is_found() -> None:
    wanted = installs("train")
    lock = locked("train")
    assert unmet(wanted, lock | {"torch": "2.12.0"}) == ["torch==2.13.0: 2.12.0"]
    assert unmet(wanted, {name: v for name, v in lock.items() if name != "peft"})[0].startswith("peft")


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
