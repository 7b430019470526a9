"""The shipped model, its shortcut and scorers: small, quiet, and they do the job."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from shortft.adapter import load_into
from shortft.assets import asset, prompts_for
from shortft.config import Config
from shortft.families import load_family
from shortft.families.base import Guidance
from shortft.networks import ModelNetworks
from shortft.plans import base_plan
from shortft.sampling import Sampler
from shortft.train import train
from shortft.trainer import Trainer


def test_assets_stay_small():
    total = sum(path.stat().st_size for path in asset().rglob("*") if path.is_file())
    assert total <= 30e6


def test_prompt_lists_do_not_overlap():
    training, held_out = set(prompts_for("emoji", "train")), set(prompts_for("emoji", "held_out"))
    assert len(training) >= 300
    assert len(held_out) >= 48
    assert not training & held_out


def test_an_unchanged_diffusers_pipeline_loads_it_without_a_warning():
    code = (
        "import sys, torch, warnings\n"
        "from diffusers import StableDiffusionPipeline\n"
        "pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1])\n"
        "pipe.set_progress_bar_config(disable=True)\n"
        "g = torch.Generator().manual_seed(0)\n"
        "pipe('red apple', num_inference_steps=2, generator=g, guidance_scale=3.0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(asset("emoji"))],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    told = [
        line
        for line in done.stderr.splitlines()
        # transformers says this of any import without torchvision, and bitsandbytes, which peft
        # imports, of its kernels; progress bars are no warnings
        if line.strip()
        and not any(
            of in line
            for of in ("requires torchvision", "gemm_4bit_forward from kernels-community", "%|")
        )
    ]
    assert told == []


def test_our_chain_equals_the_diffusers_pipeline():
    family = load_family("emoji")
    pipe = StableDiffusionPipeline.from_pretrained(asset("emoji"), dtype=torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    prompts = prompts_for("emoji", "fixed")[:2]
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    expected = pipe(
        prompts, num_inference_steps=20, guidance_scale=3.0, generator=generators, output_type="pt"
    ).images
    nets = ModelNetworks(family, guidance=Guidance(3.0))
    schedule = family.schedule(20)
    ours = Sampler(nets, schedule, base_plan(schedule)).draw(prompts, [1, 2])
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    assert ours.std() > 0.1


@pytest.mark.slow
def test_a_short_run_makes_pictures_more_symmetric(tmp_path: Path):
    config = Config(
        reward="symmetry",
        num_steps=12,
        updates=24,
        rank=8,
        learning_rate=2e-3,
        precision="auto",
        merge=True,
        shortcut="none",
        sample_every=0,
        progress=False,
        tensorboard=False,
        output_dir=tmp_path / "run",
    )
    adapter = train(config)
    trainer = Trainer(config)
    before = trainer.reward(trainer.pictures()[1], []).mean()
    load_into(trainer.nets, adapter)
    after = trainer.reward(trainer.pictures()[1], []).mean()
    assert after > 0.9 * before  # minus the mirror error: it fell by a tenth or more
