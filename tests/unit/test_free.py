"""What memory is free: of the machine, and of a container."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftray.model import free
from ftray.model.free import free_memory

GIB = 1 << 30


@pytest.fixture
def cgroup(tmp_path) -> Path:
    """A container's limit: 8 GiB, of which 6 are taken, 5 of them by files, of which 4 are in shared memory."""
    (tmp_path / "memory.max").write_text(f"{8 * GIB}\n")
    (tmp_path / "memory.current").write_text(f"{6 * GIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon {GIB}\nfile {5 * GIB}\nshmem {4 * GIB}\n")
    return tmp_path


def test_rays_object_store_is_no_page_cache(cgroup, monkeypatch):
    monkeypatch.setattr(free.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 64 * GIB}))
    assert free_memory(cgroup) == 3 * GIB
    (cgroup / "memory.max").write_text("max\n")
    assert free_memory(cgroup) == 64 * GIB


def test_free_memory_knows_the_containers_limit(tmp_path: Path) -> None:
    machine = free_memory(tmp_path)
    assert machine > 0
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(tmp_path) > 1 << 20
    for name, text in (("max", "3000000\n"), ("current", "2500000\n"), ("stat", "anon 5\nfile 1000000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert free_memory(tmp_path) == 1_500_000
