"""Fixtures for all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def ftray_data() -> Path:
    """The folder of weights and data sets that FTRAY_DATA names; without it the test is skipped."""
    folder = os.environ.get("FTRAY_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("FTRAY_DATA names no folder")
    return Path(folder)
