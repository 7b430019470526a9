"""kill -9 at random moments, while saving too: the resumed run equals the uninterrupted one.

SHORTFT_KILLS says how often (default 6; docs/faults.md has the result of 100). Children are forked
from a server that has imported everything, so that nothing is imported a hundred times.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from shortft.config import Config
from shortft.train import train

KILLS = int(os.environ.get("SHORTFT_KILLS", "6"))


def run(config: Config, resume: bool) -> None:
    torch.set_num_threads(1)
    train(config, resume=resume)


def state(root: Path) -> dict[str, object]:
    """Everything that decides a run's future, and its log without times and memory."""
    newest = max((root / "checkpoints").glob("update-*"))
    files = sorted([*newest.glob("*.safetensors"), *(root / "adapter").glob("*.safetensors")])
    log = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", "at_seconds", "peak_memory_bytes")
    return {
        "files": {f.name: f.read_bytes() for f in files},
        "log": [{k: v for k, v in row.items() if k not in clock} for row in log],
    }


@pytest.mark.slow
def test_killed_anywhere_the_resumed_run_is_the_same(settings, tmp_path: Path):
    forked = multiprocessing.get_context("forkserver")
    forked.set_forkserver_preload(["shortft.train", "shortft.families.sd", "shortft.rewards.clip"])
    change = {"checkpoint_every": 1, "sample_every": 4, "ema": 0.9}

    def start(name: str, resume: bool = False) -> multiprocessing.process.BaseProcess:
        config = Config(**{**settings, **change, "output_dir": tmp_path / name})
        child = forked.Process(target=run, args=(config, resume))
        child.start()
        return child

    start("warm up").join()
    began = time.monotonic()
    child = start("whole")
    child.join()
    assert child.exitcode == 0
    length = time.monotonic() - began
    expected = state(tmp_path / "whole")
    chance, differ, killed = random.Random(0), 0, 0
    for trial in range(KILLS):
        name = f"trial-{trial}"
        child = start(name)
        time.sleep(chance.uniform(0, 1.05 * length))
        if child.is_alive():
            os.kill(child.pid or 0, signal.SIGKILL)
            killed += 1
        child.join()
        # Killed before its first checkpoint, a run starts anew.
        saved = list((tmp_path / name / "checkpoints").glob("update-*"))
        if not saved:
            hidden = (tmp_path / name / "checkpoints").glob(".*")
            assert all(p.name.startswith(".update-") for p in hidden)
            child = start(f"{name}-anew")
            name = f"{name}-anew"
        else:
            child = start(name, resume=True)
        child.join()
        assert child.exitcode == 0, name
        differ += state(tmp_path / name) != expected
        print(f"{trial + 1} of {KILLS} runs, {killed} killed, {differ} differ", flush=True)
    assert differ == 0
