"""Fixtures for all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("ftray", deadline=None)  # a busy machine is slow, not wrong
settings.load_profile("ftray")


@pytest.fixture(scope="session")
def ftray_data() -> Path:
    """The folder of weights and data sets that FTRAY_DATA names (default `../shared`); without it a test is skipped."""
    folder = Path(os.environ.get("FTRAY_DATA", "../shared"))
    if not folder.is_dir():
        pytest.skip(f"FTRAY_DATA: there is no folder {folder}")
    return folder.resolve()
