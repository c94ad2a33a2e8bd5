"""What an image installs: the dependencies of pyproject.toml, word for word, one a line.

    python requirements.py --extras s3,gcs            # training: all of them
    python requirements.py --serve --extras s3,gcs    # serving: without what only training takes

Serving leaves out what TRAIN_ONLY names; a test holds that no module of the endpoint needs one of them to be imported.
"""

from __future__ import annotations

import argparse
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path

TRAIN_ONLY = ("deepspeed", "datasets", "matplotlib", "tensorboard", "optuna", "py3langid")
"""Of the dependencies, those that the endpoint and `ftray publish`, `adapters` and `serve` never import."""


def requirements(project: dict, extras: Iterable[str], serve: bool) -> list[str]:
    """Lines of a requirements file. Raises SystemExit for an extra that is not in pyproject.toml."""
    optional = project["optional-dependencies"]
    if unknown := [extra for extra in extras if extra not in optional]:
        raise SystemExit(f"no extra {', '.join(unknown)}; there are {', '.join(sorted(optional))}")
    lines = [line for line in project["dependencies"] if not (serve and name_of(line) in TRAIN_ONLY)]
    if serve:  # the parts of Ray that serving uses
        lines = [re.sub(r"^ray\[[^]]*\]", "ray[serve,data]", line) for line in lines]
    else:  # `ray job submit`, the dashboard and its metrics
        lines = [line.replace("ray[", "ray[default,", 1) if name_of(line) == "ray" else line for line in lines]
    lines += [line for extra in extras for line in optional[extra]]
    return list(dict.fromkeys(lines))


def name_of(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match, requirement
    return match.group().lower().replace("_", "-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extras", default="", help="extras of pyproject.toml, with commas between")
    parser.add_argument("--serve", action="store_true", help="leave out what only training takes")
    parser.add_argument("--pyproject", type=Path, default=Path("pyproject.toml"))
    given = parser.parse_args()
    project = tomllib.loads(given.pyproject.read_text(encoding="utf-8"))["project"]
    print("\n".join(requirements(project, [e for e in given.extras.split(",") if e], given.serve)))


if __name__ == "__main__":
    main()
