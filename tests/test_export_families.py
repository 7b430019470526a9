"""Every family's exports, loaded into a fresh diffusers pipeline, draw the pictures of shortft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

from shortft import load_adapter
from shortft.adapter import AdapterInfo, lora_file, save_adapter
from shortft.cli import main
from shortft.families import load_family
from shortft.families.base import Guidance
from shortft.lora_formats import write_plain_adapter
from shortft.networks import ModelNetworks
from shortft.plans import inference_plan
from shortft.quiet import quiet
from shortft.sampling import load_tuned
from test_chain import make_shortcut
from tiny import randomise_loras, tiny_pipeline
from tiny_families import tiny

PROMPTS, SEEDS = ["red apple", "panda face"], [3, 4]
STEPS, K, SCALE = 6, 3, 3.0


def drawn(pipe: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    images: Tensor = pipe(
        prompt=PROMPTS,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        height=16,
        width=16,
        output_type="pt",
    ).images
    return images


def fresh(name: str) -> Any:
    return tiny_pipeline() if name == "sd" else tiny(name)


def saved(name: str, model: Path) -> Path:
    """A tiny model in diffusers' layout, with pictures of 16 × 16."""
    with quiet():
        fresh(name).save_pretrained(model)
    if "flux" in name:
        (model / "shortft.json").write_text(json.dumps({"resolution": 16}))
    return model


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux", "flux2"])
def test_check_runs(tmp_path: Path, name: str):
    model = saved(name, tmp_path / "model")
    lora = make_shortcut(load_family(str(model), device="cpu"), tmp_path / "s.safetensors")
    figures = tmp_path / "check.json"
    options = ["--model", str(model), "--shortcut", str(lora), "--output", str(figures)]
    options += ["--num-prompts", "3", "--batch-size", "2", "--num-steps", "12", "--segments", "3"]
    assert main(["check", *options]) in (0, 1)
    found = json.loads(figures.read_text())
    assert [f["name"] for f in found] == ["shortcut", "plain DDIM jump", "guided DDIM jump"]
    assert found[2]["evaluations"] == (1 if name == "flux" else 2)
    for f in found:
        errors = f["jump_error"]
        assert len(errors) == 3
        if name == "sd3":  # its last segment is one timestep, over which nothing jumps
            assert errors.pop() == 0
        assert all(0 < error < 100 for error in errors)
        assert 0 < f["chain_psnr"] < 100


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "flux2"])
def test_round_trip(tmp_path: Path, name: str):
    model = saved(name, tmp_path / "model")
    family = load_family(str(model), device="cpu")
    nets = ModelNetworks(family, guidance=Guidance(SCALE), loras=K, rank=2)
    randomise_loras(nets, 0.3)
    schedule = family.schedule(STEPS)
    active = [step for step in inference_plan(schedule, K).steps if step.adapters]
    info = AdapterInfo(
        base_model=str(model),
        loras=K,
        rank=2,
        segments=K,
        placement="stacked",
        num_steps=STEPS,
        timesteps=[round(float(schedule.timesteps[step.start])) for step in active],
        stacked=[step.adapters for step in active],
        guidance_scale=SCALE,
        config={"reward": "symmetry", "method": "shortft"},
        cut_by=schedule.cut_by,
    )
    adapter = tmp_path / "run" / "adapter"
    save_adapter(nets, info, adapter)
    states = [load_file(adapter / lora_file(n)) for n in range(1, K + 1)]
    write_plain_adapter(states, info, family, tmp_path / "plain")

    def ours(folder: Path) -> Tensor:
        return load_tuned(family, folder, None, None).draw(PROMPTS, SEEDS)

    out = {kind: tmp_path / kind for kind in ("diffusers", "kohya", "comfyui", "merged")}
    for kind, folder in out.items():
        command = ["export", "--adapter", str(adapter), "--format", kind, "--no-measure"]
        assert main([*command, "--output-dir", str(folder)]) == 0
        written = [file for file in folder.rglob("*") if file.is_file()]
        assert not [file for file in written if str(tmp_path).encode() in file.read_bytes()]
    # SDXL's pipeline takes zeros for an empty negative prompt, the others what they encode.
    assert ("ConditioningZeroOut" in (out["comfyui"] / "workflow.json").read_text()) == (
        name == "sdxl"
    )
    base, scheduled, plain = drawn(fresh(name)), ours(adapter), ours(tmp_path / "plain")
    assert min(float((x - base).abs().max()) for x in (scheduled, plain)) > 1e-2
    assert (scheduled - plain).abs().max() > 1e-3

    pipe = fresh(name)
    load_adapter(pipe, out["diffusers"])
    torch.testing.assert_close(drawn(pipe), scheduled, atol=1e-5, rtol=0)
    for kind, file in (("diffusers", "plain.safetensors"), ("kohya", "run-plain.safetensors")):
        pipe = fresh(name)
        with quiet():
            pipe.load_lora_weights(out[kind], weight_name=file)
        torch.testing.assert_close(drawn(pipe), plain, atol=1e-5, rtol=0)
    with quiet():
        pipe = DiffusionPipeline.from_pretrained(out["merged"])
    torch.testing.assert_close(drawn(pipe), plain, atol=1e-5, rtol=0)
