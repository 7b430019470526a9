"""Exports load elsewhere, draw the same, and say what they lose."""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file

import comfyui_nodes
from shortft import export as exporting
from shortft.adapter import AdapterInfo, lora_file, read_info, save_adapter
from shortft.cli import main
from shortft.comfyui import Graph, Link, workflow
from shortft.evaluate import evaluate
from shortft.export import Loss
from shortft.families import load_family, open_pipeline
from shortft.families.base import Guidance
from shortft.lora_formats import _by_sgm, kohya_state, plain_state
from shortft.model_card import card, header, run_figures, shareable
from shortft.networks import ModelNetworks
from shortft.plans import adapters_at, inference_plan
from shortft.rewards import make_reward
from shortft.schedule import Schedule, alphas_cumprod, ddim_schedule, flow_schedule, segments
from test_lora_files import FAMILIES, random_state
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


@pytest.fixture(scope="module")
def exported(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The adapter in a format, not measured, written once: only to be read."""
    root = tmp_path_factory.mktemp("exported")
    return functools.cache(lambda kind: export(place, kind, root / kind, "--no-measure"))


def predictions(pipe: StableDiffusionPipeline) -> torch.Tensor:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    context = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return pipe.unet(x, 501, context, return_dict=False)[0]


def test_code_that_an_adapter_names_runs_only_where_the_user_names_it(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    ran = tmp_path / "ran"
    code = tmp_path / "score.py"
    code.write_text(
        f"open({str(ran)!r}, 'w').close()\ndef f(images, prompts): return images.mean((1, 2, 3))\n"
    )
    adapter = tmp_path / "run" / "adapter"
    shutil.copytree(place / "run" / "adapter", adapter)
    fields = json.loads((adapter / "adapter.json").read_text())
    own = (f"{code}:f", f"symmetry:1,{code}:f:2", f"symmetry+{code}:f~0.5")
    for spec in (*own, "elsewhere.py:f", "somebodys_package", None):  # the last three are not here
        fields["config"] = {"reward": spec} if spec else {}
        (adapter / "adapter.json").write_text(json.dumps(fields))
        export(tmp_path, "kohya", tmp_path / "out", "--prompts", str(place / "prompts.txt"))
        assert not ran.exists()
        assert "code runs only where it is named (--reward)" in capsys.readouterr().out
        told = (tmp_path / "out" / "README.md").read_text()
        assert "was not measured" in told
        assert str(tmp_path) not in told
        shutil.rmtree(tmp_path / "out")
    prompts = ("--prompts", str(place / "prompts.txt"))
    export(tmp_path, "kohya", tmp_path / "out", *prompts, "--reward", f"{code}:f")
    assert ran.exists()
    assert "as one plain LoRA" in capsys.readouterr().out
    code = tmp_path / "my rewards" / "score.py"
    code.parent.mkdir()
    code.write_text("def f(images, prompts): return images.mean((1, 2, 3)) / 0 * 0\n")
    mix = f"symmetry:1,{code}:f:2"
    export(tmp_path, "kohya", tmp_path / "nan", *prompts, "--reward", mix)
    assert "could not be measured: reward " in capsys.readouterr().out
    assert str(tmp_path) not in (tmp_path / "nan" / "README.md").read_text()


def test_a_merged_model_keeps_the_guidance_and_the_size_that_it_was_made_for(exported):
    merged = load_family(str(exported("merged")))
    assert merged.default_guidance_scale == 2.0
    assert merged.resolution == tiny_family().resolution


def test_a_mere_conversion_asks_for_no_gpu(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def asked() -> str:
        raise AssertionError("which device there is")

    monkeypatch.setattr("shortft.families.default_device", asked)
    export(place, "kohya", tmp_path / "out", "--no-measure")


@pytest.mark.parametrize("file", ["run-1", "run-4", "run-plain"])
def test_kohya_files_draw_as_the_diffusers_ones(exported, file: str):
    kohya, diffusers = exported("kohya"), exported("diffusers")
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


def test_merged_model_draws_as_the_plain_lora(exported):
    merged, diffusers = exported("merged"), exported("diffusers")
    pipe = tiny_pipeline()
    pipe.load_lora_weights(diffusers, weight_name="plain.safetensors")
    whole = StableDiffusionPipeline.from_pretrained(merged)
    torch.testing.assert_close(predictions(whole), predictions(pipe), atol=1e-5, rtol=1e-5)


def test_a_merged_model_must_fit_on_the_disk_in_its_number_format(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
):
    """Its source lies there in half precision, or on the hub: neither tells the size."""
    half = tmp_path / "half"
    tiny_pipeline().to(dtype=torch.float16).save_pretrained(half)
    stored = sum(file.stat().st_size for file in half.rglob("*") if file.is_file())
    pipe = tiny_pipeline()
    parts = (pipe.unet, pipe.vae, pipe.text_encoder)
    weights = 4 * sum(p.numel() for part in parts for p in part.parameters())
    assert weights > 1.2 * stored
    monkeypatch.setattr(exporting, "SMALL_FILES", 0)
    lora = 3 * sum(file.stat().st_size for file in (place / "run" / "adapter").iterdir())
    free = SimpleNamespace(free=lora + weights - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    command = ["export", "--adapter", str(place / "run" / "adapter"), "--format", "merged"]
    command += ["--model", str(half), "--output-dir", str(tmp_path / "out"), "--no-measure"]
    assert main(command) == 2
    assert "pass --precision bf16 for half of it" in capsys.readouterr().err
    assert not any((tmp_path / "out").iterdir())
    assert main([*command, "--precision", "bf16"]) == 0
    file = tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors"
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    free.free += 1
    command[command.index("--output-dir") + 1] = str(tmp_path / "whole")
    assert main(command) == 0
    written = (tmp_path / "whole").rglob("*.safetensors")
    assert sum(file.stat().st_size for file in written) <= 1.1 * weights


def test_merging_holds_one_copy_of_the_model(place: Path, tmp_path: Path, monkeypatch):
    denoisers = []

    def load(*args: object, **options: object) -> Any:
        family = load_family(*args, **options)  # type: ignore[arg-type]
        denoisers.append(weakref.ref(family.denoiser))
        return family

    def opened(*args: Any) -> Any:
        assert denoisers[0]() is None
        return open_pipeline(*args)

    monkeypatch.setattr(exporting, "load_family", load)
    monkeypatch.setattr(exporting, "open_pipeline", opened)
    for options in (["--no-measure"], []):
        denoisers.clear()
        export(place, "merged", tmp_path / str(len(options)), *options)
        assert denoisers


def test_exported_diffusers_folder_is_an_adapter_still(place: Path, exported, tmp_path: Path):
    out = exported("diffusers")
    for name in ("sample", "again"):
        adapter = place / "run" / "adapter" if name == "sample" else out
        options = ["--adapter", str(adapter), "--model", str(place / "model")]
        options += ["--prompt", "red apple", "--output-dir", str(tmp_path / name)]
        assert main(["sample", *options]) == 0
    pictures = [next((tmp_path / name).iterdir()).read_bytes() for name in ("sample", "again")]
    assert pictures[0] == pictures[1]


CHAINS = {
    "sd": ddim_schedule(alphas_cumprod(), 50),
    "sdxl": ddim_schedule(alphas_cumprod(), 50),
    "sd3": flow_schedule(28, shift=3.0),
    "flux": flow_schedule(28, shift=math.exp(1.15), smallest=1 / 28),
    "flux, schnell": flow_schedule(4, smallest=1 / 4),
    "flux2": flow_schedule(50, shift=math.exp(2.0227), smallest=1 / 50),  # of 4,096 tokens
    "flux2, small": flow_schedule(28, shift=math.exp(1.8557), smallest=1 / 28),  # of 1,024
}


def comfy_steps(name: str, schedule: Schedule) -> list[float]:
    """The sigmas (timesteps for SD) that KSampler visits with the workflow's scheduler."""
    n, shift = schedule.num_steps, schedule.shift

    def shifted(u: float) -> float:
        return shift * u / (1 + (shift - 1) * u)

    if name in ("sd", "sdxl"):  # ddim_uniform
        return [float(t) for t in range(1, 1000, 1000 // n)][::-1]
    if name.startswith("flux2"):  # Flux2Scheduler: evenly from 1, shifted
        return [shifted(1 - i / n) for i in range(n)]
    if name == "sd3":  # normal: evenly from the largest to the smallest sigma, shifted once more
        low = shifted(1 / 1000)
        return [shifted(1 - i * (1 - low) / (n - 1)) for i in range(n)]
    table = [shifted((i + 1) / 10000) for i in range(10000)]  # simple
    return [table[-(1 + int(i * 10000 / n))] for i in range(n)]


def comfy_strengths(
    frames: list[tuple[float, float]], steps: list[float], schedule: Schedule, shift: float
) -> list[float]:
    """HookKeyframeGroup: the last keyframe whose start was reached; each holds for a step."""

    def start(p: float) -> float:
        if schedule.prediction_type != "flow":
            return 1e9 if p <= 0 else (1 - p) * 999
        u = 1 - p
        return 1.0 if p <= 0 else shift * u / (1 + (shift - 1) * u)

    current, used, seen = 0, 0, []
    for step in steps:
        if used >= 1:
            for i in range(current + 1, len(frames)):
                if start(frames[i][0]) < step:
                    break
                current, used = i, 0
                break
        used += 1
        seen.append(frames[current][1])
    return seen


def frames_of(graph: Graph, link: Link) -> list[tuple[float, float]]:
    """The keyframes that end in a link, in order: start and strength."""
    inputs = graph[link[0]]["inputs"]
    before = frames_of(graph, inputs["prev_hook_kf"]) if "prev_hook_kf" in inputs else []
    return [*before, (inputs["start_percent"], inputs["strength_mult"])]


@pytest.mark.parametrize("name", CHAINS)
def test_comfyui_workflow(name: str):
    """It takes the family's own steps, and switches each LoRA at its timesteps."""
    schedule = CHAINS[name]
    k = 2 if name == "flux, schnell" else 4
    stacked = adapters_at(segments(schedule, k), "stacked")
    steps = comfy_steps(name, schedule)
    own = schedule.timesteps if name in ("sd", "sdxl") else schedule.sigma[:-1]
    torch.testing.assert_close(torch.tensor(steps), own.float(), atol=1e-3, rtol=0)
    files = [f"x-{n}.safetensors" for n in range(1, k + 1)]
    family = name.partition(",")[0]
    size = 512 if name == "flux2, small" else 1024
    zeros = family == "sdxl"
    graph = workflow(family, schedule, stacked, files, 3.5, size, zeros_for_empty=zeros)
    comfyui_nodes.check(graph)
    shift = math.exp(2.02) if family == "flux2" else schedule.shift  # of the model in ComfyUI
    hooks = [n["inputs"] for n in graph.values() if n["class_type"] == "SetHookKeyframes"]
    for number, hook in enumerate(hooks, start=1):
        assert graph[hook["hooks"][0]]["inputs"]["lora_name"] == files[number - 1]
        active = [float(count >= number) for count in stacked]
        frames = frames_of(graph, hook["hook_kf"])
        assert comfy_strengths(frames, steps, schedule, shift) == active
        # A sampler whose steps are a little off is routed alike.
        off = [step * 0.999 for step in steps]
        assert comfy_strengths(frames, off, schedule, shift) == active
    kinds = [node["class_type"] for node in graph.values()]
    assert kinds.count("CreateHookLoraModelOnly") == kinds.count("SetHookKeyframes") == k
    sides = [n["inputs"] for n in graph.values() if n["class_type"] == "ConditioningSetProperties"]
    assert [sorted(loras_behind(graph, side["hooks"])) for side in sides] == [files, files]
    (sampler,) = [n["inputs"] for n in graph.values() if "cfg" in n["inputs"]]
    assert sampler["cfg"] == (1.0 if family == "flux" else 3.5)
    inputs = {key: value for node in graph.values() for key, value in node["inputs"].items()}
    assert inputs["steps"] == schedule.num_steps
    assert inputs["sampler_name"] == ("ddim" if family in ("sd", "sdxl") else "euler")
    schedulers = {"sd": "ddim_uniform", "sdxl": "ddim_uniform", "sd3": "normal", "flux": "simple"}
    assert inputs.get("scheduler") == schedulers.get(family)
    if family == "sd3":
        assert inputs["shift"] == pytest.approx(schedule.shift, abs=0.01)
    if family == "flux":
        shifts = graph[sampler["model"][0]]["inputs"]
        assert comfy_flux_shift(**shifts) == pytest.approx(schedule.shift)
        guidance = [n["inputs"]["guidance"] for n in graph.values() if "guidance" in n["inputs"]]
        assert guidance == [3.5]
        encoded = graph[sampler["positive"][0]]["inputs"]["cond_NEW"]
        assert graph[encoded[0]]["class_type"] == "FluxGuidance"
    for side, prompted in (("positive", True), ("negative", False)):
        assert ("PROMPT" in texts_behind(graph, sampler[side])) == prompted
        encoded = graph[sampler[side][0]]["inputs"]["cond_NEW"]
        zeroed = graph[encoded[0]]["class_type"] == "ConditioningZeroOut"
        assert zeroed == (zeros and not prompted)


def comfy_flux_shift(
    model: Link, max_shift: float, base_shift: float, width: int, height: int
) -> float:
    """ModelSamplingFlux: mu on a line through 256 and 4,096 tokens of 16 × 16 pixels."""
    slope = (max_shift - base_shift) / (4096 - 256)
    return math.exp(base_shift + slope * (width * height / 16**2 - 256))


def loras_behind(graph: Graph, link: Link) -> list[str]:
    """The files of all hooks that a link joins."""
    inputs = graph[link[0]]["inputs"]
    if "lora_name" in inputs:
        return [inputs["lora_name"]]
    joined = [inputs[key] for key in ("hooks", "hooks_A", "hooks_B") if key in inputs]
    return [file for one in joined for file in loras_behind(graph, one)]


def texts_behind(graph: Graph, link: Link) -> str:
    """All texts that an input of a node depends on."""
    found = ""
    for value in graph[str(link[0])]["inputs"].values():
        found += value if isinstance(value, str) else ""
        found += texts_behind(graph, value) if isinstance(value, list) else ""
    return found


def test_the_loss_is_that_of_the_plain_lora(place: Path, tmp_path: Path):
    adapter = place / "run" / "adapter"
    info = read_info(adapter)
    family = tiny_family()
    states = [load_file(adapter / lora_file(n)) for n in range(1, 5)]
    exporting.write_plain_adapter(states, info, family, tmp_path)
    prompts = ["red apple", "panda face"]
    loss = exporting.measure_loss(family, adapter, tmp_path, info, prompts, "symmetry", None)
    reward = make_reward("symmetry")
    scores = [
        evaluate(family, folder, reward, prompts, seeds=2)[0]["reward"]
        for folder in (adapter, tmp_path)
    ]
    assert loss.base == pytest.approx(scores[0]["before"])
    assert loss.scheduled == pytest.approx(scores[0]["after"])
    assert loss.plain == pytest.approx(scores[1]["after"])
    assert abs(loss.plain - loss.scheduled) > 1e-5
    assert "as one plain LoRA 0.4000, 75 % of the gain" in Loss(0.1, 0.5, 0.4).text()


def test_card_and_loss(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = export(place, "comfyui", tmp_path / "comfyui")
    assert "as one plain LoRA" in capsys.readouterr().out
    card = (out / "README.md").read_text()
    assert "| reward | symmetry |" in card
    assert "reward on held-out prompts: base -0." in card
    assert "Of the run" not in card  # it has no log
    assert json.loads((out / "workflow.json").read_text())
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


def test_a_card_tells_the_runs_own_figures(place: Path, tmp_path: Path):
    run = shutil.copytree(place / "run", tmp_path / "run")
    rows = [
        {"update": 0, "eval_reward": -0.25, "eval_held_out": 0.75},
        *({"update": n, "reward": 0.1 * n, "seconds": 9.0} for n in range(1, 5)),
        {"update": 2, "eval_reward": -0.5, "eval_held_out": 0.5},
        {"update": 4, "eval_reward": 0.125, "eval_held_out": 0.7},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "kohya"
    command = ["export", "--adapter", str(run / "adapter"), "--format", "kohya", "--no-measure"]
    assert main([*command, "--output-dir", str(out)]) == 0
    card = (out / "README.md").read_text()
    for line in (
        "- 4 updates, 0.6 minutes of training",
        "- reward on fixed prompts: -0.2500 at update 0, 0.1250 at update 4",
        "- held-out scorer on fixed prompts: 0.7500 at update 0, 0.7000 at update 4",
        "| reward | symmetry |",
    ):
        assert f"{line}\n" in card


def test_a_card_tells_what_the_exported_adapter_scored(tmp_path: Path):
    rows = [
        {"update": 0, "eval_reward": None, "eval_held_out": 0.75, "best": True},
        {"update": 2, "eval_reward": 0.5, "eval_held_out": 0.7},
        {"update": 4, "eval_reward": 1.0, "eval_held_out": 0.6, "best": True},
        {"update": 6, "eval_reward": 2.0, "eval_held_out": 0.1},
        {"update": 8, "eval_reward": None, "eval_held_out": None, "guard": "hacked"},
    ]
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    last = ["0.5000 at update 2, 2.0000 at update 6", "0.7500 at update 0, 0.1000 at update 6"]
    best = ["0.5000 at update 2, 1.0000 at update 4", "0.7500 at update 0, 0.6000 at update 4"]
    for folder, guard, told in (
        ("adapter", None, last),
        ("adapter", "warn", last),
        ("adapter", "stop", best),  # it went back
        ("best", "warn", best),
    ):
        lines = run_figures(tmp_path / folder, guard)
        assert [line.partition("prompts: ")[2] for line in lines] == told


def test_a_folder_that_holds_something_is_left_alone(place: Path, tmp_path: Path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    command = ["export", "--adapter", str(place / "run" / "adapter"), "--output-dir", str(tmp_path)]
    assert main(command) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_cards_tell_no_paths():
    home = "/home/me/models"
    info = AdapterInfo(
        f"{home}/sd15",
        1,
        2,
        4,
        "shared",
        8,
        [1],
        [1],
        1.0,
        {
            "model": f"{home}/sd15",
            "reward": f"clip:1,{home}/mine.py:warm:0.5",
            "reward_model": f"hpsv2={home}/x.pt",
            "prompts": f"{home}/prompts.txt",
            "output_dir": f"{home}/run",
            "shortcut": f"{home}/few.safetensors",
        },
    )
    family = tiny_family()
    told = card(info, "kohya", ["a"], []) + json.dumps(vars(shareable(info)))
    told += json.dumps(header(info, family, family.schedule(8), "t", 2))
    assert home not in told
    assert "clip:1,mine.py:warm:0.5 LoRA for sd15" in told
    assert "| shortcut | few.safetensors |" in told
    gone = replace(info, base_model="my/sd15", local=["my/sd15", "runs/few.safetensors"])
    gone.config["shortcut"] = "runs/few.safetensors"
    told = card(gone, "kohya", ["a"], []) + json.dumps(vars(shareable(gone)))
    assert "my/" not in told
    assert "runs/" not in told
    assert "base_model:" not in told
    hub = replace(info, base_model="owner/name@v1")
    assert "base_model: owner/name\n" in card(hub, "kohya", ["a"], [])


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("jumps", {"segments": 4, "shortcut": "unguided"}),
        ("tune_shortcut", {"segments": 4, "shortcut": "guided"}),
        ("shortft", {"segments": 4, "timestep_lora": True, "shortcut": "guided"}),
        ("thinned", {}),
    ],
)
def test_cards_tell_which_shortcut_and_only_what_the_method_uses(
    method: str, told: dict[str, object]
):
    config = {"method": method, "segments": 4, "timestep_lora": True, "shortcut": "auto"}
    info = AdapterInfo("emoji", 1, 2, 4, "everywhere", 8, [1], [1], 3.0, config)
    assert shareable(info).config == {"method": method, **told}


REAL = {  # names in a LoRA's header, by what tells the variants of a family apart
    "sd_v1": ("sd", {"cross_attention_dim": 768}, "stable-diffusion-v1"),
    "sd_v2": ("sd", {"cross_attention_dim": 1024}, "stable-diffusion-v2-512"),
    "sdxl_base_v1-0": ("sdxl", {}, "stable-diffusion-xl-v1-base"),
    "sd3": ("sd3", {"dual_attention_layers": (), "num_layers": 24}, "stable-diffusion-3-m"),
    "flux1": ("flux", {"guidance_embeds": True}, "flux-1-dev"),
    "flux2_klein_4b": ("flux2", {"num_attention_heads": 24}, "Flux.2-klein-4b"),
    "flux2_klein_9b": ("flux2", {"num_attention_heads": 32}, "Flux.2-klein-9b"),
}


@pytest.mark.parametrize("name", REAL)
def test_header_names_the_base(name: str):
    family, config, architecture = REAL[name]
    known = SimpleNamespace(
        name=family, resolution=512, denoiser=SimpleNamespace(config=SimpleNamespace(**config))
    )
    info = AdapterInfo("owner/name", 1, 2, 4, "shared", 8, [1], [1], 1.0, {"reward": "clip"})
    schedule = CHAINS[family]
    fields = header(info, known, schedule, "t", 2)  # type: ignore[arg-type]
    assert fields["ss_base_model_version"] == name
    assert fields["modelspec.architecture"] == f"{architecture}/lora"
    assert fields["modelspec.resolution"] == "512x512"
    assert ("modelspec.prediction_type" in fields) == (schedule.prediction_type != "flow")
    assert all(isinstance(value, str) for value in fields.values())
    if name == "sd_v2":
        v = replace(schedule, prediction_type="v_prediction")
        fields = header(info, known, v, "t", 2)  # type: ignore[arg-type]
        assert fields["ss_base_model_version"] == "sd_v2_v"


A1111 = re.compile(  # what its network.py and lora.py take for U-Nets, SD 1.x to XL
    r"lora_unet_(down_blocks_\d+|mid_block|up_blocks_\d+)_attentions_\d+_"
    r"transformer_blocks_\d+_(attn[12]_to_(q|k|v|out_0)|ff_net_(0_proj|2))"
)


# SDXL's in kohya's scripts, whose U-Net has Stability AI's blocks: attention lies at these.
SGM = re.compile(
    r"lora_unet_(input_blocks_[4578]|middle_block|output_blocks_[0-5])_1_"
    r"transformer_blocks_\d+_(attn[12]_to_(q|k|v|out_0)|ff_net_(0_proj|2))"
)


def test_sdxl_layers_lie_where_stability_ai_counts_them():
    at = "attentions_1_transformer_blocks_0_attn1_to_q.alpha"
    rest = "transformer_blocks_0_attn1_to_q.alpha"
    for ours, theirs in {
        f"lora_unet_down_blocks_1_{at}": f"lora_unet_input_blocks_5_1_{rest}",
        f"lora_unet_down_blocks_2_{at}": f"lora_unet_input_blocks_8_1_{rest}",
        f"lora_unet_up_blocks_0_{at}": f"lora_unet_output_blocks_1_1_{rest}",
        f"lora_unet_up_blocks_1_{at}": f"lora_unet_output_blocks_4_1_{rest}",
        f"lora_unet_mid_block_attentions_0_{rest}": f"lora_unet_middle_block_1_{rest}",
    }.items():
        assert _by_sgm(ours, 3) == theirs
        assert SGM.fullmatch(theirs.partition(".")[0])


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "flux2"])
def test_keys_are_those_that_tools_read(name: str):
    """kohya's names for U-Nets; peft's with `transformer.` for SD3 and FLUX, as ComfyUI reads."""
    family = FAMILIES[name]()
    state = random_state(family, targets=family.lora_targets)
    named = kohya_state({f"{family.part}.{key}": value for key, value in state.items()}, family)
    for key in named:
        if family.part == "unet":
            layer, _, end = key.partition(".")
            place = r"lora_unet_(input_blocks_\d+|middle_block|output_blocks_\d+)_1_transformer_.*"
            assert re.fullmatch(place, layer) if name == "sdxl" else A1111.fullmatch(layer)
            assert end in ("alpha", "lora_down.weight", "lora_up.weight")
        else:
            module, _, end = key.removeprefix("transformer.").rpartition(".lora_")
            assert family.denoiser.get_submodule(module) is not None
            assert end in ("A.weight", "B.weight")


def test_damage_another_model_and_a_full_disk_are_told_first(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
):
    out = tmp_path / "out"

    def told(*options: str, adapter: Path = place / "run" / "adapter") -> str:
        command = ["export", "--adapter", str(adapter), "--output-dir", str(out), "--no-measure"]
        assert main([*command, *options]) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert message.count("\n") == 1
        assert not out.exists() or not any(out.iterdir())
        return message

    assert "does not fit emoji" in told("--model", "emoji")
    cut = tmp_path / "adapter"
    shutil.copytree(place / "run" / "adapter", cut)
    weights = cut / lora_file(2)
    weights.write_bytes(weights.read_bytes()[:100])
    assert f"{weights}: is not a safetensors file, or its header is damaged" in told(adapter=cut)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert "0 MB free, but the export's files take" in told()


def test_a_lora_of_the_few_step_model_is_not_exported(place: Path, tmp_path: Path, capsys):
    adapter = shutil.copytree(place / "run" / "adapter", tmp_path / "adapter")
    fields = json.loads((adapter / "adapter.json").read_text())
    (adapter / "adapter.json").write_text(json.dumps({**fields, "placement": "few_step"}))
    out = tmp_path / "out"
    assert main(["export", "--adapter", str(adapter), "--output-dir", str(out)]) == 2
    assert "use its lora_1.safetensors" in capsys.readouterr().err
    assert not out.exists()
