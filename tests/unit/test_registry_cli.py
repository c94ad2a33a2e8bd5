"""`ftray publish` and `ftray adapters`: what they print, where they look, how they say no."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ftray.cli.main import call
from ftray.registry.store import Registry
from tests.adapters import LLAMA, facts_of, seal, write_adapter
from tests.unit.test_floors import HEAVY, ROOT


@pytest.fixture
def where(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FTRAY_REGISTRY", str(tmp_path / "registry"))
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


def artefact(where: Path, seed: int) -> str:
    """An adapter of the base in `where`; returns its folder."""
    folder = where / f"made-{seed}"
    write_adapter(folder, seed)
    facts = facts_of(folder)
    seal(folder, facts | {"base": facts["base"] | {"path": str(where / "base")}})
    return str(folder)


def told(capsys) -> dict:
    return json.loads(capsys.readouterr().out)


def test_a_life_in_the_registry(where, capsys):
    for seed in (1, 2):
        assert call(["publish", artefact(where, seed), "--as", "anna/cheese", "--json"]) == 0
    second = told_last(capsys)
    assert second["moved"]
    assert second["tenant"] == "anna"
    assert call(["adapters", "list", "--json"]) == 0
    [entry] = told(capsys)["adapters"]
    assert (entry["tenant"], entry["name"], entry["digest"]) == ("anna", "cheese", second["digest"])
    assert call(["adapters", "rollback", "anna/cheese", "--json"]) == 0
    first = told(capsys)["digest"]
    assert first != second["digest"]
    assert call(["adapters", "pin", "anna/cheese", "--hold"]) == 0
    assert "whatever is published" in capsys.readouterr().out
    assert call(["publish", artefact(where, 2), "--as", "anna/cheese"]) == 0
    assert f"held on {first[:12]}" in capsys.readouterr().out
    assert call(["adapters", "show", "anna/cheese"]) == 0
    shown = capsys.readouterr().out
    assert f"version   {first}" in shown
    assert "lora, step 20" in shown
    assert "held, pinned" in shown
    assert call(["adapters", "list", "anna"]) == 0
    assert "held, pinned" in capsys.readouterr().out
    assert call(["adapters", "remove", "anna/cheese", "--all"]) == 2
    assert "pinned" in capsys.readouterr().err
    assert call(["adapters", "unpin", "anna/cheese", "--json"]) == 0
    assert told(capsys) == {
        "tenant": "anna",
        "name": "cheese",
        "digest": first,
        "unpinned": True,
        "means": second["digest"],
    }
    assert call(["adapters", "remove", f"anna/cheese@{second['digest'][:8]}"]) == 2
    assert "what the name means" in capsys.readouterr().err
    assert call(["adapters", "remove", f"anna/cheese@{first[:8]}", "--json"]) == 0
    assert told(capsys)["removed"] == [first]
    assert call(["adapters", "remove", "anna/cheese", "--all", "--json"]) == 0
    assert told(capsys)["removed"] == [second["digest"]]
    assert call(["adapters", "list"]) == 0
    assert capsys.readouterr().out.startswith("no adapters in ")


def told_last(capsys) -> dict:
    return json.loads("{" + capsys.readouterr().out.split("\n{")[-1].removeprefix("{"))


def test_a_name_without_a_tenant_is_of_the_default_one(where, capsys):
    assert call(["publish", artefact(where, 1), "--as", "cheese", "--registry", str(where / "other")]) == 0
    assert Registry(str(where / "other")).resolve("default", "cheese")
    assert call(["adapters", "list", "--json"]) == 0  # FTRAY_REGISTRY's is another
    assert not (where / "registry").exists()


def test_no_registry_is_no_default(where, monkeypatch, capsys):
    monkeypatch.delenv("FTRAY_REGISTRY")
    for command in (["publish", artefact(where, 1), "--as", "x"], ["adapters", "list"], ["adapters", "show", "x"]):
        assert call(command) == 2
        assert "--registry" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["publish", "nowhere", "--as", "x"], "no such run file"),
        (["publish", "{}/made-1", "--as", "../x"], "is no tenant"),
        (["publish", "{}/made-1", "--as", "X"], "is no name"),
        (["publish", "{}/made-1", "--as", "x@abcdef"], "a version has its digest"),
        (["publish", "{}/base", "--as", "x"], "no run.yaml"),
        (["publish", "{}/made-1", "--as", "x", "--base", "nowhere"], "nowhere"),
        (["adapters", "show", "x"], "no such adapter"),
        (["adapters", "rollback", "x"], "no such adapter"),
        (["adapters", "pin", "x"], "no such adapter"),
        (["adapters", "remove", "x"], "a version or the whole name?"),
        (["adapters", "remove", "x@abcdef", "--all"], "a version or the whole name?"),
        (["adapters", "remove", "x@abcdef"], "no such adapter"),
        (["adapters", "list", "A"], "is no tenant"),
        (["adapters", "list", "--registry", "nothing://x"], "no registry can be there"),
    ],
)
def test_mistakes_are_told(where, capsys, arguments, says):
    artefact(where, 1)
    assert call([argument.replace("{}", str(where)) for argument in arguments]) == 2
    assert says in capsys.readouterr().err


def test_a_run_without_an_artefact(where, capsys):
    run = where / "run"
    run.mkdir()
    (run / "run.yaml").write_text(
        f"name: a\nmodel: {{path: embedded}}\nmethod: {{name: lora}}\noutput: {run}\n"
        "data: {sources: [{path: x.jsonl, format: text}]}\ntrain: {steps: 1}\n"
    )
    assert call(["publish", str(run), "--as", "x"]) == 2
    assert "the run is not finished" in capsys.readouterr().err


def test_a_damaged_pointer_is_shown(where, capsys):
    assert call(["publish", artefact(where, 1), "--as", "x"]) == 0
    (where / "registry/default/x/current.json").write_text("{")
    capsys.readouterr()
    assert call(["adapters", "list"]) == 0
    assert "DAMAGED" in capsys.readouterr().out
    assert call(["adapters", "show", "x"]) == 0
    assert "rollback NAME@DIGEST" in capsys.readouterr().out


def test_looking_at_a_registry_imports_nothing_heavy(where):
    code = "import sys; from ftray.cli.main import call; call(['adapters', 'list']); call(['adapters', 'show', 'x']);"
    code += f"assert not {set(HEAVY)} & {{m.split('.')[0] for m in sys.modules}}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["publish", "adapters"])
def test_help(command, capsys):
    assert call([command, "--help"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 8
