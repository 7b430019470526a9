"""Checkpoints are whole or passed over."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from shortft import checkpoint
from shortft.checkpoint import load_latest, save_checkpoint
from shortft.errors import UserError


def save(root: Path, update: int, keep: int = 2) -> Path:
    tensors = {"lora_1": {"a.weight": torch.full((2, 3), float(update))}}
    return save_checkpoint(root, update, tensors, {"update": update}, keep=keep)


def test_round_trip_and_rotation(tmp_path: Path):
    for update in (1, 2, 3):
        save(tmp_path, update)
    saved, notes = load_latest(tmp_path)
    assert saved.state == {"update": 3}
    assert torch.equal(saved.tensors["lora_1"]["a.weight"], torch.full((2, 3), 3.0))
    assert notes == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["update-000002", "update-000003"]


def test_copies_that_a_user_keeps_beside_them_stay(tmp_path: Path):
    save(tmp_path, 1)
    copies = ["update-000001-good", "update-000001.bak", "update-best"]
    for name in copies:
        shutil.copytree(tmp_path / "update-000001", tmp_path / name)
    for update in (2, 3, 4):
        save(tmp_path, update)
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == sorted([*copies, "update-000003", "update-000004"])
    assert load_latest(tmp_path)[0].state == {"update": 4}


@pytest.mark.parametrize("name", ["lora_1.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, name, damage):
    save(tmp_path, 1)
    victim = save(tmp_path, 2) / name
    data = bytearray(victim.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 0x10
        victim.write_bytes(data)
    elif damage == "truncate":
        victim.write_bytes(data[:-3])
    else:
        victim.unlink()
    saved, notes = load_latest(tmp_path)
    assert saved.state["update"] == 1
    assert len(notes) == 1
    assert "update-000002" in notes[0]


def test_an_unfinished_folder_is_never_a_checkpoint(tmp_path: Path):
    save(tmp_path, 1)
    (tmp_path / ".update-000002.123").mkdir()
    assert load_latest(tmp_path)[0].state["update"] == 1


def test_what_was_written_last_wins_over_what_a_crash_left_hidden(tmp_path: Path):
    save(tmp_path, 3).rename(tmp_path / ".old-update-000003")  # whole, but left behind
    assert load_latest(tmp_path)[0].state["update"] == 3
    save(tmp_path, 2)
    assert load_latest(tmp_path)[0].state["update"] == 2
    hidden = tmp_path / ".old-update-000002"
    save(tmp_path / "other", 2).rename(hidden)
    assert load_latest(tmp_path)[0].path.name == "update-000002"
    shutil.rmtree(tmp_path / "update-000002")
    assert load_latest(tmp_path)[0].path == hidden


def test_a_million_updates_come_after_the_others(tmp_path: Path):
    for update in (999_998, 999_999, 1_000_000):
        save(tmp_path, update)
    assert load_latest(tmp_path)[0].state["update"] == 1_000_000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["update-1000000", "update-999999"]


def test_what_a_crash_left_makes_room_before_the_next_one(tmp_path: Path, monkeypatch):
    left = tmp_path / ".update-000001.99"
    left.mkdir()
    written = checkpoint._write_synced

    def watched(path: Path, data: bytes) -> None:
        assert not left.exists()
        written(path, data)

    monkeypatch.setattr(checkpoint, "_write_synced", watched)
    save(tmp_path, 1)


@pytest.mark.parametrize("name", ["../elsewhere", "/etc/hostname", "pipe"])
def test_a_manifest_names_files_of_its_own_folder_only(tmp_path: Path, name: str):
    save(tmp_path, 1)
    broken = save(tmp_path, 2)
    os.mkfifo(broken / "pipe")  # reading it would wait for ever
    sums = json.loads((broken / "manifest.json").read_text())
    (broken / "manifest.json").write_text(json.dumps({**sums, name: "0" * 64}))
    saved, notes = load_latest(tmp_path)
    assert saved.state["update"] == 1
    assert "is no file of it" in notes[0]


def test_none_is_an_error_not_a_new_run(tmp_path: Path):
    with pytest.raises(UserError, match="no usable checkpoint"):
        load_latest(tmp_path)
    broken = save(tmp_path, 1) / "manifest.json"
    broken.write_text(json.dumps({"state.json": "0" * 64}))
    with pytest.raises(UserError, match="checksum"):
        load_latest(tmp_path)


def test_a_new_checkpoint_replaces_damaged_later_ones(tmp_path: Path):
    """Going back to update 1 past a damaged 4, the next save must not be rotated away."""
    save(tmp_path, 1)
    (save(tmp_path, 4) / "state.json").write_text("{}")
    save(tmp_path, 2, keep=1)
    saved, notes = load_latest(tmp_path)
    assert saved.state["update"] == 2
    assert notes == []


def test_saving_twice_and_leftovers_of_a_crash(tmp_path: Path):
    (tmp_path / ".update-000009.4242").mkdir()
    save(tmp_path, 1)
    save(tmp_path, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["update-000001"]
