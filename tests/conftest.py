"""Fixtures for all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("ftray", deadline=None)  # a busy machine is slow, not wrong
settings.load_profile("ftray")


_ONE_AFTER_ANOTHER = ("browser", "ray")
"""Folders whose tests start several processes each: with `pytest -n 2` they go on one side, others on the other …"""
_BUT = "test_zero"
"""… and this file, which waits for a compiler for the most part, so that both sides take as long."""


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What `pytest -n` may not tear apart: these folders, and any other file."""
    for item in items:
        folder, *_ = item.path.relative_to(Path(__file__).parent).parts
        together = folder in _ONE_AFTER_ANOTHER and item.path.stem != _BUT
        group = "processes" if together else f"{folder}-{item.path.stem}"
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def ftray_data() -> Path:
    """The folder of weights and data sets that FTRAY_DATA names (default `../shared`); without it a test is skipped."""
    folder = Path(os.environ.get("FTRAY_DATA", "../shared"))
    if not folder.is_dir():
        pytest.skip(f"FTRAY_DATA: there is no folder {folder}")
    return folder.resolve()
