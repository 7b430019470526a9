"""Where models lie: on this machine, or on the hub and how much there is to download.

Asks no network: what the hub's cache does not hold counts as still to be downloaded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from shortft.assets import EMBEDDED, asset, model_path
from shortft.config import Config
from shortft.inputs import WEIGHTS
from shortft.methods import METHODS
from shortft.rewards.places import BERT, CLIP_L, COMPANIONS, FILES, VIT_H, reward_places
from shortft.shortcuts import AUTO, BASE_JUMPS, PUBLISHED, ships

# Hub id → outline of the released model (see tools/outlines.py), and GB that a download takes:
# denoiser, decoder and text encoders in the number format in which they are published.
KNOWN = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": ("sd15", 4.3),
    "CompVis/stable-diffusion-v1-4": ("sd15", 4.3),
    "stabilityai/stable-diffusion-xl-base-1.0": ("sdxl", 13.9),
    "stabilityai/stable-diffusion-3-medium-diffusers": ("sd3", 15.4),
    "stabilityai/stable-diffusion-3.5-medium": ("sd35", 15.9),
    "black-forest-labs/FLUX.1-dev": ("flux", 33.7),
    "black-forest-labs/FLUX.2-klein-base-4B": ("flux2", 16.0),
}
REWARD_GB = {"pickscore": 3.9, "hpsv2": 2.0, "hpsv2.1": 2.0, "imagereward": 1.8, "aesthetic": 0.01}
# What a reward takes from the hub besides its weights: what for, where from, GB, one file.
BESIDE = {
    "pickscore": ("tokenizer", VIT_H, 0.01, "vocab.json"),
    "hpsv2": ("tokenizer", VIT_H, 0.01, "vocab.json"),
    "hpsv2.1": ("tokenizer", VIT_H, 0.01, "vocab.json"),
    "imagereward": ("tokenizer", BERT, 0.01, "vocab.txt"),
    "aesthetic": ("CLIP", CLIP_L, 1.7, "model.safetensors"),
}
SMALL_GB = 0.5  # a LoRA, a small decoder
HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w.-]+))?")


@dataclass(frozen=True)
class Place:
    """One thing that a run needs.

    Attributes:
        role: what for, as its option is called.
        name: as the configuration names it.
        download_gb: size of what is still to be fetched, about; 0 where it is on this machine.
    """

    role: str
    name: str
    download_gb: float = 0.0


def needed(config: Config) -> list[Place]:
    """The model, decoder, shortcut and reward models of a run."""
    places = [Place("model", config.model, _model_gb(config.model))]
    if config.pipeline is not None:
        missing = _missing(config.pipeline, SMALL_GB, ["model_index.json"])
        places.append(Place("pipeline", config.pipeline, missing))
    if config.decoder is not None:
        places.append(Place("decoder", config.decoder, _missing(config.decoder, SMALL_GB)))
    own = METHODS[config.method].shortcut
    if own is not None:
        name = own if config.shortcut == AUTO else config.shortcut
        places.append(Place("shortcut", name, _shortcut_gb(name)))
    names = config.scorers
    for name, place in reward_places(names, config.reward_model).items():
        files = [FILES.get(name, "model.safetensors")]
        gb = REWARD_GB.get(name, 1.0)
        source = f"{place.source}@{place.revision}"
        places.append(
            Place(
                f"reward {name}",
                place.source,
                0.0 if place.is_local else _missing(source, gb, files),
            )
        )
        if name in BESIDE and not place.is_local:
            role, repo, gb, file = BESIDE[name]
            missing = _missing(f"{repo}@{COMPANIONS[repo]}", gb, [file])
            places.append(Place(f"{role} of {name}", repo, missing))
    return places


def specs(config: Config) -> list[str]:
    """The rewards that a run loads: what it maximises, and what only measures."""
    return [config.reward, *([config.held_out] if config.held_out else [])]


def configurations(model: str) -> Path | None:
    """A directory with a model's configurations in diffusers' layout; None where none is known."""
    if model == EMBEDDED or Path(model).is_dir():
        return Path(model_path(model))
    if Path(model).is_file():
        if (Path(model).parent / "model_index.json").is_file():
            return Path(model).parent
        from shortft.families.single_file import recognised

        published = recognised(Path(model))
        if published is None:
            return None
        model = published
    cached = _cached(model, "model_index.json")
    if cached is not None and (cached.parent / "vae" / "config.json").is_file():
        return cached.parent
    repo = model.partition("@")[0]
    return asset("outlines", KNOWN[repo][0]) if repo in KNOWN else None


def assumed_pipeline(config: Config) -> str | None:
    """The published model that a single file without a configuration is taken for."""
    file = Path(config.model)
    if config.pipeline is not None or not file.is_file():
        return None
    if (file.parent / "model_index.json").is_file():
        return None
    from shortft.families.single_file import recognised

    return recognised(file)


def _model_gb(model: str) -> float:
    if model == EMBEDDED or Path(model).exists():
        return 0.0
    weights = [
        f"{part}/diffusion_pytorch_model{middle}{WEIGHTS}"
        for part in ("unet", "transformer")
        for middle in ("", "-00001-of-00003", "-00001-of-00002")
    ]
    return _missing(model, KNOWN.get(model.partition("@")[0], ("", 5.0))[1], weights)


def _shortcut_gb(name: str) -> float:
    if ships(name) or name in BASE_JUMPS or Path(name).is_file():
        return 0.0
    if name in PUBLISHED:
        return _missing(PUBLISHED[name].repo, SMALL_GB, [PUBLISHED[name].file])
    place, at, revision = name.partition("@")
    owner, repo, file = place.split("/", 2)
    return _missing(f"{owner}/{repo}{at}{revision}", SMALL_GB, [file])


def _missing(source: str, gb: float, files: list[str] | None = None) -> float:
    """`gb` unless a directory, or the cache with one of `files`, has it."""
    if Path(source).is_dir():
        return 0.0
    candidates = files or ["diffusion_pytorch_model.safetensors"]
    return 0.0 if any(_cached(source, file) for file in candidates) else gb


def _cached(source: str, file: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    match = HUB_ID.fullmatch(source)
    if match is None:
        return None
    found = try_to_load_from_cache(match["repo"], file, revision=match["revision"])
    return Path(found) if isinstance(found, str) else None
