"""A shortcut that leaves the base's trajectory is refused before training; a good one is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shortft.assets import asset
from shortft.config import Config
from shortft.errors import UserError
from shortft.faithful import MARGIN, RECORD, jump_errors, require_faithful
from shortft.families.base import Guidance
from shortft.seeds import CHECK, sample_seed
from shortft.shortcut_check import Jumper, measure
from shortft.shortcuts import SHIPPED
from shortft.train import train
from shortft.trainer import Trainer


def shipped_copy(tmp_path: Path, which: str = "guided", **change: Any) -> Config:
    """The embedded model with a copy of a shortcut of its own: a file like any other."""
    path = tmp_path / "mine.safetensors"
    shipped = asset("shortcut", SHIPPED[which])
    shutil.copy(shipped, path)
    shutil.copy(shipped.with_suffix(".json"), path.with_suffix(".json"))
    settings = {"shortcut": str(path), "num_steps": 16, "rank": 2, "tensorboard": False}
    return Config(**{**settings, "output_dir": tmp_path / "run", **change})


@pytest.mark.parametrize(("which", "calls"), [("guided", 22), ("unguided", 25)])
def test_a_good_one_passes_and_is_measured_once(which: str, calls: int, tmp_path: Path):
    trainer = Trainer(shipped_copy(tmp_path, which))
    told: list[str] = []
    require_faithful(trainer, told.append)
    assert f"4 prompts, {calls} network calls each" in told[0]
    kept = json.loads((tmp_path / "run" / RECORD).read_text())
    assert kept["shortcut"] < (1 - MARGIN) * kept["base"] - 0.01
    # One of them runs with the chain's own guidance.
    assert (kept["guided"] == kept["base"]) == (which == "guided")
    require_faithful(trainer, told.append)
    assert len(told) == 2
    (tmp_path / "run" / RECORD).write_text('{"about": ')  # cut off: it is measured again
    require_faithful(trainer, told.append)
    assert len(told) == 4
    told.clear()
    shipped = trainer.config.model_copy(update={"shortcut": which, "output_dir": tmp_path})
    trainer.config = shipped
    require_faithful(trainer, told.append)
    assert told == []


def test_errors_are_those_of_shortft_check(settings: dict[str, Any]):
    """All segments but the first one, against the base under the shortcut's guidance."""
    trainer = Trainer(Config(**settings, shortcut_guidance_scale=3.0))
    jumps = [step for step in trainer.plan(0, 1).steps if step.net == "shortcut"]
    found = jump_errors(trainer, jumps)
    family, nets = trainer.family, trainer.nets
    prompts = [trainer.prompts[i % 3] for i in range(4)]

    measured = measure(
        family,
        [
            Jumper("shortcut", nets.module(jumps[0]), Guidance(3.0)),
            Jumper("base", family.denoiser, Guidance(3.0)),
            Jumper("guided", family.denoiser, nets.guidance),
        ],
        trainer.schedule,
        4,
        family.encode(prompts),
        family.noise([sample_seed(0, CHECK, i) for i in range(4)]),
        nets.guidance,
    )
    expected = [torch.tensor(m.jump_error[1:]).mean() for m in measured]
    for name, error in zip(("shortcut", "base", "guided"), expected, strict=True):
        assert found[name] == pytest.approx(float(error), abs=1e-5, rel=1e-4)


@pytest.mark.parametrize("change", ["noise", "little"])
def test_one_that_lands_hardly_closer_is_refused(tmp_path: Path, change: str):
    """The shipped one under noise as large as its weights' spread, and a twentieth of it."""
    config = shipped_copy(tmp_path, shortcut_scale=0.05 if change == "little" else None)
    if change == "noise":
        generator = torch.Generator().manual_seed(0)
        state = load_file(config.shortcut)
        for weights in state.values():
            noise = torch.randn(weights.shape, generator=generator)
            weights += (noise * weights.float().std()).to(weights.dtype)
        save_file(state, config.shortcut, {"format": "pt"})
    with pytest.raises(UserError, match=r"must stay below 0\.123") as caught:
        require_faithful(Trainer(config), lambda _: None)
    assert "of the base itself by 0.137, and" in str(caught.value)


@pytest.mark.slow
def test_a_lora_that_was_trained_for_other_pictures_is_refused(tmp_path: Path):
    style = train(
        shipped_copy(
            tmp_path,
            method="draft_k",
            reward="symmetry",
            batch_size=2,
            updates=5,
            minutes=None,
            learning_rate=5e-3,
            sample_every=0,
            progress=False,
        )
    )
    for guidance in (None, 3.0):
        config = shipped_copy(
            tmp_path,
            shortcut_guidance_scale=guidance,
            output_dir=tmp_path / "second",
        ).model_copy(update={"shortcut": str(style / "lora_1.safetensors")})
        with pytest.raises(UserError, match="does not preserve the trajectory"):
            require_faithful(Trainer(config), lambda _: None)


def test_the_guided_jump_stands_beside_an_unguided_shortcut(settings: dict[str, Any]):
    told: list[str] = []
    trainer = Trainer(Config(**{**settings, "check_shortcut": True}))
    with pytest.raises(UserError, match=r"by \d.\d+ \(with the chain's guidance by \d.\d+\), and"):
        require_faithful(trainer, told.append)
    calls = 8 + 3 * 3  # the chain's, and three jumpers over three segments
    assert f"{calls} network calls each" in told[0]


def test_a_random_lora_is_refused_unless_it_is_wanted(settings: dict[str, Any], model: Path):
    config = Config(**{**settings, "check_shortcut": True, "updates": 1, "sample_every": 0})
    with pytest.raises(UserError, match="does not preserve the trajectory") as caught:
        train(config)
    told = str(caught.value)
    assert told.startswith(f"--shortcut {config.shortcut}: ")
    assert "--no-check-shortcut" in told
    assert "\n" not in told
    assert not (config.output_dir / "checkpoints").exists()
    # Nothing stands in the way of a second try in the same folder.
    train(Config(**{**config.model_dump(), "check_shortcut": False}))
    assert (config.output_dir / "adapter" / "adapter.json").exists()


def test_it_is_measured_where_it_jumps_and_only_there(settings: dict[str, Any]):
    for change in (
        {"method": "draft_k"},
        {"method_options": {"jump": "ddim"}},
        {"method": "tune_shortcut"},
    ):
        told: list[str] = []
        trainer = Trainer(Config(**{**settings, **change, "check_shortcut": True}))
        require_faithful(trainer, told.append)
        assert told == []
    # LoRAs on whole segments act in the jumps too: the bare shortcut is what is measured.
    options = {"method_options": {"loras": "segment"}, "check_shortcut": True}
    with pytest.raises(UserError, match="does not preserve the trajectory"):
        require_faithful(Trainer(Config(**{**settings, **options})), told.append)
