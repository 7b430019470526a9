"""`train --dry-run`: what it counts, what it checks, and that it touches no weights."""

from __future__ import annotations

import re
import shutil
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from shortft.assets import EMBEDDED, asset
from shortft.cli import main
from shortft.config import Config, load_config
from shortft.cost import Call, Cost
from shortft.doctor import _safely, hub
from shortft.lora_layers import MergedLinear
from shortft.methods.shortft import shortft_plan
from shortft.methods.suffix import draft_lv
from shortft.plan_view import measure_cost
from shortft.precision import own_precision
from shortft.preflight import dry_run, machine, places
from shortft.preflight.estimate import estimate, run_seconds
from shortft.preflight.outline import encoder_parameters, parameters
from shortft.preflight.places import configurations, needed
from shortft.quiet import quiet
from shortft.recipes import MEMORY_GB, recipe, recipe_names
from shortft.schedule import alphas_cumprod, ddim_schedule
from shortft.trainer import Trainer
from test_bad_input import lora_of
from test_lora_files import FAMILIES
from tiny_families import tiny

GPU_24 = machine.Device("cuda", "a GPU", 24 * 2**30, bf16=True)


def is_merged(layer: torch.nn.Module) -> bool:
    return isinstance(layer, MergedLinear) and layer._weight is not None


@pytest.mark.parametrize(
    ("method", "options", "loras"),
    [
        ("jumps", {}, 1),
        ("thinned", {}, 1),
        ("shortft", {}, 4),
        ("shortft", {"loras": "segment"}, 4),
    ],
)
def test_counting_agrees_with_the_real_model(method: str, options: dict[str, str], loras: int):
    """Parameters exactly; activations as the real networks keep them, LoRAs included."""
    own = {"method": method, "method_options": options, "tensorboard": False, "sample_prompts": 1}
    if method == "shortft":  # the longest chain; the others show a larger batch
        own["batch_size"] = 2
    precision = own_precision()  # an imitated bf16 takes minutes
    config = load_config(None, {**recipe("emoji"), **own, "precision": precision})
    found = estimate(config, asset("emoji"), gpu=False, speed=1e9)
    trainer = Trainer(config)
    family = trainer.family
    encoders = parameters(family._text.text_encoder)  # type: ignore[attr-defined]
    assert encoder_parameters(asset("emoji")) == encoders
    trained = [p for n in range(1, loras + 1) for p in trainer.nets.parameters_of(n).values()]
    size = 16 * sum(p.numel() for p in trained)
    assert found.parts["LoRAs, gradients, optimizer"] == size
    trainer.update()
    trainer.pictures()
    views = [trainer.nets._shortcut, *trainer.nets._tuned.values(), trainer.nets.base]
    weights = [p for view in views if view is not None for p in view.parameters()]
    weights += [m._weight for view in views[1:-1] for m in view.modules() if is_merged(m)]
    sizes = {
        w.untyped_storage().data_ptr(): w.untyped_storage().nbytes()
        for w in weights
        if w.dtype == family.dtype and not w.requires_grad
    }
    assert found.parts["denoiser"] == pytest.approx(sum(sizes.values()), rel=0.03)
    measured = measure_cost(trainer)
    assert found.cost.call.kept == pytest.approx(measured.call.kept, rel=0.3)
    if method == "jumps":  # a shortcut that runs unguided: half the calls
        assert found.cost.jump.kept == pytest.approx(measured.jump.kept, rel=0.3)
        assert measured.jump.kept < 0.7 * measured.call.kept
        timed = [measured, measure_cost(trainer), measure_cost(trainer)]  # on a busy machine
        fastest = min(cost.jump.gradient for cost in timed)
        if not torch.cuda.is_available():  # to a GPU half of so small a batch is as long as all
            assert fastest < 0.8 * min(cost.call.gradient for cost in timed)
        assert found.cost.jump.forward == pytest.approx(found.cost.call.forward / 2, rel=0.01)
    assert found.schedule.timesteps.tolist() == trainer.schedule.timesteps.tolist()


def test_an_update_costs_what_its_calls_do():
    """Stage 1: eleven calls without gradient, four of the policy with it, three jumps."""
    plan = shortft_plan(ddim_schedule(alphas_cumprod(), 50), 4, 1)
    cost = Cost(Call(1.0, 10.0, 100), Call(0.5, 5.0, 40), decode=3.0, decode_bytes=7, steps=50)
    assert cost.seconds(plan, recompute=False) == 11 + 4 * 10 + 3 * 5 + 3
    assert cost.seconds(plan, recompute=True) == 69 + 4 * 1 + 3 * 0.5
    assert cost.activation_bytes(plan, recompute=False) == 4 * 100 + 3 * 40 + 7
    assert cost.activation_bytes(plan, recompute=True) == 100
    anchored = replace(cost, anchored=True)  # the first of four policy calls passes no gradient on
    again = anchored.seconds(plan, recompute=False) - cost.seconds(plan, recompute=False)
    assert again == 1 + 3 * 10
    kept = anchored.activation_bytes(plan, recompute=False)
    assert kept == cost.activation_bytes(plan, recompute=False) + 3 * 100
    copied = draft_lv(ddim_schedule(alphas_cumprod(), 50), torch.Generator(), copies=3)
    again = anchored.seconds(copied, recompute=False) - cost.seconds(copied, recompute=False)
    assert again == 1 + 3  # the last step and each of its copies, whose input is not learned from
    # All four ends are decoded and scored; with recomputation decoded one by one.
    scored, one = replace(cost, score_bytes=60), replace(cost, decode=0.0)
    assert cost.seconds(copied, recompute=False) == one.seconds(copied, recompute=False) + 4 * 3
    assert scored.activation_bytes(copied, recompute=False) == 4 * 100 + 4 * (7 + 60)
    assert scored.activation_bytes(copied, recompute=True) == 4 * 60
    pinned = shortft_plan(ddim_schedule(alphas_cumprod(), 50), 4, 1, pin=True)
    assert cost.seconds(pinned, recompute=False) == 69 - 11 + 50


def test_a_distilled_model_is_counted_without_guidance(tmp_path: Path):
    """FLUX.2's model_index.json says so; its weights are not read, its decoder stays its own."""
    kept = []
    for distilled in (False, True):
        folder = tmp_path / str(distilled)
        with quiet():
            tiny("flux2", distilled=distilled).save_pretrained(folder)
        for weights in folder.rglob("*.safetensors"):
            weights.unlink()
        options = {"model": str(folder), "resolution": 16, "decoder": str(folder / "vae")}
        config = Config(shortcut="plain", reward="symmetry", **options)
        kept.append(estimate(config, folder, gpu=False, speed=1e9).cost.call.kept)
    assert kept[0] == pytest.approx(2 * kept[1], rel=0.2)


def slow_but_two(names: list[str]) -> list[Any]:
    """Recipes to try, the larger ones marked."""
    quick = ("emoji", "sd15-hps-24gb")
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


def test_options_that_save_memory_are_counted():
    config = load_config(None, {**recipe("sd15-hps-24gb"), "reward_device": "none"})
    folder = configurations(config.model)
    assert folder is not None
    usual = estimate(config, folder, gpu=True, speed=1e12).parts
    saving = {"optimizer": "adamw8bit", "reward_precision": "bf16"}
    parts = estimate(config.model_copy(update=saving), folder, gpu=True, speed=1e12).parts
    optimizer = "LoRAs, gradients, optimizer"
    assert parts[optimizer] == usual[optimizer] * 10 // 16
    assert parts["rewards"] == usual["rewards"] // 2 > 0
    away = config.model_copy(update={"reward_device": "cpu"})
    assert estimate(away, folder, gpu=True, speed=1e12).parts["rewards"] == 0
    # A visitor counts where its stay is what takes most; without recomputation it is always there.
    visit = config.model_copy(update={"reward_device": "offload"})
    found = estimate(visit, folder, gpu=True, speed=1e12).parts["rewards"]
    assert 0 < found < usual["rewards"]
    kept = visit.model_copy(update={"recompute": False})
    assert estimate(kept, folder, gpu=True, speed=1e12).parts["rewards"] == usual["rewards"]


def test_weights_that_are_shared_out_are_counted(monkeypatch: pytest.MonkeyPatch):
    """FLUX.1's 11.9 G numbers are all but a few in linear layers; biases and norms stay whole."""
    config = load_config(None, {**recipe("flux-hps"), "batch_size": 8, "accumulation": 2})
    folder = configurations(config.model)
    assert folder is not None
    monkeypatch.setenv("WORLD_SIZE", "4")
    whole = estimate(config, folder, gpu=True, speed=1e12).parts
    shared = config.model_copy(update={"shard": True})
    found = estimate(shared, folder, gpu=True, speed=1e12).parts
    assert whole["denoiser"] == pytest.approx(23.8e9, rel=0.01)
    assert found["denoiser"] == pytest.approx(23.8e9 / 4, rel=0.01)
    assert {**found, "denoiser": 0} == {**whole, "denoiser": 0}
    # One picture at once, as with accumulation 8 in one process.
    monkeypatch.delenv("WORLD_SIZE")
    alone = config.model_copy(update={"accumulation": 8})
    assert estimate(alone, folder, gpu=True, speed=1e12).parts == whole
    alone = shared.model_copy(update={"accumulation": 8})
    assert estimate(alone, folder, gpu=True, speed=1e12).parts == whole


def test_a_method_without_jumps_asks_for_no_shortcut():
    own = {"method": "thinned", "segments": 2, "shortcut": "auto"}  # stage_shares has four
    config = load_config(None, {**recipe("sd15-hps-24gb"), **own})
    roles = [place.role for place in needed(config)]
    assert "model" in roles
    assert "shortcut" not in roles
    dry_run.check_places(config)  # `auto` would be refused for this model


def test_every_recipe_has_its_memory_listed():
    assert sorted(MEMORY_GB) == recipe_names()
    assert all(MEMORY_GB[name] * 1e9 <= GPU_24.total for name in MEMORY_GB if "24gb" in name)


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Downloads allowed (none is made), an empty cache, a GPU of 24 GB."""
    monkeypatch.setattr(machine, "hub_is_off", lambda: False)
    monkeypatch.setattr(machine, "hub_answers", lambda: True)
    monkeypatch.setattr(machine, "hub_cache", lambda: tmp_path / "cache")
    monkeypatch.setattr(machine, "devices", lambda: [GPU_24])
    monkeypatch.setattr(machine, "measure_speed", lambda device, precision: 1e13)
    monkeypatch.setattr(machine, "free_disk", lambda path: 10**12)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", slow_but_two(recipe_names()))
def test_a_recipe_that_is_not_here_is_drawn_and_checked(
    online: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
):
    if "24gb" not in name:
        large = machine.Device("cuda", "a GPU", 80 * 2**30, bf16=True)
        monkeypatch.setattr(machine, "devices", lambda: [large])
    assert main(["train", name, "--dry-run"]) == 0
    shown = capsys.readouterr()
    again = online / "again.yaml"
    again.write_text(shown.out, encoding="utf-8")
    config = load_config(again)
    assert config == load_config(None, recipe(name))
    text = " ".join(shown.err.split())
    if config.model == EMBEDDED:
        assert "jumps, update 0" in text
        assert "shortcut unguided, on this machine" in text
    else:
        last = f"stage {config.segments}: {config.num_steps} network calls, 1 with gradient"
        for part in (last, "to be downloaded", "600 that ship"):
            assert part in text
        assert (f"for {config.updates} updates" in text) == (config.updates is not None)
    [takes] = re.findall(r"about ([\d.]+) GB of", text)
    assert float(takes) == pytest.approx(MEMORY_GB[name], rel=0.04)  # as the recipes are listed
    assert "Nothing stands in the way" in text
    assert not (online / "runs").exists()


def test_the_time_of_a_run_is_that_of_its_updates_and_grids():
    own = {"method": "shortft", "updates": 40, "minutes": None}
    own["stage_shares"] = (0.4, 0.3, 0.2, 0.1)
    size = {"batch_size": 8, "accumulation": 2, "sample_every": 10, "sample_prompts": 3}
    config = load_config(None, {**recipe("emoji"), **own, **size})
    found = estimate(config, asset("emoji"), gpu=False, speed=1e9)
    each = [2 * found.cost.seconds(plan, recompute=config.recompute) for plan in found.stages]
    training, grids = run_seconds(config, found)
    assert training == pytest.approx(16 * each[0] + 12 * each[1] + 8 * each[2] + 4 * each[3])
    # Before the first update and after every ten; six pictures in two calls of at most four.
    grid = 2 * config.num_steps * found.cost.call.forward
    assert grids == pytest.approx(5 * grid)

    def grids_of(**change: int) -> float:
        return run_seconds(config.model_copy(update=change), found)[1] / grid

    assert grids_of(sample_every=15) == pytest.approx(4)  # 0, 15, 30, and the end
    assert grids_of(sample_every=0, sample_times=8) == pytest.approx(9)
    assert grids_of(sample_every=16, sample_times=4) == pytest.approx(7)  # 0 10 16 20 30 32 40
    assert grids_of(sample_every=0) == 0
    half = config.model_copy(update={"minutes": training / 120, "sample_every": 0})
    assert run_seconds(half, found)[0] == pytest.approx(training / 2)  # what comes first counts


def test_one_clear_line_where_something_stands_in_the_way(
    online: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def error(*options: str) -> str:
        assert main(["train", "sd15-hps-24gb", *options, "--dry-run"]) == 2
        last = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(last) == 1
        return last[0]

    assert "use --segments 4" in error("--segments", "5", "--stage-shares", "none")
    assert "no shortcut ships" in error("--shortcut", "auto")
    assert "--recompute" in error("--no-recompute", "--accumulation", "1")
    assert "--resolution 500" in error("--resolution", "500")
    (online / "run" / "checkpoints" / "update-000050").mkdir(parents=True)
    assert "pass --resume" in error("--output-dir", "run")
    monkeypatch.setattr(machine, "free_disk", lambda path: 10**9)
    assert "downloads take" in error()
    monkeypatch.setattr(machine, "hub_answers", lambda: False)
    assert "does not answer; check the network" in error()
    monkeypatch.setattr(machine, "hub_is_off", lambda: True)
    assert "HF_HUB_OFFLINE" in error()


def test_a_model_of_unknown_size_is_said_to_be_so(online: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--model", "owner/other", "--shortcut", "none", "--reward", "symmetry"]
    assert main(["train", *options, "--dry-run"]) == 0
    assert "not estimated" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["model", "shortcut", "reward hpsv2"])
def test_damaged_local_files_stand_in_the_way(
    damage: str,
    model: Path,
    shortcut: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(machine, "measure_speed", lambda device, precision: 1e13)
    place = shutil.copytree(model, tmp_path / "model")
    hps = tmp_path / "HPS_v2_compressed.pt"
    torch.save({"a": torch.ones(1)}, hps)
    options = ["--model", str(place), "--shortcut", str(shortcut), "--num-steps", "8"]
    options += ["--reward", "symmetry+hpsv2~0.5", "--reward-model", f"hpsv2={hps}"]
    options += ["--output-dir", str(tmp_path / "run")]
    assert main(["train", *options, "--dry-run"]) == 0
    assert "Nothing stands in the way" in capsys.readouterr().err
    if damage == "model":
        file = place / "unet" / "diffusion_pytorch_model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "reward hpsv2":
        hps.write_bytes(hps.read_bytes()[:-100])
    else:
        options[3] = str(lora_of(FAMILIES["sdxl"](), tmp_path / "sdxl.safetensors"))
    assert main(["train", *options, "--dry-run"]) == 2
    shown = capsys.readouterr().err
    assert "Nothing stands in the way" not in shown
    assert re.search(rf"^ *no +{damage} ", shown, re.MULTILINE)
    assert shown.splitlines()[-1].startswith("error: ")


def test_what_is_looked_for_is_what_training_loads(monkeypatch: pytest.MonkeyPatch):
    looked: list[tuple[str, str]] = []
    monkeypatch.setattr(places, "_cached", lambda source, file: looked.append((source, file)))
    assert places._shortcut_gb("owner/repo/few/steps.safetensors@0123abc") > 0
    assert looked == [("owner/repo@0123abc", "few/steps.safetensors")]
    config = Config(model="owner/one").model_copy(update={"pipeline": "owner/name"})
    assert "pipeline" in {place.role for place in needed(config) if place.download_gb}
    assert ("owner/name", "model_index.json") in looked


def test_members_of_an_ensemble_are_counted(online: Path):
    config = load_config(None, recipe("sd15-hps"))
    ensemble = config.model_copy(update={"reward": "pickscore+hpsv2~0.5", "held_out": None})
    mix = config.model_copy(update={"reward": "pickscore,hpsv2", "held_out": None})
    assert needed(ensemble) == needed(mix)
    assert {"reward pickscore", "reward hpsv2"} <= {place.role for place in needed(ensemble)}
    folder = configurations(config.model)
    assert folder is not None
    counted = [estimate(c, folder, gpu=True, speed=1e12) for c in (ensemble, mix)]
    assert counted[0].parts == counted[1].parts
    assert counted[0].parts["rewards"] > 0


def test_downloads_and_checkpoints_on_one_disk_are_added(
    online: Path, monkeypatch: pytest.MonkeyPatch
):
    config = load_config(None, recipe("sd15-hps-24gb"))
    folder = configurations(config.model)
    assert folder is not None
    found = estimate(config, folder, gpu=True, speed=1e12)
    downloads = dry_run.download_bytes(config)
    assert downloads > 6e9
    for free, fits in ((found.disk + downloads, True), (found.disk + downloads - 1, False)):
        monkeypatch.setattr(machine, "free_disk", lambda path, free=free: free)
        assert all(check.problem is None for check in dry_run.check_places(config))
        problem = dry_run.check_disk(config, found).problem
        assert problem is None if fits else "checkpoints and adapters with the downloads" in problem
    monkeypatch.setattr(machine, "same_disk", lambda first, second: False)
    assert dry_run.check_disk(config, found).problem is None


def test_a_shortcut_that_the_method_does_not_use_is_said_to_be_so(shortcut: Path):
    other = {**recipe("emoji"), "method": "thinned"}
    config = load_config(None, {**other, "shortcut": str(shortcut)})
    (said,) = [check for check in dry_run.check_places(config) if check.what == "shortcut"]
    assert "not used: --method thinned" in said.found
    assert said.problem is None
    usual = dry_run.check_places(load_config(None, other))
    assert all(check.what != "shortcut" for check in usual)


def test_what_a_single_file_is_taken_for_is_said(tmp_path: Path):
    """SD 2 and SD 2-base have one layout; their configurations differ in prediction and size."""
    key = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
    file = tmp_path / "sd2.safetensors"
    save_file({key: torch.zeros(1, 1024)}, file)
    model = {"model": str(file), "shortcut": "none"}
    (said,) = [c for c in dry_run.check_places(load_config(None, model)) if c.what == "pipeline"]
    assert said.found.startswith("stabilityai/stable-diffusion-2-1, as diffusers takes the file")
    assert said.found.endswith("predicts v at 768 pixels, models of 2-base need their own")
    assert said.problem is None
    named = load_config(None, model | {"pipeline": "owner/name"})
    (said,) = [c for c in dry_run.check_places(named) if c.what == "pipeline"]
    assert said.found.startswith("owner/name, ")
    (tmp_path / "model_index.json").write_text("{}")
    assert all(c.what != "pipeline" for c in dry_run.check_places(load_config(None, model)))


def test_whether_the_hub_answers(monkeypatch: pytest.MonkeyPatch):
    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(401)

        def log_message(self, *args: object) -> None:
            pass

    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(machine, "hub_is_off", lambda: False)
    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for login in ("", "user:s3cretpw@"):
            place = f"http://{login}127.0.0.1:{server.server_port}"
            monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", place)
            assert machine.hub_answers()
            assert ("hub", f"http://127.0.0.1:{server.server_port} answers") in [
                line[1:] for line in hub()
            ]
        server.shutdown()
    assert not machine.hub_answers()
    for place in ("nonsense", "https://user:s3cretpw@127.0.0.1:1", "https://user:s3cretpw@[::1"):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", place)
        assert not machine.hub_answers()
        assert "s3cretpw" not in str(_safely(hub))


def test_free_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch):
    """As CUDA tells it, with what others hold left out."""
    cuda = {
        "is_available": lambda: True,
        "is_bf16_supported": lambda including_emulation: not including_emulation,
        "device_count": lambda: 1,
        "get_device_name": lambda index: "a GPU",
        "get_device_properties": lambda index: SimpleNamespace(total_memory=80 * 10**9),
        "mem_get_info": lambda index: (1 * 10**9, 80 * 10**9),
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    (device,) = machine.devices()
    assert device.free() == 10**9
    config = load_config(None, recipe("emoji"))
    found = estimate(config, asset("emoji"), gpu=True, speed=1e9)
    check = dry_run.check_memory(config, found, device)
    assert "1.0 GB free now" in check.found
    assert "a GPU 1.0 GB are free; end what else runs there" in (check.problem or "")
    roomy = replace(device, free=lambda: 79 * 10**9)
    assert dry_run.check_memory(config, found, roomy).problem is None

    asked = []

    def taken(index: int) -> None:
        asked.append(index)
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")

    monkeypatch.setattr(torch.cuda, "mem_get_info", taken)
    (device,) = machine.devices()
    assert not asked  # asking takes memory of that GPU
    assert device.free() is None
    assert asked == [0]
    assert dry_run.check_memory(config, found, device).problem is None


def test_places_of_a_local_model_need_no_download(model: Path, shortcut: Path):
    config = Config(model=str(model), shortcut=str(shortcut))
    assert all(place.download_gb == 0 for place in needed(config))


@pytest.mark.parametrize("knows", [False, True])
def test_a_dry_run_warns_of_a_format_that_is_imitated(
    knows: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    cpu = machine.Device("cpu", "a CPU", 24 * 2**30, bf16=knows)
    monkeypatch.setattr(machine, "devices", lambda: [cpu])
    monkeypatch.setattr(machine, "measure_speed", lambda device, precision: 1e9)
    for precision, warned in (("bf16", not knows), ("fp32", False), ("auto", False)):
        own = {"precision": precision, "output_dir": str(tmp_path / "run")}
        dry_run.dry_run(load_config(None, {**recipe("emoji"), **own}))
        told = " ".join(capsys.readouterr().err.split())
        assert ("a CPU does not compute in it" in told) == warned
        name = precision if precision != "auto" else "bf16" if knows else "fp32"
        assert f"(a CPU), {name}" in told


def test_the_machine_in_words_names_its_devices(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "devices", lambda: [GPU_24, GPU_24])
    assert machine.in_words() == "2 x a GPU"
    cpu = machine.Device("cpu", "CPU, 2 cores", 2**30, bf16=True)
    monkeypatch.setattr(machine, "devices", lambda: [cpu])
    threads = torch.get_num_threads()
    assert re.fullmatch(rf".+: CPU, 2 cores, {threads} threads", machine.in_words())
