"""README: its commands exist with their options, its run file is valid, its paths and recipes are there."""

from __future__ import annotations

import re
import shlex
import stat
from pathlib import Path
from typing import get_args

import pytest
import typer

from ftray import errors
from ftray.cli.main import app
from ftray.config import Method, load_run, parse_run, recipe_names
from ftray.config.creation import creation_names
from ftray.config.reading import search_recipe_names
from ftray.config.search import load_search, parse_search
from ftray.tune.space import draw

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)
SHELL = [line for language, text in BLOCKS if language == "sh" for line in text.splitlines()]
SPANS = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```$", "", README, flags=re.S | re.M))
YAML = [text for language, text in BLOCKS if language == "yaml"]
SEARCHES = [text for text in YAML if "\nspace:" in text]
RUN_FILE, *ADDITIONS = [text for text in YAML if text not in SEARCHES]


def _commands() -> list[str]:
    """Every `ftray …` that the page tells to type, one each, redirections left out."""
    parts = [part.strip() for line in [*SHELL, *SPANS] for part in line.split("&&")]
    return sorted({part.split(" > ")[0] for part in parts if part.startswith("ftray ")})


def test_the_page_tells_commands():
    assert {"ftray quickstart", "ftray recipes"} <= set(_commands())
    assert len(_commands()) >= 8


@pytest.mark.parametrize("line", _commands())
def test_a_command_exists_with_its_options(line):
    name, *arguments = shlex.split(line)[1:]
    group = typer.main.get_command(app)
    command = group.get_command(None, name)  # type: ignore[attr-defined]
    assert command is not None, f"no such command: {line}"
    context = command.make_context(name, arguments)  # raises for an unknown option
    if name in ("check", "data", "train") and context.params.get("run") not in (None, "RUN"):
        parse_run(RUN_FILE, "README", context.params["overrides"] or [])
    if name == "recipes" and context.params.get("name"):
        assert context.params["name"] in [*recipe_names(), *creation_names()]


def test_every_command_is_on_the_page():
    group = typer.main.get_command(app)
    told = {line.split()[1] for line in _commands()}
    assert set(group.list_commands(None)) <= told  # type: ignore[attr-defined, arg-type]


def test_every_command_has_the_options_that_all_have():
    def leaves(group, name=""):
        for own in group.list_commands(None):
            command = group.get_command(None, own)
            yield from leaves(command, f"{own} ") if hasattr(command, "commands") else [(f"{name}{own}", command)]

    lacking = {
        name: missing
        for name, command in leaves(typer.main.get_command(app))
        if (missing := {"--json", "--verbose"} - {option for p in command.params for option in p.opts})
    }
    assert not lacking


def test_what_is_said_of_nf4_is_so():
    from ftray.config.methods import LOW_RANK, _EitherBase

    for kind in get_args(get_args(Method)[0]):
        name = get_args(kind.model_fields["name"].annotation)[0]
        takes = f"method={{name: {name}, quantization: nf4}}"
        if issubclass(kind, _EitherBase):
            assert parse_run(RUN_FILE, "README", [takes]).method.quantized
        else:
            assert issubclass(kind, LOW_RANK) or name in ("full", "freeze")


def test_the_run_file_is_valid_and_leaves_out_nothing_it_names():
    run = parse_run(RUN_FILE, "README")
    assert run.method.name == "qlora"
    assert [source.format.name for source in run.data.sources] == ["messages", "prompt_completion"]


def test_what_may_be_added_to_the_run_file_is_valid():
    for text in ADDITIONS:
        assert parse_run(f"{RUN_FILE}\n{text}", "README", ["method={name: full}"])


def test_searches_are_valid_and_so_are_their_runs():
    assert SEARCHES
    for text in SEARCHES:
        search = parse_search(text, "README")
        for index in range(16):
            search.run_of(draw(search, index), index)
    for line in _commands():
        name, *arguments = shlex.split(line)[1:]
        if name == "tune" and arguments[0] != "SEARCH":
            overrides = arguments[1:]
            if arguments[0] in search_recipe_names():
                load_search(arguments[0], overrides)
            else:
                parse_search(SEARCHES[0], "README", overrides)


def test_the_memory_figures_are_those_of_the_plan():
    from tests.bench.memory_figures import tables

    assert tables() in README


def test_every_recipe_is_told_and_exists():
    section = README.split("### Recipes")[1].split("\n## ")[0]
    told = set(re.findall(r"`([a-z0-9.-]+)`", section.split("\n\n", 2)[1]))
    assert told == set(recipe_names())
    for name in told:
        assert load_run(name).name


def test_methods_and_exit_codes_are_those_of_the_code():
    section = README.split("## Methods")[1].split("\n## ")[0]
    names = {get_args(m.model_fields["name"].annotation)[0] for m in get_args(get_args(Method)[0])}
    assert set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", section, re.M)))) == names
    codes = set(map(int, re.findall(r"^\| (\d+) \|", README.split("| exit code |")[1].split("\n\n")[0], re.M)))
    assert codes == {value for name, value in vars(errors).items() if name.startswith("EXIT_")}


def _tree() -> list[str]:
    """Paths of the annotated tree: two spaces a level."""
    block = README.split("## The tree")[1].split("```")[1]
    paths: list[str] = []
    above: list[str] = []
    for line in block.strip("\n").splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        above = [*above[:depth], line.split()[0].rstrip("/")]
        paths.append("/".join(above))
    return paths


def test_the_trees_paths_exist():
    missing = [path for path in _tree() if not (ROOT / path).exists()]
    assert missing == []
    assert len(_tree()) > 15


def test_every_package_is_in_the_tree():
    packages = {p.parent.relative_to(ROOT).as_posix() for p in (ROOT / "ftray").glob("*/__init__.py")}
    tests = {p.relative_to(ROOT).as_posix() for p in (ROOT / "tests").iterdir() if p.is_dir() and any(p.glob("*.py"))}
    assert {p for p in packages | tests if not p.endswith("__pycache__")} <= set(_tree())


def test_pictures_and_links_are_there_and_small():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if not target.startswith("https://"):
            assert (ROOT / target).is_file(), target
            assert (ROOT / target).stat().st_size <= 200 * 1024


def test_the_extras_exist():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    told = set(re.findall(r"\.\[(\w+)\]", README))
    assert {"test", "mlflow"} <= told <= set(extras)


def test_ci_runs_what_the_page_says():
    ci = ROOT / ".ci" / "run"
    assert ci.stat().st_mode & stat.S_IXUSR
    [install, test] = next(line for line in SHELL if "[test]" in line).split(" && ")
    lines = ci.read_text(encoding="utf-8").splitlines()
    assert install in lines
    assert [line for line in lines if line.split(" || ")[0] == test]
