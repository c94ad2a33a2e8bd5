"""One thread computes on all processors; the others alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from ftray.model import threads


def test_use_one_is_for_the_calling_thread_alone():
    def computes() -> int:
        torch.ones(64, 64) @ torch.ones(64, 64)
        return torch.get_num_threads()

    def after_use_one() -> int:
        threads.use_one()
        return computes()

    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
            assert one.submit(after_use_one).result() == 1
            assert one.submit(computes).result() == 1
            assert other.submit(computes).result() == 2
        assert computes() == 2
    finally:
        torch.set_num_threads(1)


def test_the_library_that_torch_computes_with_is_found():
    path = threads.openmp()
    assert path is not None
    assert "omp" in path
