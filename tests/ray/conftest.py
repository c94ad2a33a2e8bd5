"""One local Ray for all tests of this folder."""

from __future__ import annotations

import pytest

from ftray.session import ray_session


@pytest.fixture(scope="session")
def local_ray():
    with ray_session(cpus=4):
        yield
