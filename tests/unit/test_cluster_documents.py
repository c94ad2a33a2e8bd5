"""The documents of cluster/: every link, command, file and recipe that they name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.unit.cluster import CLUSTER, COMMANDS, ROOT, TEXTS, anchor

DOCUMENTS = [CLUSTER / "README.md", CLUSTER / "RUNBOOK.md"]


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
