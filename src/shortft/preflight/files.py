"""Files on this machine that a run reads, looked at before anything heavy is loaded.

Of weights in safetensors only headers are read. What the hub's cache holds is left to the hub's
own checksums.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from shortft.assets import EMBEDDED, model_path
from shortft.config import Config
from shortft.errors import UserError
from shortft.families.single_file import shapes
from shortft.inputs import WEIGHTS
from shortft.methods import METHODS
from shortft.networks import SHORTCUT
from shortft.paths import is_dir, is_file
from shortft.preflight.outline import ENCODERS, outline
from shortft.rewards.files import find_file, read_weights
from shortft.rewards.places import FILES, Place, reward_places
from shortft.weights_file import check_weights_file

NETWORK, TRANSFORMER = "diffusion_pytorch_model", "model"  # diffusers' names, and transformers'
AGAIN = "copy or download it again"


def check_local_files(config: Config) -> None:
    """Whether the model, decoder, shortcut and reward models on this machine can be read.

    Raises:
        UserError: for the first that is damaged, a pickle with code, or of another architecture.
    """
    for _, error in problems(config):
        raise error


def problems(config: Config) -> Iterator[tuple[str, UserError]]:
    """What `check_local_files` tells, for all of them: the role as in `places.needed`, and why."""
    for role, look in _looks(config):
        try:
            look()
        except UserError as error:
            yield role, error


def _looks(config: Config) -> Iterator[tuple[str, Callable[[], None]]]:
    """(role, what raises `UserError`) of every local place."""
    model, decoder = config.model, config.decoder
    option, place = f"--model {model}", Path(model_path(model))
    if model == EMBEDDED or is_dir(model):
        yield "model", partial(_check_pipeline, option, place, decoder is not None)
    elif is_file(model):
        yield "model", partial(_check_single_file, option, place)
    if decoder is not None and is_dir(decoder):
        yield "decoder", partial(_check_weights, f"--decoder {decoder}", Path(decoder), NETWORK)
    if METHODS[config.method].uses_segments and is_file(config.shortcut):
        yield "shortcut", partial(_check_shortcut, config)
    names = config.scorers
    for name, reward in reward_places(names, config.reward_model).items():
        if reward.is_local:
            yield f"reward {name}", partial(_check_reward, reward)


def _check_pipeline(option: str, folder: Path, other_decoder: bool) -> None:
    """The networks of a directory in diffusers' layout; what is no such directory is told soon."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        parts = [name for name, kind in index.items() if isinstance(kind, list) and kind[1]]
    except (OSError, ValueError, AttributeError, IndexError):
        return
    for part in parts:
        if part in ("unet", "transformer") or (part == "vae" and not other_decoder):
            _check_weights(option, folder / part, NETWORK)
        elif part in ENCODERS:
            _check_weights(option, folder / part, TRANSFORMER)


def _check_single_file(option: str, file: Path) -> None:
    check_weights_file(option, file, AGAIN)
    shapes(file)  # refuses weights that need scales


def _check_weights(option: str, folder: Path, stem: str) -> None:
    """The headers of one network's weights."""
    for file in _weights(option, folder, stem):
        check_weights_file(f"{option}: {folder.name}/{file.name}", file, AGAIN)


def _weights(option: str, folder: Path, stem: str) -> list[Path]:
    """The files of one network: one or several, in full or half precision."""
    for middle in ("", ".fp16"):
        file = folder / f"{stem}{middle}{WEIGHTS}"
        if file.is_file():
            return [file]
        for index in (f"{stem}{middle}{WEIGHTS}.index.json", f"{stem}{WEIGHTS}.index{middle}.json"):
            if (folder / index).is_file():
                return _shards(f"{option}: {folder.name}/{index}", folder / index)
    if any(folder.glob(f"*{WEIGHTS}")):
        return []  # of a name that the loader may know
    raise UserError(
        f"{option}: {folder.name} holds no weights in {WEIGHTS}; pickles may run code and are not "
        "read: give a directory saved by save_pretrained"
    )


def _shards(name: str, index: Path) -> list[Path]:
    """The files that an index names."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        files = sorted({str(file) for file in content["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{name}: damaged; {AGAIN}") from None
    for file in files:
        if not file.endswith(WEIGHTS):
            raise UserError(f"{name}: names {file}; give a model whose weights are {WEIGHTS}")
    return [index.parent / file for file in files]


def _check_shortcut(config: Config) -> None:
    """A LoRA's file, and whether it fits the model's network, where its configuration is known."""
    path = Path(config.shortcut)
    check_weights_file(f"--shortcut {path}", path, "give a LoRA's .safetensors file")
    family = outline(config)
    if family is not None:
        family.load_lora(family.denoiser, path, SHORTCUT)


def _check_reward(place: Place) -> None:
    """A reward model's pickle, or its directory in transformers' layout."""
    if place.reward not in FILES:
        _check_weights(str(place), Path(place.source), TRANSFORMER)
        return
    path = find_file(place, FILES[place.reward])
    if place.sha256 is not None or not _surely_without_code(path):
        read_weights(place, path.name)  # all of it, and tells what is wrong
    if place.reward == "aesthetic" and (path.parent / "config.json").is_file():
        _check_weights(str(place), path.parent, TRANSFORMER)  # its CLIP


def _surely_without_code(path: Path) -> bool:
    """Whether a pickle is whole and names no code, without reading its tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                return False  # may swell without end
        return not torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # older layouts and damage: reading tells them apart
        return False
