"""Exports load elsewhere, draw the same, and say what they lose."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from shortft.adapter import AdapterInfo, lora_file, save_adapter
from shortft.cli import main
from shortft.comfyui import keyframes, workflow
from shortft.export import header, kohya_state, plain_state
from shortft.families.base import Guidance
from shortft.networks import ModelNetworks
from shortft.plans import inference_plan
from shortft.schedule import alphas_cumprod, ddim_schedule
from tiny import randomise_loras, save_tiny, tiny_family, tiny_pipeline

STEPS = 8


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, held-out prompts, and an adapter of four LoRAs."""
    root = tmp_path_factory.mktemp("export")
    save_tiny(root / "model")
    (root / "prompts.txt").write_text("red apple\npanda face\n")
    family = tiny_family()
    nets = ModelNetworks(family, guidance=Guidance(2.0), loras=4, rank=2)
    randomise_loras(nets)
    schedule = family.schedule(STEPS)
    active = [s for s in inference_plan(schedule, 4).steps if s.adapters]
    info = AdapterInfo(
        base_model=str(root / "model"),
        loras=4,
        rank=2,
        segments=4,
        placement="stacked",
        num_steps=STEPS,
        timesteps=[round(float(schedule.timesteps[s.start])) for s in active],
        stacked=[s.adapters for s in active],
        guidance_scale=2.0,
        config={"reward": "symmetry", "reward_model": None, "method": "shortft", "rank": 2},
    )
    save_adapter(nets, info, root / "run" / "adapter")
    return root


def export(place: Path, kind: str, out: Path, *options: str) -> Path:
    command = ["export", "--adapter", str(place / "run" / "adapter"), "--format", kind]
    command += ["--output-dir", str(out), "--prompts", str(place / "prompts.txt")]
    assert main([*command, *options]) == 0
    return out


def predictions(pipe: StableDiffusionPipeline) -> torch.Tensor:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    context = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return pipe.unet(x, 501, context, return_dict=False)[0]


@pytest.mark.parametrize("file", ["run-1", "run-4", "run-plain"])
def test_kohya_files_draw_as_the_diffusers_ones(place: Path, tmp_path: Path, file: str):
    kohya = export(place, "kohya", tmp_path / "kohya", "--no-measure")
    diffusers = export(place, "diffusers", tmp_path / "diffusers", "--no-measure")
    own = "plain.safetensors" if file == "run-plain" else lora_file(int(file[-1]))
    found = []
    for folder, name in ((kohya, f"{file}.safetensors"), (diffusers, own)):
        pipe = tiny_pipeline()
        pipe.load_lora_weights(folder, weight_name=name)
        found.append(predictions(pipe))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)
    assert (found[0] - predictions(tiny_pipeline())).abs().max() > 1e-3
    with safe_open(kohya / f"{file}.safetensors", "pt") as opened:
        names, fields = list(opened.keys()), opened.metadata()
        layers = {name.partition(".")[0] for name in names}
        ends = ("alpha", "lora_down.weight", "lora_up.weight")
        assert set(names) == {f"{layer}.{end}" for layer in layers for end in ends}
        assert all(layer.startswith("lora_unet_") and "." not in layer for layer in layers)
        down = opened.get_tensor(f"{sorted(layers)[0]}.lora_down.weight")
        assert float(opened.get_tensor(f"{sorted(layers)[0]}.alpha")) == len(down)
    assert fields["ss_network_dim"] == fields["ss_network_alpha"] == str(len(down))
    assert fields["modelspec.architecture"] == "stable-diffusion-v1/lora"


def test_plain_lora_is_the_stacked_ones_by_their_share_of_the_steps(place: Path):
    adapter = place / "run" / "adapter"
    info = AdapterInfo(**json.loads((adapter / "adapter.json").read_text()))
    states = [load_file(adapter / lora_file(n)) for n in range(1, 5)]
    plain = plain_state(states, info)
    # Of 8 steps, two lie in each segment: LoRA 1 acts at 2 + 3, LoRA 2 at 3, then 2, then 1.
    shares = [5 / 8, 3 / 8, 2 / 8, 1 / 8]
    for key in (k for k in plain if ".lora_A." in k):
        up = key.replace(".lora_A.", ".lora_B.")
        whole = plain[up] @ plain[key]
        parts = [share * s[up] @ s[key] for s, share in zip(states, shares, strict=True)]
        torch.testing.assert_close(whole, torch.stack(parts).sum(0), atol=1e-6, rtol=1e-5)
        assert len(plain[key]) == 8


def test_merged_model_draws_as_the_plain_lora(place: Path, tmp_path: Path):
    merged = export(place, "merged", tmp_path / "merged", "--no-measure")
    diffusers = export(place, "diffusers", tmp_path / "diffusers", "--no-measure")
    pipe = tiny_pipeline()
    pipe.load_lora_weights(diffusers, weight_name="plain.safetensors")
    whole = StableDiffusionPipeline.from_pretrained(merged)
    torch.testing.assert_close(predictions(whole), predictions(pipe), atol=1e-5, rtol=1e-5)


def test_exported_diffusers_folder_is_an_adapter_still(place: Path, tmp_path: Path):
    out = export(place, "diffusers", tmp_path / "diffusers", "--no-measure")
    for name in ("sample", "again"):
        adapter = place / "run" / "adapter" if name == "sample" else out
        options = ["--adapter", str(adapter), "--model", str(place / "model")]
        options += ["--prompt", "red apple", "--output-dir", str(tmp_path / name)]
        assert main(["sample", *options]) == 0
    pictures = [next((tmp_path / name).iterdir()).read_bytes() for name in ("sample", "again")]
    assert pictures[0] == pictures[1]


def strengths(frames: list[tuple[float, float]], timesteps: list[float]) -> list[float]:
    """What ComfyUI makes of keyframes: the last one whose start was reached; one step at least."""
    current, used, seen = 0, 0, []
    for timestep in timesteps:
        if used >= 1:
            for i in range(current + 1, len(frames)):
                if (1 - frames[i][0]) * 999 < timestep:
                    break
                current, used = i, 0
                break
        used += 1
        seen.append(frames[current][1])
    return seen


def test_keyframes_switch_each_lora_at_its_timesteps_in_comfyui():
    schedule = ddim_schedule(alphas_cumprod(), 50)
    steps = inference_plan(schedule, 4).steps
    times = [round(float(t)) for t in schedule.timesteps]
    active = [s for s in steps if s.adapters]
    info = AdapterInfo(
        "sd15",
        4,
        8,
        4,
        "stacked",
        50,
        [times[s.start] for s in active],
        [s.adapters for s in active],
        7.5,
        {},
    )
    for number in range(1, 5):
        frames = keyframes(info, number, 1000)
        expected = [float(step.adapters >= number) for step in steps]
        assert strengths(frames, [float(t) for t in times]) == expected
        # A sampler whose timesteps are a little off is routed alike.
        assert strengths(frames, [t - 3.0 for t in times]) == expected
    graph = workflow(info, [f"x-{n}.safetensors" for n in range(1, 5)], 1000)
    for node in graph.values():
        for value in node["inputs"].values():
            if isinstance(value, list):
                assert int(value[0]) in range(1, len(graph) + 1)
    kinds = [node["class_type"] for node in graph.values()]
    assert kinds.count("CreateHookLoraModelOnly") == kinds.count("SetHookKeyframes") == 4
    assert kinds.count("CombineHooks2") == 3


def test_card_and_loss(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = export(place, "comfyui", tmp_path / "comfyui")
    assert "as one plain LoRA" in capsys.readouterr().out
    card = (out / "README.md").read_text()
    assert "| reward | symmetry |" in card
    assert "reward on held-out prompts: base -0." in card
    assert json.loads((out / "workflow.json").read_text())
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


def test_a_folder_that_holds_something_is_left_alone(place: Path, tmp_path: Path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    command = ["export", "--adapter", str(place / "run" / "adapter"), "--output-dir", str(tmp_path)]
    assert main(command) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_transformers_keep_the_names_that_comfyui_reads():
    state = {"transformer.a.lora_A.weight": torch.ones(2, 3)}
    assert kohya_state(state) == state
    info = AdapterInfo("x", 1, 2, 4, "shared", 8, [1], [1], 1.0, {})
    assert header(info, "flux", "t", 2)["modelspec.architecture"] == "flux-1-dev/lora"
