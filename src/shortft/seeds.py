"""Random numbers as functions of (seed, update, index): the same however a batch is split."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

# Places in the name space of a run's seed, so that no two uses draw the same numbers: noise of
# updates, order of prompts, sample grids, evaluations, re-noised copies, plans, what others draw,
# and the check of a shortcut.
NOISE, PROMPTS, PICTURES, EVALUATION, COPY, PLAN, OTHERS, CHECK = range(1, 9)


def sample_seed(seed: int, *position: int) -> int:
    """A 63-bit seed for one place in a run, such as (update, sample index)."""
    words = np.random.SeedSequence([seed, *position]).generate_state(2, np.uint32)
    return int(words[0]) << 31 ^ int(words[1])


def generator(seed: int, *position: int) -> torch.Generator:
    """A generator for one place in a run."""
    return torch.Generator().manual_seed(sample_seed(seed, *position))


@contextmanager
def given_back() -> Iterator[None]:
    """Leave the global generators of Python, NumPy and torch as they were before."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
