"""Fixtures for all tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

_BUSY: Any = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
"""A busy machine is slow, not wrong."""
settings.register_profile("ftray", **_BUSY, derandomize=True, database=None)
settings.register_profile("random", **_BUSY, max_examples=1000, print_blob=True)
settings.load_profile("random" if os.environ.get("FTRAY_RANDOM") else "ftray")


_ONE_AFTER_ANOTHER = ("tests/browser/", "tests/ray/")
"""Folders whose tests start several processes each: with `pytest -n 2` they go on one side, others on the other …"""
_BUT = "tests/ray/test_zero.py"
"""… and this file, which waits for a compiler for the most part, so that both sides take as long."""


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("long") and not os.environ.get("FTRAY_LONG"):
        pytest.skip("many minutes: FTRAY_LONG=1 runs it")
    compute_alone()


def compute_alone() -> None:
    """One thread adds in one order: results are compared bit for bit. And a machine runs several tests at once. Before
    each test and its fixtures: what an earlier one has set does not count."""
    import torch

    torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What `pytest -n` may not tear apart: these folders, and any other file."""
    from xdist.scheduler import LoadFileScheduling

    class Sides(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            together = nodeid.startswith(_ONE_AFTER_ANOTHER) and not nodeid.startswith(_BUT)
            return "processes" if together else super()._split_scope(nodeid)

    return Sides(config, log)


@pytest.fixture(scope="session")
def ftray_data() -> Path:
    """The folder of weights and data sets that FTRAY_DATA names (default `../shared`); without it a test is skipped."""
    folder = Path(os.environ.get("FTRAY_DATA", "../shared"))
    if not folder.is_dir():
        pytest.skip(f"FTRAY_DATA: there is no folder {folder}")
    return folder.resolve()
