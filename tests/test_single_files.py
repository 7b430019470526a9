"""Single files in the original layouts give the pipeline that they were written from, exactly."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import single_files
from shortft.assets import asset
from shortft.config import Config
from shortft.errors import UserError
from shortft.families import load_family, open_pipeline
from shortft.families.source import find_source
from shortft.preflight.files import problems
from shortft.preflight.places import configurations
from shortft.quiet import quiet
from tiny import save_tiny
from tiny_families import tiny

SDXL_ALONE = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"
WIDE = os.environ.get("SHORTFT_WIDE") == "1"  # FLUX's layout fixes its width: 2 GB of weights


def written(pipe: Any, root: Path, write: Callable[..., Path], *absent: str, **options: Any) -> Any:
    """A pipeline's configuration without weights (but for `absent`), and its single file."""
    with quiet():
        pipe.save_pretrained(root / "layout")
    for weights in (root / "layout").rglob("*.safetensors"):
        if weights.parent.name not in absent:
            weights.unlink()
    return load(root / "layout", write(pipe, root / "model.safetensors", **options))


def load(layout: Path, file: Path) -> Any:
    return open_pipeline(str(file), str(layout))


def assert_same(ours: Any, theirs: Any) -> None:
    for part, module in theirs.components.items():
        if isinstance(module, nn.Module):
            expected = dict(module.state_dict())
            found = getattr(ours, part).state_dict()
            assert found.keys() == expected.keys(), part
            for name, tensor in expected.items():
                assert torch.equal(found[name], tensor), (part, name)


@pytest.mark.parametrize("write", [single_files.write_sd, single_files.write_sd2])
def test_stable_diffusion_1_and_2(tmp_path: Path, write: Callable[..., Path]):
    pipe = tiny("sd")
    assert_same(written(pipe, tmp_path, write), pipe)


def test_sdxl(tmp_path: Path):
    pipe = tiny("sdxl", projection=24)  # OpenCLIP's layout takes width and projection for one
    assert_same(written(pipe, tmp_path, single_files.write_sdxl), pipe)


def test_a_file_is_counted_by_the_outline_of_the_model_that_it_is_taken_for(tmp_path: Path):
    file = single_files.write_sd(tiny("sd"), tmp_path / "sd.safetensors")
    assert configurations(str(file)) == asset("outlines", "sd15")
    large = ("model.diffusion_model.out.2.bias", SDXL_ALONE)  # what diffusers tells SDXL by
    file = single_files.write(tmp_path / "sdxl.safetensors", dict.fromkeys(large, torch.ones(1)))
    assert configurations(str(file)) == asset("outlines", "sdxl")
    lora = single_files.write(tmp_path / "lora.safetensors", {"a.lora_A.weight": torch.ones(1)})
    assert configurations(str(lora)) is None


@pytest.mark.parametrize("texts", [True, False])
def test_sd3_with_and_without_text_encoders(tmp_path: Path, texts: bool):
    """SD3.5's file has none: they come from the configuration's directory."""
    pipe = tiny("sd3")
    pipe.text_encoder.text_projection.weight.data = torch.eye(12)  # the file leaves it out
    absent = () if texts else ("text_encoder", "text_encoder_2", "text_encoder_3")
    assert_same(written(pipe, tmp_path, single_files.write_sd3, *absent, texts=texts), pipe)


@pytest.mark.skipif(not WIDE, reason="set SHORTFT_WIDE=1: takes 5 GB of memory and 2 GB of disk")
def test_flux(tmp_path: Path):
    pipe = tiny("flux", heads=24, head_dim=128, layers=1)
    absent = ("text_encoder", "text_encoder_2", "vae")
    assert_same(written(pipe, tmp_path, single_files.write_flux, *absent), pipe)


def test_flux_under_diffusers_own_names(tmp_path: Path):
    pipe = tiny("flux")

    def write(pipe: Any, path: Path) -> Path:
        return single_files.write(path, pipe.transformer.state_dict())

    absent = ("text_encoder", "text_encoder_2", "vae")
    assert_same(written(pipe, tmp_path, write, *absent), pipe)
    (tmp_path / "layout" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no vae, nor does .*; give a --pipeline that has"):
        load(tmp_path / "layout", tmp_path / "model.safetensors")


@pytest.mark.parametrize("named", [single_files.write_flux2, None])
def test_flux2(tmp_path: Path, named: Callable[..., Path] | None):
    """Under BFL's names or diffusers' own; all but the transformer comes from the directory."""
    pipe = tiny("flux2", distilled=True)

    def write(pipe: Any, path: Path) -> Path:
        return single_files.write(path, pipe.transformer.state_dict())

    found = written(pipe, tmp_path, named or write, "text_encoder", "vae")
    assert_same(found, pipe)
    assert found.config.is_distilled
    state = load_file(tmp_path / "model.safetensors")
    state.pop(next(iter(state)))
    save_file(state, tmp_path / "holes.safetensors")
    with pytest.raises(UserError, match="lacks some weights that"):
        load(tmp_path / "layout", tmp_path / "holes.safetensors")
    (tmp_path / "layout" / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no text_encoder, nor does"):
        load(tmp_path / "layout", tmp_path / "model.safetensors")


def test_a_file_draws_what_its_pipeline_draws(tmp_path: Path):
    """From the file beside its model_index.json, as in the repositories on the hub."""
    from test_families import ours, theirs

    pipe = tiny("sd")
    with quiet():
        pipe.save_pretrained(tmp_path)
    file = single_files.write_sd(pipe, tmp_path / "model.safetensors")
    shutil.rmtree(tmp_path / "unet")  # only its configuration is needed
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps(dict(pipe.unet.config)))
    family = load_family(str(file), device="cpu")
    assert (family.name, family.source) == ("sd", str(file))
    torch.testing.assert_close(ours(family), theirs(pipe, 16), atol=1e-5, rtol=0)


def test_files_that_do_not_fit(tmp_path: Path):
    pipe = tiny("sd")
    written(pipe, tmp_path, single_files.write_sd)
    layout, file = tmp_path / "layout", tmp_path / "model.safetensors"
    state = load_file(file)

    def refuse(name: str, state: dict[str, Tensor], match: str) -> None:
        save_file(state, tmp_path / name)
        with pytest.raises(UserError, match=match):
            load(layout, tmp_path / name)

    key = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
    holes = {name: tensor for name, tensor in state.items() if name != key}
    named = "lacks 1 weights of the text_encoder, such as final_layer_norm.bias, that .* describes"
    refuse("a.safetensors", holes, named)
    key = "model.diffusion_model.out.2.weight"
    holes = {name: tensor for name, tensor in state.items() if name != key}
    refuse("a.safetensors", holes, "lacks some weights that .* check that the file is a whole")
    wide = state | {key: torch.zeros(9, 8, 3, 3)}
    refuse("b.safetensors", wide, r"cannot be loaded as a StableDiffusionPipeline \(")
    unrelated = {"some.weight": torch.zeros(2)}
    refuse("c.safetensors", unrelated, "holds no text_encoder, nor does")
    with quiet():
        tiny("sdxl").save_pretrained(tmp_path / "sdxl")
    with pytest.raises(UserError, match="cannot be loaded as a StableDiffusionXLPipeline"):
        load(tmp_path / "sdxl", file)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"cannot be read .* cut off, download it again"):
        load(layout, file)


@pytest.mark.parametrize("key", ["model.diffusion_model.out.2.weight_scale", "scaled_fp8"])
def test_weights_with_scales_beside_them_are_refused(tmp_path: Path, key: str):
    """diffusers drops the scales and loads the rest as if it were the weights."""
    pipe = tiny("sd")
    written(pipe, tmp_path, single_files.write_sd)
    layout, file = tmp_path / "layout", tmp_path / "scaled.safetensors"
    state = load_file(tmp_path / "model.safetensors")
    eighth = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in state.items()}
    save_file(eighth, file)
    load(layout, file)  # without scales fp8 is what it says
    save_file(eighth | {key: torch.ones(1)}, file)
    said = f"--model {file}: its weights are in 8 or 4 bits with scales .*{key}"
    with pytest.raises(UserError, match=said):
        load(layout, file)
    with pytest.raises(UserError, match=said):
        load_family(str(file))  # before anything is asked of a hub
    assert [role for role, _ in problems(Config(model=str(file), shortcut="none"))] == ["model"]


def test_files_that_say_what_they_predict(tmp_path: Path):
    """By the keys that ComfyUI goes by; the scheduler must say the same."""
    pipe = tiny("sd")
    written(pipe, tmp_path, single_files.write_sd)
    layout, marked = tmp_path / "layout", tmp_path / "marked.safetensors"
    state = load_file(tmp_path / "model.safetensors")

    def load_marked(*keys: str) -> Any:
        save_file(state | {key: torch.tensor([]) for key in keys}, marked)
        return load_family(str(marked), pipeline=str(layout), device="cpu")

    said = "its key v_pred says .* scheduler of .*layout says epsilon; give --pipeline a config"
    with pytest.raises(UserError, match=said):
        load_marked("v_pred")
    scheduler = layout / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps({**config, "prediction_type": "v_prediction"}))
    assert load_marked("v_pred").schedule(4).prediction_type == "v_prediction"
    for key, noise in {"ztsnr": "of zero terminal SNR", "edm_vpred.sigma_max": "EDM's"}.items():
        with pytest.raises(UserError, match=f"its key {key} says that it was trained on .*{noise}"):
            load_marked("v_pred", key)


def test_places_that_are_wrong(tmp_path: Path):
    save_file({"some.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    file = str(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"stable-diffusion-v1-5/.*give --pipeline a directory"):
        load_family(file)  # diffusers takes it for SD 1.5, whose configuration is out of reach
    with pytest.raises(UserError, match="--pipeline owner/name: is for a single file; emoji has"):
        load_family("emoji", pipeline="owner/name")
    assert Config(model=file, pipeline="owner/name@v1").pipeline == "owner/name@v1"
    assert find_source(file, "owner/name@v1").revision == "v1"
    for model, wrong in {
        "owner/model.safetensors": "no such model; give 'emoji', a directory, a .safetensors file",
        "owner/model.ckpt": "is a pickle, which may run code, and is not read",
    }.items():
        with pytest.raises(UserError, match=f"--model {model}: {wrong}"):
            Config(model=model)
    with pytest.raises(UserError, match="--pipeline nowhere: no such model; give a directory or"):
        Config(model=file, pipeline="nowhere")


def test_a_pinned_revision_is_the_one_that_is_read(tmp_path: Path, monkeypatch):
    """Two commits of one repository in the hub's own cache, one of them tagged."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--tiny"
    commits = {"a" * 40: "main", "b" * 40: "v2"}
    for number, (commit, name) in enumerate(commits.items()):
        snapshot = save_tiny(repository / "snapshots" / commit)
        weights = snapshot / "unet" / "diffusion_pytorch_model.safetensors"
        state = load_file(weights)
        state["conv_out.bias"].fill_(number + 1)
        save_file(state, weights, {"format": "pt"})
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    for revision, value in {"": 1, "@main": 1, "@v2": 2, f"@{'b' * 40}": 2}.items():
        family = load_family(f"owner/tiny{revision}", device="cpu")
        assert family.source == f"owner/tiny{revision}"
        assert set(family.denoiser.conv_out.bias.tolist()) == {value}  # type: ignore[union-attr]
        pipe = open_pipeline(f"owner/tiny{revision}")
        assert set(pipe.unet.conv_out.bias.tolist()) == {value}
    with pytest.raises(UserError, match=r"--model owner/tiny@v3: no model there"):
        load_family("owner/tiny@v3")
