"""Another decoder in place of a model's own: TAESD's small ones, or a repaired autoencoder."""

from __future__ import annotations

from typing import Any

import diffusers

from shortft.errors import UserError
from shortft.families.files import UNREADABLE, first_line
from shortft.families.source import Source, find_source
from shortft.quiet import quiet


def load_decoder(decoder: str, source: Source, classes: tuple[str, ...]) -> Any:
    """An autoencoder for a model's latents; its own configuration says how they are scaled.

    Args:
        decoder: directory or hub id in diffusers' layout, ``owner/name@revision`` to pin one.
        source: the model.
        classes: names of diffusers' classes that the model's family decodes with.

    Raises:
        UserError: if it cannot be read, or is made for other latents.
    """
    place = find_source(decoder)
    where = {"revision": place.revision}
    try:
        with quiet():
            config = diffusers.AutoencoderKL.load_config(place.pipeline, **where)
            kind = {name: getattr(diffusers, name) for name in classes}[config["_class_name"]]
            vae = kind.from_pretrained(place.pipeline, use_safetensors=True, **where)
            own = diffusers.AutoencoderKL.load_config(
                source.pipeline, subfolder="vae", revision=source.revision
            )
    except UNREADABLE as error:
        raise UserError(
            f"--decoder {decoder}: cannot be loaded ({first_line(error)}); give a directory or hub "
            f"id of an {' or '.join(classes)}"
        ) from error
    made_for, needed = vae.config.latent_channels, own.get("latent_channels", 4)
    if made_for != needed:
        raise UserError(
            f"--decoder {decoder}: is made for latents of {made_for} channels, {source.name} has "
            f"{needed}; give a decoder of the same family"
        )
    return vae
