"""Memory that is still free. No torch, but for a GPU's."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil


def free_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of the host that this process may still take: of the machine, and of its container where that has a
    limit."""
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError):  # no such files, or "max": no limit
        limit = int((cgroup / "memory.max").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        # page cache counts as used there, and goes when it is needed; shared memory, as Ray's store is, stays
        cached = int(stat.get("file", "0")) - int(stat.get("shmem", "0"))
        free = min(free, limit - int((cgroup / "memory.current").read_text()) + cached)
    return free


def free_on(device: Any) -> int | None:
    """The same of a torch device. None: it cannot be told."""
    if device.type == "cpu":
        return free_memory()
    if device.type != "cuda":
        return None
    import torch

    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by the allocator, to be given out
    return torch.cuda.mem_get_info(device)[0] + kept
