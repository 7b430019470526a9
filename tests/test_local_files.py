"""Local weights are looked at before a model is loaded: damage, pickles, other architectures."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import shortft.preflight.files
from shortft.config import Config
from shortft.errors import UserError
from shortft.preflight.disk import SMALL_FILES, check_room, disk_bytes
from shortft.preflight.files import check_local_files, problems
from shortft.quiet import quiet
from shortft.train import train
from test_bad_input import lora_of
from test_lora_files import FAMILIES
from test_reward_models import folder  # noqa: F401
from test_rewards import clip_dir  # noqa: F401
from tiny import tiny_family, tiny_pipeline
from tiny_families import tiny

NETWORK = "diffusion_pytorch_model.safetensors"


class Hostile:
    def __reduce__(self):
        return (os.system, ("touch hacked",))


def told(**settings: Any) -> str:
    """The one line that a configuration is refused with."""
    with pytest.raises(UserError) as caught:
        check_local_files(Config(**{"shortcut": "none", **settings}))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Models


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def pickled(file: Path) -> None:
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()


def overwritten(file: Path) -> None:
    file.write_bytes(b"<html>404</html>" * 20)


def indexed(*names: str) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        content = {"weight_map": {str(n): name for n, name in enumerate(names)}}
        file.with_name(f"{file.name}.index.json").write_text(json.dumps(content))
        file.unlink()

    return change


DAMAGE = {
    "cut": (cut, " bytes instead of "),
    "overwritten": (overwritten, "is not a safetensors file"),
    "pickled": (pickled, "holds no weights in .safetensors"),
    "absent": (lambda file: shutil.rmtree(file.parent), "holds no weights in .safetensors"),
    "a shard is absent": (indexed("a.safetensors"), "a.safetensors: cannot be read (No such file"),
    "shards are pickles": (indexed("a.bin"), "names a.bin"),
    "index": (lambda file: file.rename(f"{file}.index.json"), "damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_damaged_parts_of_a_model(part: str, name: str, model: Path, tmp_path: Path):
    change, message = DAMAGE[name]
    damaged = shutil.copytree(model, tmp_path / "model")
    file = "model.safetensors" if part == "text_encoder" else NETWORK
    change(damaged / part / file)
    line = told(model=str(damaged))
    assert line.startswith(f"--model {damaged}: {part}")
    assert message in line
    if part == "vae":  # not read where another one takes its place
        check_local_files(Config(model=str(damaged), decoder=str(model / "vae"), shortcut="none"))
        assert f"--decoder {damaged / 'vae'}: " in told(decoder=str(damaged / "vae"))


def test_a_damaged_single_file(model: Path, tmp_path: Path):
    file = tmp_path / "one.safetensors"
    shutil.copy(model / "unet" / NETWORK, file)
    cut(file)
    assert f"--model {file}: has " in told(model=str(file))


def test_whole_models_pass_in_every_way_of_saving_them(model: Path, tmp_path: Path):
    pipeline = tiny_pipeline()
    for name, options in (("parts", {"max_shard_size": "20KB"}), ("half", {"variant": "fp16"})):
        with quiet():
            pipeline.save_pretrained(tmp_path / name, **options)
    assert len(list((tmp_path / "parts" / "unet").glob("*.safetensors"))) > 2
    for place in ("emoji", model, tmp_path / "parts", tmp_path / "half"):
        check_local_files(Config(model=str(place), shortcut="none"))
    cut(next((tmp_path / "parts" / "unet").glob("*-00002-*.safetensors")))
    cut(tmp_path / "half" / "text_encoder" / "model.fp16.safetensors")
    assert "unet/diffusion_pytorch_model-00002-of-" in told(model=str(tmp_path / "parts"))
    assert "text_encoder/model.fp16.safetensors: has " in told(model=str(tmp_path / "half"))


# Shortcuts


@pytest.mark.parametrize("name", FAMILIES)
def test_a_lora_fits_its_own_family_alone(name: str, model: Path, tmp_path: Path):
    path = lora_of(FAMILIES[name](), tmp_path / "lora.safetensors")
    own = tmp_path / "own"
    with quiet():
        (tiny_pipeline() if name == "sd" else tiny(name)).save_pretrained(own)
    before = torch.random.get_rng_state()
    check_local_files(Config(model=str(own), shortcut=str(path)))
    torch.testing.assert_close(torch.random.get_rng_state(), before)
    if name != "sd":
        line = told(model=str(model), shortcut=str(path))
        assert line.startswith(f"{path}: cannot be loaded as a LoRA of {model} (")
    check_local_files(Config(model=str(model), method="draft_k", shortcut=str(path)))  # not read


def test_a_lora_against_a_model_of_the_hub(tmp_path: Path):
    """Whose outline ships; nothing of it is on this machine."""
    path = lora_of(tiny_family(), tmp_path / "lora.safetensors")
    model = "stabilityai/stable-diffusion-xl-base-1.0"
    assert f"cannot be loaded as a LoRA of {model}" in told(model=model, shortcut=str(path))
    check_local_files(Config(model="owner/unknown", shortcut=str(path)))


# Rewards


def compressed(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


PICKLES = {
    "code": (lambda file: torch.save({"a": Hostile()}, file), "refused, as it may run code"),
    "code, older layout": (
        lambda file: torch.save({"a": Hostile()}, file, _use_new_zipfile_serialization=False),
        "refused, as it may run code",
    ),
    "cut": (cut, "is damaged or incomplete"),
    "overwritten": (overwritten, "does not hold weights alone"),
    "compressed": (compressed, "is a compressed archive"),
}


@pytest.mark.parametrize("name", PICKLES)
@pytest.mark.parametrize("reward", ["hpsv2", "symmetry+hpsv2~0.5", "clip"])
def test_pickles_of_rewards(name, reward, folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    change, message = PICKLES[name]
    file = Path(shutil.copy(folder / "HPS_v2_compressed.pt", tmp_path))
    change(file)
    held_out = "hpsv2" if reward == "clip" else None
    line = told(reward=reward, held_out=held_out, reward_model=f"hpsv2={file}")
    assert message in line
    assert "weights_only" not in line
    assert not (tmp_path / "hacked").exists()


def test_whole_pickles_are_not_read(folder, tmp_path, monkeypatch):  # noqa: F811
    """But where a checksum is given, or in the layout that must be read to be known."""
    read = []
    monkeypatch.setattr(
        shortft.preflight.files, "read_weights", lambda place, name: read.append(place.source)
    )
    file = folder / "HPS_v2_compressed.pt"
    older = tmp_path / "HPS_v2_compressed.pt"
    torch.save({"a": torch.ones(1)}, older, _use_new_zipfile_serialization=False)
    for place in (file, older, f"{file}#{'0' * 64}"):
        check_local_files(Config(reward="hpsv2", reward_model=f"hpsv2={place}"))
    assert read == [str(older), str(file)]


@pytest.mark.parametrize("change", [cut, pickled])
def test_directories_of_rewards(change, folder, tmp_path):  # noqa: F811
    place = shutil.copytree(folder, tmp_path / "models")
    rewards = ("clip", "pickscore", "aesthetic")
    for name in rewards:
        check_local_files(Config(reward=name, reward_model=f"{name}={place}"))
    change(place / "model.safetensors")
    for name in rewards:
        line = told(reward=name, reward_model=f"{name}={place}")
        assert str(place) in line
        assert "bytes instead of" in line or "holds no weights in .safetensors" in line


def test_every_problem_is_listed_by_its_role(model: Path, folder, tmp_path):  # noqa: F811
    damaged = shutil.copytree(model, tmp_path / "model")
    cut(damaged / "unet" / NETWORK)
    file = tmp_path / "HPS_v2_compressed.pt"
    overwritten(file)
    models = f"hpsv2={file},pickscore={folder}"
    config = Config(
        model=str(damaged), shortcut="none", reward="hpsv2,pickscore", reward_model=models
    )
    assert [role for role, _ in problems(config)] == ["model", "reward hpsv2"]


# Room on the disk


def test_room_is_counted_as_a_run_takes_it(settings, monkeypatch):
    config = Config(**{**settings, "ema": 0.5})
    train(config)

    def numbers(*folders: Path) -> int:
        """Of tensors; headers are small where models are not."""
        files = [file for place in folders for file in place.glob("*.safetensors")]
        tensors = [t for file in files for name, t in load_file(file).items() if "step" not in name]
        return sum(tensor.numel() for tensor in tensors)

    root = config.output_dir
    newest = max((root / "checkpoints").iterdir())
    taken = 4 * (numbers(newest) * (config.keep_checkpoints + 1) + 3 * numbers(root / "adapter"))
    fresh = config.model_copy(update={"output_dir": root / "new"})
    needed = disk_bytes(fresh, numbers(root / "adapter"))
    assert needed == taken + SMALL_FILES
    for free in (needed - 1, needed):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        if free < needed:
            with pytest.raises(UserError, match="but the run's checkpoints and adapters take"):
                check_room(fresh)
        else:
            check_room(fresh)
    # One that goes on has most of it already: one more checkpoint will do.
    (root / "checkpoints" / "as large as all").write_bytes(bytes(taken))
    assert disk_bytes(config, numbers(root / "adapter")) == 4 * numbers(newest) + SMALL_FILES


@pytest.mark.parametrize("what", ["model", "shortcut", "reward", "disk"])
def test_training_tells_all_of_it_before_a_model_is_loaded(what, settings, tmp_path, monkeypatch):
    def loads(*args: object, **options: object) -> None:
        raise AssertionError("a model was loaded before the mistake was told")

    monkeypatch.setattr("shortft.trainer.load_family", loads)
    monkeypatch.chdir(tmp_path)
    if what == "model":
        settings["model"] = str(shutil.copytree(settings["model"], tmp_path / "model"))
        cut(tmp_path / "model" / "unet" / NETWORK)
    elif what == "shortcut":
        settings["shortcut"] = str(lora_of(FAMILIES["sdxl"](), tmp_path / "sdxl.safetensors"))
    elif what == "reward":
        torch.save({"a": Hostile()}, tmp_path / "HPS_v2_compressed.pt")
        settings |= {"reward": "hpsv2", "reward_model": "hpsv2=HPS_v2_compressed.pt"}
    else:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError):
        train(Config(**settings))
    assert not (tmp_path / "hacked").exists()
