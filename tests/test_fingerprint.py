"""What counts as a change of a local model, and what does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shortft.fingerprint import outline


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model in diffusers' layout in which its user works."""
    place = tmp_path / "model"
    for name in ("unet/config.json", "unet/weights.safetensors", "tokenizer/vocab.json"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(name)
    index = {"unet": ["diffusers", "UNet2DConditionModel"], "tokenizer": ["transformers", "X"]}
    (place / "model_index.json").write_text(json.dumps({"_class_name": "X", **index}))
    return place


@pytest.mark.parametrize(
    "name", ["unet/weights.safetensors", "unet/more.safetensors", "model_index.json"]
)
def test_a_models_own_files_count(folder: Path, name: str):
    before = outline(folder, folder / "runs" / "a")
    (folder / name).write_text("{}")
    assert outline(folder, folder / "runs" / "a") != before


@pytest.mark.parametrize(
    "name",
    [
        "runs/a/adapter.json",
        "runs/b/evaluation.json",
        "runs/shortcut.json",
        "notes.md",
        ".cache/x.json",
    ],
)
def test_what_else_lies_there_does_not(folder: Path, name: str):
    before = outline(folder, folder / "runs" / "a")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("{}")
    assert outline(folder, folder / "runs" / "a") == before


def test_a_model_within_the_output_folder_counts(folder: Path):
    before = outline(folder, folder.parent)
    (folder / "unet" / "weights.safetensors").write_text("others")
    assert outline(folder, folder.parent) != before


@pytest.mark.parametrize("name", ["HPS_v2_compressed.pt", "aesthetic-model.pth", "config.json"])
def test_a_reward_models_folder_has_no_index(tmp_path: Path, name: str):
    (tmp_path / name).write_text("weights")
    before = outline(tmp_path, tmp_path / "runs")
    (tmp_path / name).write_text("others!")
    assert outline(tmp_path, tmp_path / "runs") != before
