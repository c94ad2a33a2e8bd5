"""Which threads of a process compute with several of OpenMP's.

Each thread that computes on all processors keeps OpenMP's threads of its own. Where they are more than the processors,
libgomp no longer lets them wait awake for the next product but puts them to sleep after each (measured on two cores: 50
ms of a pass of 110 through the embedded base). So one thread computes, and others do what little they have to alone.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch


def use_one() -> None:
    """What the calling thread computes from now on it computes alone. Other threads keep what they have."""
    torch.get_num_threads()  # else torch would set this thread's number when it first computes
    if (path := openmp()) is not None:
        _library(path).omp_set_num_threads(1)


def openmp() -> str | None:
    """Path of the OpenMP library that torch has loaded; None where that cannot be told."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = (line.split(maxsplit=5)[-1] for line in lines)
    return next((p for p in paths if Path(p).name.startswith(("libgomp", "libiomp", "libomp"))), None)


@functools.cache
def _library(path: str) -> ctypes.CDLL:
    return ctypes.CDLL(path)
