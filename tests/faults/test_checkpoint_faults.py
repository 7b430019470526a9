"""Every write can fail, every byte can flip: a whole checkpoint remains, and damage is seen."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shortft.checkpoint import load_latest, save_checkpoint
from shortft.errors import UserError


def save(root: Path, update: int) -> Path:
    tensors = {
        "lora_1": {"a.weight": torch.full((5, 7), float(update))},
        "optimizer_1": {"a/exp_avg": torch.full((5, 7), -float(update))},
    }
    return save_checkpoint(root, update, tensors, {"update": update, "seconds": 0.5}, keep=2)


class Written:
    """A file whose writing and flushing go through a countdown."""

    def __init__(self, file: Any, wrap: Callable[..., Any]) -> None:
        self.file, self.write, self.flush = file, wrap(file.write), wrap(file.flush)

    def __enter__(self) -> Written:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def fileno(self) -> int:
        return int(self.file.fileno())


class Countdown:
    """Lets so many file operations pass, then fails the next one, or that and every later one."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, allowed: int, code: int, *, once: bool
    ) -> None:
        self.left, self.code, self.failed, self.once = allowed, code, False, once
        for place, name in (
            (Path, "mkdir"),
            (Path, "open"),
            (Path, "rename"),
            (os, "fsync"),
            (os, "open"),
        ):
            monkeypatch.setattr(place, name, self.wrap(getattr(place, name)))

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self.left == 0 and not (self.once and self.failed):
                self.failed = True
                raise OSError(self.code, os.strerror(self.code))
            self.left -= self.left > 0
            result = function(*args, **kwargs)
            writes = function.__name__ == "open" and "w" in str(args[1:])
            return Written(result, self.wrap) if writes else result

        return counted


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("update", [3, 2])  # a new one, and the last one once more
@pytest.mark.parametrize("once", [True, False])
def test_when_any_write_fsync_or_rename_fails_a_checkpoint_remains(
    tmp_path: Path, code: int, update: int, once: bool
):
    allowed = 0
    while True:
        root = tmp_path / str(allowed)
        save(root, 1)
        save(root, 2)
        with pytest.MonkeyPatch.context() as patch:
            countdown = Countdown(patch, allowed, code, once=once)
            with contextlib.suppress(UserError):
                save(root, update)
        saved, _ = load_latest(root)
        kept = saved.state["update"]
        assert kept in (2, update)
        assert torch.equal(saved.tensors["lora_1"]["a.weight"], torch.full((5, 7), float(kept)))
        save(root, 4)  # once the disk is mended
        assert load_latest(root)[0].state["update"] == 4
        assert sorted(p.name for p in root.iterdir())[-1] == "update-000004"
        assert not [p for p in root.iterdir() if p.name.startswith(".")]
        if not countdown.failed:
            break
        allowed += 1
    assert allowed >= 19  # four files opened, written, flushed and synced; folders, renames


def test_every_flipped_or_cut_byte_is_seen(tmp_path: Path):
    save(tmp_path / "good", 1)
    whole = save(tmp_path / "good", 2)
    chance = random.Random(0)
    names = sorted(p.name for p in whole.iterdir())
    seen = 0
    for trial in range(200):
        root = tmp_path / "bad"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(tmp_path / "good", root)
        victim = root / whole.name / chance.choice(names)
        data = bytearray(victim.read_bytes())
        if trial % 4 == 3:
            del data[chance.randrange(len(data)) :]
        else:
            data[chance.randrange(len(data))] ^= chance.randrange(1, 256)
        victim.write_bytes(data)
        saved, notes = load_latest(root)
        seen += saved.state["update"] == 1 and len(notes) == 1 and whole.name in notes[0]
    assert seen == 200


def test_a_full_disk_is_one_line_and_the_checkpoint_before_it_loads(small_disk: Path):
    save(small_disk, 1)
    big = {"lora_1": {"a.weight": torch.zeros(300, 300)}}
    with pytest.raises(UserError, match="No space left on device"):
        save_checkpoint(small_disk, 2, big, {"update": 2}, keep=2)
    assert load_latest(small_disk)[0].state["update"] == 1
    save(small_disk, 2)
    assert load_latest(small_disk)[0].state["update"] == 2
