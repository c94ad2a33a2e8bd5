"""cluster/local/hosts.py, as far as it needs no hosts; those are in tests/hosts."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import pytest

from tests.unit.cluster import CLUSTER


@pytest.fixture
def hosts() -> dict[str, object]:
    return runpy.run_path(str(CLUSTER / "local" / "hosts.py"))


def test_the_token_belongs_to_who_called_sudo(
    hosts: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root makes it, and `eval "$(sudo … env)"` has that user's own shell read it."""
    owner = (12345, 23456) if os.geteuid() == 0 else (os.getuid(), os.getgid())
    monkeypatch.setenv("SUDO_UID", str(owner[0]))
    monkeypatch.setenv("SUDO_GID", str(owner[1]))
    token = tmp_path / "token"
    hosts["write_token"](token)  # type: ignore[operator]
    found = token.stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (*owner, 0o600)
    assert len(token.read_text()) == 64
    monkeypatch.delenv("SUDO_UID")
    hosts["write_token"](tmp_path / "roots")  # type: ignore[operator]
    assert (tmp_path / "roots").stat().st_uid == os.geteuid()
