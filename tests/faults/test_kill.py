"""kill -9 at random moments, while saving too: the resumed run equals the uninterrupted one.

SHORTFT_KILLS says how often (default 6; docs/faults.md has the result of 100): one in eight before
the first checkpoint, one in four while a checkpoint is being written (it kills itself before a file
of it), the others at moments after the first. Children are forked from a server that has
imported everything, so that nothing is imported a hundred times.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from shortft import checkpoint
from shortft.checkpoint import any_in
from shortft.config import Config
from shortft.train import train
from test_train import everything

UPDATES = 8
KILLS = int(os.environ.get("SHORTFT_KILLS", "6"))


def run(config: Config, resume: bool, dies_at: int | None) -> None:
    """Train; with `dies_at` only until that file of all its checkpoints is to be written."""
    torch.set_num_threads(1)
    write, files = checkpoint._write_synced, itertools.count(1)

    def deadly(path: Path, data: bytes) -> None:
        if next(files) == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, data)

    checkpoint._write_synced = deadly
    train(config, resume=resume)


@pytest.mark.slow
def test_killed_anywhere_the_resumed_run_is_the_same(settings, tmp_path: Path):
    forked = multiprocessing.get_context("forkserver")
    forked.set_forkserver_preload(["shortft.train", "shortft.families.sd", "shortft.rewards.clip"])
    change = {"updates": UPDATES, "checkpoint_every": 1, "sample_every": 4, "ema": 0.9}

    def start(
        name: str, resume: bool = False, dies_at: int | None = None
    ) -> multiprocessing.process.BaseProcess:
        config = Config(**{**settings, **change, "output_dir": tmp_path / name})
        child = forked.Process(target=run, args=(config, resume, dies_at))
        child.start()
        return child

    start("warm up").join()
    began = time.monotonic()
    child = start("whole")
    wait_for(tmp_path / "whole" / "checkpoints", child)
    first = time.monotonic() - began
    child.join()
    assert child.exitcode == 0
    length = time.monotonic() - began
    expected = everything(tmp_path / "whole")
    files = len(list(max((tmp_path / "whole" / "checkpoints").iterdir()).iterdir()))
    chance = random.Random(0)
    counts = {"before any checkpoint": 0, "later": 0, "in saving": 0, "not in time": 0, "differ": 0}
    for trial in range(KILLS):
        folder = tmp_path / f"trial-{trial}"
        if trial % 4 == 1:
            child = start(folder.name, dies_at=chance.randint(files + 1, files * UPDATES))
            child.join()
        else:
            child = start(folder.name)
            wait_for(folder / "checkpoints", child if trial % 8 else None)
            time.sleep(chance.uniform(0, length - first) if trial % 8 else chance.uniform(0, first))
        if child.is_alive():
            os.kill(child.pid or 0, signal.SIGKILL)
            child.join()
        if child.exitcode == -signal.SIGKILL:
            saved = any_in(folder / "checkpoints")
            counts["later" if saved else "before any checkpoint"] += 1
            counts["in saving"] += bool(unfinished(folder / "checkpoints"))
        else:
            saved = True
            counts["not in time"] += 1
        child = start(folder.name, resume=saved)  # killed before its first checkpoint, it starts
        child.join()
        assert child.exitcode == 0, folder
        counts["differ"] += everything(folder) != expected
        told = ", ".join(f"{what}: {count}" for what, count in counts.items())
        print(f"{trial + 1} of {KILLS} runs; killed {told}", flush=True)
    assert counts["differ"] == 0
    assert counts["in saving"] >= KILLS // 4


def wait_for(checkpoints: Path, child: multiprocessing.process.BaseProcess | None) -> None:
    """Until the first checkpoint is there or the child has ended; without a child, not at all."""
    while child is not None and child.is_alive() and not any_in(checkpoints):
        time.sleep(0.01)


def unfinished(checkpoints: Path) -> list[Path]:
    return list(checkpoints.glob(".update-*"))
