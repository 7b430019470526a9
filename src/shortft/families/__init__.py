"""Model families: pipeline class → ours. Adding one is one file, one line, one parity test."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from shortft.errors import UserError
from shortft.quiet import quiet

if TYPE_CHECKING:
    from shortft.families.base import Family
    from shortft.families.source import Source

# The class named in model_index.json → our file and class.
FAMILIES = {
    "StableDiffusionPipeline": ("sd", "StableDiffusion"),
    "StableDiffusionXLPipeline": ("sdxl", "StableDiffusionXL"),
    "StableDiffusion3Pipeline": ("sd3", "StableDiffusion3"),
    "FluxPipeline": ("flux", "Flux"),
    "Flux2KleinPipeline": ("flux2", "Flux2Klein"),
}


def default_device() -> str:
    """The GPU where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_family(
    model: str,
    *,
    pipeline: str | None = None,
    decoder: str | None = None,
    precision: str = "fp32",
    device: str | None = None,
    resolution: int | None = None,
    sharded: bool = False,
) -> Family:
    """Load a model by the embedded name, a local directory, a hub id or a single file.

    Args:
        model: a hub id may pin a revision (commit, tag or branch): ``owner/name@revision``.
        pipeline: for a single file, the directory or hub id whose configuration it has.
        decoder: directory or hub id of a decoder in place of the model's own.
        precision: of the frozen networks, "fp32" or "bf16".
        device: where they live; None = `default_device()`.
        resolution: height and width of the images in pixels; None for the model's own.
        sharded: let each process of a run keep a part of the denoiser's weights alone.

    Raises:
        UserError: if it cannot be found or belongs to no supported family.
    """
    source, family_class = _find(model, pipeline)
    family: Family = family_class.load(
        source,
        precision=precision,
        device=device or default_device(),
        resolution=resolution,
        decoder=decoder,
        sharded=sharded,
    )
    return family


def open_pipeline(model: str, pipeline: str | None = None, precision: str = "fp32") -> Any:
    """A model's whole diffusers pipeline, for tools that save it; as `load_family`.

    Args:
        precision: of all its weights, "fp32" or "bf16".
    """
    import torch

    source, family_class = _find(model, pipeline)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return family_class.open(source, dtype, **family_class.load_options)


def _find(model: str, pipeline: str | None) -> tuple[Source, Any]:
    """A model's place and its family's class."""
    from diffusers import DiffusionPipeline

    from shortft.families.files import GATED, UNREADABLE, first_line
    from shortft.families.source import find_source

    source = find_source(model, pipeline)
    try:
        with quiet():
            index = DiffusionPipeline.load_config(source.pipeline, revision=source.revision)
        if not isinstance(index, dict):
            raise ValueError("model_index.json holds no table")
    except UNREADABLE as error:
        reason = first_line(error)
        if source.file is not None:
            raise UserError(
                f"--model {model}: its configuration cannot be found in {source.pipeline} "
                f"({reason}); give --pipeline a directory saved by "
                "save_pretrained, or a hub id"
            ) from error
        if reason == GATED:
            raise UserError(f"--model {model}: {reason}") from error
        raise UserError(
            f"--model {model}: no model there ({reason}); give `emoji`, a directory "
            "saved by save_pretrained, a hub id, or a .safetensors file"
        ) from error
    name = str(index.get("_class_name"))
    if name not in FAMILIES:
        raise UserError(
            f"--model {model}: is a {name}; supported are {', '.join(sorted(FAMILIES))}"
        )
    file, class_name = FAMILIES[name]
    return source, getattr(importlib.import_module(f"shortft.families.{file}"), class_name)
