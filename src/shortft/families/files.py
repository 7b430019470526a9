"""Reading models through diffusers, with one clear line for whatever is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from shortft.assets import model_path
from shortft.errors import UserError
from shortft.quiet import quiet

DEFAULTS_FILE = "shortft.json"  # a model directory may name its own, see `own_defaults`
UNREADABLE = (OSError, ValueError, TypeError, RuntimeError, KeyError, SafetensorError)


def load_pipeline(
    pipeline_class: Any, model: str, *, revision: str | None = None, **options: Any
) -> Any:
    """A diffusers pipeline from the embedded name, a local directory or a hub id.

    Args:
        pipeline_class: what the model must be.
        revision: commit, tag or branch on the hub; None for its newest.
        options: for `from_pretrained`.

    Raises:
        UserError: if the model cannot be found, read or is of another family.
    """
    path = model_path(model)
    try:
        with quiet():
            index = pipeline_class.load_config(path, revision=revision)
            # Parts that were left out when the model was saved, such as SD3's T5.
            absent = {name: None for name, part in index.items() if part == [None, None]}
            return pipeline_class.from_pretrained(
                path, revision=revision, use_safetensors=True, **(absent | options)
            )
    except UNREADABLE as error:
        raise UserError(
            f"--model {model}: cannot be loaded as a {pipeline_class.__name__} "
            f"({first_line(error)}); give `emoji`, a directory saved by save_pretrained, or a hub "
            "id"
        ) from error


def own_defaults(model: str) -> dict[str, Any]:
    """What a model directory names in ``shortft.json``: guidance_scale, resolution; or nothing."""
    defaults = Path(model_path(model)) / DEFAULTS_FILE
    if not defaults.is_file():
        return {}
    return dict(json.loads(defaults.read_text(encoding="utf-8")))


def latent_side(
    source: str, resolution: int | None, own: int, *, factor: int, patch: int = 1
) -> int:
    """Height and width of the latents.

    Args:
        resolution: height and width of the images in pixels; None for the model's own.
        own: the model's own height and width of latents.
        factor: pixels per latent.
        patch: latents per token, along one side.

    Raises:
        UserError: if the latents would not be whole.
    """
    if resolution is None:
        return own
    if resolution <= 0 or resolution % (factor * patch):
        raise UserError(
            f"--resolution {resolution}: {source} needs a multiple of {factor * patch} pixels"
        )
    return resolution // factor


def first_line(error: BaseException) -> str:
    """An error's first line, for use inside another message."""
    return str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
