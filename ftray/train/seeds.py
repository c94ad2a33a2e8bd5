"""Seeds of what is drawn at random, as pure functions: nothing to save, nothing to restore."""

from __future__ import annotations

import numpy as np


def mix(*parts: int) -> int:
    """A 63-bit seed of several small numbers, far apart for near ones."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)
