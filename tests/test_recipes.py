"""Every named configuration is complete, valid, and says why its values are what they are."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest

from shortft.assets import EMBEDDED, prompts_for
from shortft.cli_options import config_of, settings_in
from shortft.config import Config, load_config
from shortft.recipes import recipe, recipe_names
from shortft.shortcuts import PUBLISHED

NAMES = recipe_names()


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_valid_and_commented(name: str):
    config = load_config(None, recipe(name))
    text = resources.files("shortft.recipes").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# ")
    if config.model != EMBEDDED:
        assert config.output_dir.name == name
        published = PUBLISHED[config.shortcut]
        assert published.steps in (None, config.segments)


def test_the_promised_recipes_exist():
    promised = {"emoji", "sd15-hps", "sd15-pick", "sdxl-hps", "sd3-pick", "flux-hps", "paper"}
    assert promised <= set(NAMES)
    assert {"sd15-hps-24gb", "sdxl-hps-24gb", "sd3-pick-24gb"} <= set(NAMES)


def test_the_papers_recipe_is_the_papers():
    config = load_config(None, recipe("paper"))
    known = {"rank": 128, "segments": 4, "num_steps": 50, "timestep_lora": True, "recompute": False}
    assert {name: getattr(config, name) for name in known} == known
    assert config.method_options == Config().method_options
    assert config.shortcut == "hyper-sd15-4"


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("24gb")])
def test_low_memory_recipes_use_what_saves_memory(name: str):
    config = load_config(None, recipe(name))
    assert config.guidance_grad == "both"  # recomputed, it takes no more than the other
    assert config.recompute
    assert config.encode_ahead
    assert config.accumulation > 1
    assert config.precision == "bf16"
    assert not config.merge


def test_general_prompts_ship_for_other_models():
    training, held_out = prompts_for("owner/name", "train"), prompts_for("owner/name", "held_out")
    assert (len(set(training)), len(set(held_out))) == (600, 100)
    assert not set(training) & set(held_out)
    assert training != prompts_for(EMBEDDED, "train")


def test_a_folder_named_like_a_recipe_does_not_hide_it(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("emoji").mkdir()
    assert config_of(settings_in(Path("emoji")), {}) == load_config(None, recipe("emoji"))
    Path("paper").write_text("rank: 3\n")  # a file goes first
    assert config_of(settings_in(Path("paper")), {}).rank == 3
