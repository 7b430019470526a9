"""Another decoder in place of a model's own: TAESD's small ones, or a repaired autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch

from shortft.errors import UserError
from shortft.families.files import UNREADABLE, first_line
from shortft.families.source import Source, find_source
from shortft.quiet import quiet

# Family → its published small decoder; their configurations do not tell them apart.
SMALL = {"sd": "taesd", "sdxl": "taesdxl", "sd3": "taesd3", "flux": "taef1"}


def load_decoder(decoder: str, source: Source, family: str, classes: tuple[str, ...]) -> Any:
    """An autoencoder for a model's latents; its own configuration says how they are scaled.

    Args:
        decoder: directory or hub id in diffusers' layout, ``owner/name@revision`` to pin one.
        source: the model.
        family: the name of its family.
        classes: names of diffusers' classes that the model's family decodes with.

    Raises:
        UserError: if it cannot be read, or is made for other latents.
    """
    place = find_source(decoder)
    name, right = Path(place.pipeline).name, SMALL.get(family)
    if name in SMALL.values() and name != right:
        remedy = "give another one" if right is None else f"give madebyollin/{right}"
        raise UserError(
            f"--decoder {decoder}: {name} is made for other latents than those of {source.name}, "
            f"a model of {family}; {remedy}"
        )
    where = {"revision": place.revision}
    try:
        with quiet():
            config = diffusers.AutoencoderKL.load_config(place.pipeline, **where)
            kind = {name: getattr(diffusers, name) for name in classes}[config["_class_name"]]
            vae = kind.from_pretrained(place.pipeline, use_safetensors=True, **where)
            own = _own(source)
    except UNREADABLE as error:
        raise UserError(
            f"--decoder {decoder}: cannot be loaded ({first_line(error)}); give a directory or hub "
            f"id of an {' or '.join(classes)}"
        ) from error
    alike = type(vae) is type(own)
    needed = _latents(own.config, alike)
    for what, number in _latents(vae.config, alike).items():
        if number != needed[what]:
            raise UserError(
                f"--decoder {decoder}: is made for latents of {what.format(number)}, {source.name} "
                f"has {needed[what]}; give a decoder of the same family"
            )
    return vae


def _own(source: Source) -> Any:
    """A model's own autoencoder without weights; its configuration has its defaults filled in."""
    config = diffusers.AutoencoderKL.load_config(
        source.pipeline, subfolder="vae", revision=source.revision
    )
    with torch.device("meta"):
        return getattr(diffusers, config["_class_name"]).from_config(config)


def _latents(config: Any, alike: bool) -> dict[str, Any]:
    """What an autoencoder's configuration says of its latents.

    Args:
        alike: whether it is compared with one of its class: classes scale by rules of their own.
    """
    said = {
        "{} channels": config.latent_channels,
        "{} pixels a side": 2 ** (len(config.block_out_channels) - 1),
    }
    if alike:
        said |= {
            "scale {}": config.get("scaling_factor"),
            "shift {}": config.get("shift_factor") or 0,
        }
    return said
