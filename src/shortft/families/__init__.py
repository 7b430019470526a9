"""Model families: pipeline class → ours. Adding one is one file, one line, one parity test."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shortft.errors import UserError
from shortft.quiet import quiet

if TYPE_CHECKING:
    from shortft.families.base import Family


def default_device() -> str:
    """The GPU where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_family(model: str, *, precision: str = "fp32", device: str | None = None) -> Family:
    """Load a model by the embedded name, a local directory or a hub id.

    Args:
        precision: of the frozen networks, "fp32" or "bf16".
        device: where they live; None = `default_device()`.

    Raises:
        UserError: if it cannot be found or belongs to no supported family.
    """
    from diffusers import DiffusionPipeline

    from shortft.assets import model_path
    from shortft.families.sd import StableDiffusion

    families: dict[str, type[StableDiffusion]] = {"StableDiffusionPipeline": StableDiffusion}
    try:
        with quiet():
            index = DiffusionPipeline.load_config(model_path(model))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--model {model}: no model there ({reason}); give `emoji`, a directory saved by "
            "save_pretrained, or a hub id"
        ) from error
    name = str(index.get("_class_name"))
    if name not in families:
        raise UserError(
            f"--model {model}: is a {name}; supported are {', '.join(sorted(families))}"
        )
    return families[name].load(model, precision=precision, device=device or default_device())
