"""Fault drills: `pytest -m faults`. Each takes a minute or more, so a default run skips them."""

from __future__ import annotations

import pytest


def pytest_runtest_setup(item: pytest.Item) -> None:
    asked = item.config.getoption("-m") or ""
    if "faults" not in asked or "not faults" in asked:
        pytest.skip("a fault drill: -m faults runs it")
