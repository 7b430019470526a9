"""Model families: pipeline class → ours. Adding one is one file, one line, one parity test."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from shortft.errors import UserError
from shortft.quiet import quiet

if TYPE_CHECKING:
    from shortft.families.base import Family

# The class named in model_index.json → our file and class.
FAMILIES = {
    "StableDiffusionPipeline": ("sd", "StableDiffusion"),
    "StableDiffusionXLPipeline": ("sdxl", "StableDiffusionXL"),
    "StableDiffusion3Pipeline": ("sd3", "StableDiffusion3"),
    "FluxPipeline": ("flux", "Flux"),
}


def default_device() -> str:
    """The GPU where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_family(
    model: str,
    *,
    precision: str = "fp32",
    device: str | None = None,
    resolution: int | None = None,
) -> Family:
    """Load a model by the embedded name, a local directory or a hub id.

    Args:
        model: a hub id may pin a revision (commit, tag or branch): ``owner/name@revision``.
        precision: of the frozen networks, "fp32" or "bf16".
        device: where they live; None = `default_device()`.
        resolution: height and width of the images in pixels; None for the model's own.

    Raises:
        UserError: if it cannot be found or belongs to no supported family.
    """
    from diffusers import DiffusionPipeline

    from shortft.assets import model_path
    from shortft.families.files import UNREADABLE, first_line

    if model.endswith((".safetensors", ".ckpt")):
        raise UserError(
            f"--model {model}: single-file checkpoints are not read; convert it once by "
            "diffusers' from_single_file and save_pretrained, and give that directory"
        )
    source, revision = model, None
    if "@" in model and not Path(model).exists():
        source, _, revision = model.rpartition("@")
    try:
        with quiet():
            index = DiffusionPipeline.load_config(model_path(source), revision=revision)
    except UNREADABLE as error:
        raise UserError(
            f"--model {model}: no model there ({first_line(error)}); give `emoji`, a directory "
            "saved by save_pretrained, or a hub id"
        ) from error
    name = str(index.get("_class_name"))
    if name not in FAMILIES:
        raise UserError(
            f"--model {model}: is a {name}; supported are {', '.join(sorted(FAMILIES))}"
        )
    file, class_name = FAMILIES[name]
    family_class = getattr(importlib.import_module(f"shortft.families.{file}"), class_name)
    family: Family = family_class.load(
        source,
        precision=precision,
        device=device or default_device(),
        revision=revision,
        resolution=resolution,
    )
    family.source = model
    return family
