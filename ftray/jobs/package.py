"""What a command becomes on a cluster: its words, the files that travel with it, what is known of its run.

    line = CommandLine.parse(["train", "run.yaml"], takes_value)
    package = pack(line, Luggage())

The command's own files (run file, search file, chat template) always travel; data as `Luggage` says. Everything that
can be wrong is told here, before anything is sent.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftray.config import Run, Source, load_run, recipe_names
from ftray.config.reading import override, parse_yaml, validated
from ftray.config.search import Search, load_search, search_recipe_names
from ftray.errors import ConfigError, UserError
from ftray.jobs.commandline import CommandLine, Word
from ftray.jobs.luggage import Luggage, local_path
from ftray.manifest import read_text
from ftray.redact import redact
from ftray.session import names_a_secret

_OUTPUT = "write to storage that all hosts share: {key}=s3://bucket/{name}, or an absolute path on NFS"
_VARIABLE = re.compile(r"\$\{([A-Za-z_]\w*)(?::-[^}]*)?\}")
REGISTRY = "FTRAY_REGISTRY"


@dataclass
class Package:
    line: CommandLine
    luggage: Luggage
    runs: list[tuple[str, str]] = field(default_factory=list)
    """(name, folder) of the runs that the command trains; a folder is filled by one job at a time."""
    texts: list[str] = field(default_factory=list)
    """Files whose `${NAME}` are filled in on the cluster."""

    @property
    def name(self) -> str:
        """The run's, or the command with what it is about."""
        if self.runs:
            return self.runs[0][0]
        about = self.line.positionals[0].text if self.line.positionals else ""
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(about).stem).strip("-._")
        return f"{self.line.name}-{stem}" if stem else self.line.name


def pack(line: CommandLine, luggage: Luggage) -> Package:
    """Make `line` ready for a cluster, in place. Raises UserError for what is wrong or only on this machine."""
    if line.name not in _PACKERS:
        raise UserError(f"ftray {line.name} is no job for a cluster", hint=f"these are: {', '.join(_PACKERS)}")
    package = Package(line, luggage)
    _PACKERS[line.name](package)
    for word in line.words:
        if redact(word.text) != word.text:
            raise _secret(redact(word.text))
    for name, folder in package.runs:  # with the variables of its file filled in
        if (shown := redact(folder)) != folder:
            raise ConfigError(
                "credentials stand in this URI, and Ray shows the folders of a job's runs to everybody",
                where=f"output of {name}: {shown}",
                hint="write the URI without them; every host of the cluster brings its own, from its role, its profile"
                "\n    (AWS_PROFILE) or its environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)",
            )
    return package


def variables(
    package: Package, asked: Iterable[str], environment: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """(variables that go with the job, names of those that its files mention and the cluster must bring itself).

    Those that run files mention and `asked` (`NAME` or `NAME=VALUE`) go along, but nothing that may be a secret: Ray
    shows a job's variables, and writes them to its logs. Raises UserError for a secret that was asked for."""
    found: dict[str, str] = {}
    theirs = []
    texts = [*package.texts, *package.line.overrides]
    credentials = {name for text in texts for name in _among_credentials(text)}
    for name in sorted({name for text in texts for name in _VARIABLE.findall(text)} & environment.keys()):
        if name in credentials or is_secret(name, environment[name]):
            theirs.append(name)
        else:
            found[name] = environment[name]
    for item in asked:
        name, equals, value = item.partition("=")
        if not equals and name not in environment:
            raise UserError(f"the environment has no {name}", where="--env")
        value = value if equals else environment[name]
        if name in credentials or is_secret(name, value):
            raise _secret(f"--env {name}")
        found[name] = value
    return found, theirs


def is_secret(name: str, value: str) -> bool:
    return names_a_secret(name) or redact(value) != value


def _among_credentials(text: str) -> set[str]:
    """Variables that stand where a secret stands, as in `https://me:${PW}@host` or `?token=${T}`, whatever they are
    called: with a mark in the place of each, these are the marks that `redact` takes out."""
    marks = {name: f"variable_{i:06}_" for i, name in enumerate(_VARIABLE.findall(text))}
    marked = _VARIABLE.sub(lambda match: marks[match[1]], text)
    left = redact(marked)
    return {name for name, mark in marks.items() if left.count(mark) < marked.count(mark)}


def _secret(where: str) -> UserError:
    return UserError(
        "this looks like a secret, and Ray shows a job's command and variables to everybody and logs them",
        where=where,
        hint="give it to the cluster's hosts instead: a Kubernetes Secret as variables of head and workers, a file with"
        " mode 600,\n    an instance's role; ftray's workers take it from there",
    )


# ----------------------------------------------------------------------------------------------------------- commands


def _train(package: Package) -> None:
    """`train RUN… key=value…` and `data RUN key=value…`."""
    line = package.line
    words = line.positionals
    for word in words:
        run = load_run(word.text, line.overrides)
        if line.name == "train":
            package.runs.append((run.name, run.folder))
        changed = _paths_of_run(run, package.luggage)
        if changed and len(words) > 1:
            raise ConfigError(
                f"{', '.join(changed)} would have another place on the cluster, and keys count for all runs",
                where=word.text,
                hint="name data by a path below the working directory, or submit the runs one by one",
            )
        for key, value in changed.items():
            line.override(_assign(key, value))
        word.text = _own_file(word.text, "run.yaml", recipe_names(), package)
        _output(run.folder, "output", run.name, package.luggage)


def _tune(package: Package) -> None:
    line = package.line
    word = _only(line, "SEARCH")
    search = load_search(word.text, line.overrides)
    package.runs.append((search.name, search.folder))
    for key, value in _paths_of_search(search, package.luggage).items():
        line.override(_assign(f"overrides.{key}", value))
    word.text = _own_file(word.text, "search.yaml", search_recipe_names(), package)
    if isinstance(search.run, str):
        place = _own_file(search.run, "run.yaml", recipe_names(), package)
        if place != search.run:
            line.override(_assign("run", place))
    _output(search.folder, "output", search.name, package.luggage)


def _evaluate(package: Package) -> None:
    line, luggage = package.line, package.luggage
    systems = line.positionals
    for word in systems:
        word.text = _system(word.text, "SYSTEM", package)
    for option in ("--like",):
        for word in line.option(option):
            word.text = _system(word.text, option, package)
    for word in line.option("--general"):
        word.text = luggage.add_input(word.text, "--general")
    for word in line.option("--to"):
        _output(word.text, "--to", "evaluation", luggage)
    _registry(package)


def _generate(package: Package) -> None:
    line, luggage = package.line, package.luggage
    prompts = _only(line, "PROMPTS")
    prompts.text = luggage.add_input(prompts.text, "PROMPTS")
    for word in line.option("--out"):
        _output(word.text, "--out", "answers.jsonl", luggage)
    for option in ("--adapter", "--base"):
        for word in line.option(option):
            word.text = _system(word.text, option, package)
    for word in line.option("--chat-template"):
        word.text = luggage.add_file(word.text) if os.path.isfile(word.text) else word.text
    _registry(package)


def _serve(package: Package) -> None:
    """The file is known to be right; see `ftray.cli.submit`. What it means belongs to a higher floor."""
    line, luggage = package.line, package.luggage
    word = _only(line, "SERVE.yaml")
    raw = parse_yaml(read_text(word.text), word.text)
    for item in line.overrides:
        override(raw, item if item.split(".")[0].split("=")[0] in _RAYS else f"applications.0.args.{item}")
    args = raw["applications"][0]["args"]
    changed = {"model.path": (args["model"]["path"], luggage.add_if_here(args["model"]["path"], "model.path"))}
    if args.get("registry"):
        _output(args["registry"], "registry", "adapters", luggage)
    if args.get("tenants"):
        changed["tenants"] = (args["tenants"], luggage.add_input(args["tenants"], "tenants"))
    if args.get("chat_template"):
        changed["chat_template"] = (args["chat_template"], _small(args["chat_template"], luggage))
    for key, (old, new) in changed.items():
        if new != old:
            line.override(_assign(key, new))
    word.text = _own_file(word.text, "serve.yaml", [], package)


_RAYS = ("applications", "http_options", "proxy_location", "logging_config")
"""Keys of a SERVE.yaml that overrides name in full; all others are below `args`."""


def _only(line: CommandLine, what: str) -> Word:
    """The one positional. Raises UserError."""
    words = line.positionals
    if len(words) != 1:
        given = f"{', '.join(word.text for word in words)}: one is taken" if words else "none is given"
        raise UserError(f"which {what}? {given}", hint=f"ftray submit … -- {line.name} {what} KEY=VALUE …")
    return words[0]


_PACKERS: dict[str, Callable[[Package], None]] = {
    "train": _train,
    "tune": _tune,
    "evaluate": _evaluate,
    "generate": _generate,
    "serve": _serve,
    "data": _train,
}
COMMANDS = tuple(_PACKERS)


# ------------------------------------------------------------------------------------------------------- what they name


def _paths_of_run(run: Run, luggage: Luggage) -> dict[str, str]:
    """Keys whose paths have another place on the cluster, and those places."""
    places: dict[str, tuple[str, str]] = {
        "model.path": (run.model.path, luggage.add_if_here(run.model.path, "model.path"))
    }
    lists: dict[str, list[Source]] = {"data.sources": run.data.sources, "data.held_out": run.data.held_out}
    if run.evaluate:
        lists["evaluate.rows"] = run.evaluate.rows
    for key, sources in lists.items():
        for i, source in enumerate(sources):
            at = f"{key}.{i}.path"
            add = luggage.add_if_here if source.reader == "datasets" else luggage.add_input
            places[at] = (source.path, add(source.path, at))
    if run.data.chat_template:
        places["data.chat_template"] = (run.data.chat_template, _small(run.data.chat_template, luggage))
    if run.data.cache:
        _output(run.data.cache, "data.cache", "prepared", luggage)
    if run.logging.mlflow and not run.logging.mlflow.startswith(("databricks", "http")):
        _output(run.logging.mlflow, "logging.mlflow", "mlruns", luggage)
    return {key: new for key, (old, new) in places.items() if new not in (old, os.path.normpath(old))}


def _paths_of_search(search: Search, luggage: Luggage) -> dict[str, str]:
    """As `_paths_of_run`, of the run that a search begins with and of what its space may choose."""
    raw = search.raw_run()
    raw["name"], raw["output"] = search.name, search.folder
    changed = _paths_of_run(validated(raw, "the run of the search"), luggage)
    for key, parameter in search.space.items():
        if key.split(".")[-1] not in ("path", "chat_template") and key not in ("data.sources", "data.held_out"):
            continue
        for value in parameter.values or []:
            for path in _strings_of(value):
                if luggage.add_if_here(path, f"space.{key}") != path:
                    raise ConfigError(
                        f"{path} would have another place on the cluster",
                        where=f"space.{key}",
                        hint="name it by a path below the working directory, or by a URI",
                    )
    return changed


def _strings_of(value: Any) -> list[str]:
    """The paths in a value of a space: itself, or under `path` in sources."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [value["path"]] if isinstance(value.get("path"), str) else []
    return [path for item in value for path in _strings_of(item)] if isinstance(value, list) else []


def _own_file(name: str, inside: str, recipes: Iterable[str], package: Package) -> str:
    """A file of the command's own, or the folder that holds it: its place on the cluster. Names and URIs stay."""
    local = local_path(name)
    if local is None or not os.path.exists(local):
        return name  # a recipe's name: the file was loaded before
    if os.path.isdir(local):
        local = os.path.join(local, inside)
    package.texts.append(Path(local).read_text(encoding="utf-8"))
    return package.luggage.add_file(local)


def _small(path: str, luggage: Luggage) -> str:
    """A chat template: it travels, if it is here."""
    local = local_path(path)
    return (
        luggage.add_file(path)
        if local is not None and os.path.isfile(local)
        else luggage.add_input(path, "chat_template")
    )


def _system(name: str, key: str, package: Package) -> str:
    """A run, a folder, a name in a registry, an endpoint. A run's folder is data; a run file travels."""
    local = local_path(name)
    if local is not None and os.path.isfile(local):
        run = load_run(local)
        _output(run.folder, f"output of {name}", run.name, package.luggage)
        return _own_file(name, "run.yaml", [], package)
    return package.luggage.add_if_here(name, key)


def _registry(package: Package) -> None:
    for word in package.line.option("--registry"):
        _output(word.text, "--registry", "adapters", package.luggage)
    if not package.line.option("--registry") and (registry := os.environ.get(REGISTRY)):
        _output(registry, REGISTRY, "adapters", package.luggage)
        package.line.words.append(Word(registry, "--registry", takes_value=True))


def _output(path: str, key: str, name: str, luggage: Luggage) -> None:
    luggage.check_output(path, key, _OUTPUT.format(key=key, name=name))


def _assign(key: str, value: str) -> str:
    return f"{key}={json.dumps(value)}"
