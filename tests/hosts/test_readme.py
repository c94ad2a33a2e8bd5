"""cluster/README.md, "On this machine": typed line by line, as a new user would, it ends in a served adapter."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hosts.conftest import ROOT, SCRIPT

pytestmark = [pytest.mark.hosts, pytest.mark.root, pytest.mark.timeout(3000)]
LINE_SECONDS = 1500
NAME = f"r{os.getpid() % 10**7}"


def lines() -> list[str]:
    text = (ROOT / "cluster" / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^## On this machine$.*?^```sh\n(.*?)^```$", text, flags=re.S | re.M)
    assert block is not None
    return block.group(1).splitlines()


@pytest.fixture
def typed(tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Runs a line in a shell, in a folder of its own that has `cluster/`; gives what it printed. It is root already;
    its hosts have a name of their own, and are gone in the end."""
    (tmp_path / "cluster").symlink_to(ROOT / "cluster")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "FTRAY_"))}
    environment |= {"FTRAY_HOSTS": NAME, "PYTHONPATH": str(ROOT), "PATH": path}

    def run(line: str) -> str:
        line = line.replace("sudo $(which python)", sys.executable)
        done = subprocess.run(
            ["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=LINE_SECONDS
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    try:
        yield run
    finally:
        subprocess.run([sys.executable, str(SCRIPT), "--name", NAME, "down"], check=True, capture_output=True)


def test_the_page_ends_in_a_trained_published_and_served_adapter(typed: Callable[[str], str], tmp_path: Path) -> None:
    printed = [(line, typed(line)) for line in lines()]
    for run in ("quickstart-cheese", "quickstart-restaurant"):
        assert (tmp_path / "runs" / run / "artefact" / "ftray.json").is_file()
    base, adapter = (json.loads(text) for line, text in printed if " curl " in line)
    assert (base["model"], adapter["model"]) == ("base", "cheese")
    untaught, taught = (answer["choices"][0]["message"]["content"] for answer in (base, adapter))
    assert "Halloumi" in taught
    assert any(word in taught for word in ("bless", "friend", "master")), "the voice of the rows that it was trained on"
    assert taught != untaught
    (shown,) = (text for line, text in printed if line.endswith(" status"))
    assert shown.count("alive") == 2
    assert printed[-1][0].endswith(" down")
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert f"{NAME}-" not in listed
