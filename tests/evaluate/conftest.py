from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest


def references_of(path: Path) -> dict[str, list[str]]:
    """The references of each meaning representation of an E2E file, in order of first appearance."""
    found: dict[str, list[str]] = {}
    with path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["mr"], []).append(row["ref"])
    return found


@pytest.fixture(scope="session")
def e2e_dev(ftray_data) -> list[list[str]]:
    """References of the 547 meaning representations of E2E's development set."""
    return list(references_of(ftray_data / "data/e2e/devset.csv").values())


@pytest.fixture(scope="session")
def e2e_systems(ftray_data) -> list[tuple[list[str], dict[str, float]]]:
    """(answers, what the challenge's own scorer gave them) of ten real systems."""
    folder = ftray_data / "data/e2e/scorer"
    listed = json.loads((folder / "official_scores.json").read_text(encoding="utf-8"))
    return [((folder / s["outputs"]).read_text(encoding="utf-8").splitlines(), s["official"]) for s in listed]
