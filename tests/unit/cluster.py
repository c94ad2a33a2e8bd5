"""What the tests of cluster/ look at: its files but for cluster/local, which is tested in tests/hosts, and what
pyproject.toml and the command line say."""

from __future__ import annotations

import re
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
import typer

from ftray.cli.main import app

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
COMMANDS = set(typer.main.get_command(app).list_commands(None))  # type: ignore[attr-defined, arg-type]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TEXTS = {
    file: file.read_text(encoding="utf-8")
    for file in sorted(CLUSTER.rglob("*"))
    if file.is_file() and "local" not in file.relative_to(CLUSTER).parts and "__pycache__" not in file.parts
}


def tool(name: str) -> str:
    """The program of that name that was installed with ours, or that the PATH has; without it a test is skipped."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"there is no {name} here: pip install -e '.[test]'")
    return found


def anchor(title: str) -> str:
    """As GitHub makes them."""
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")
