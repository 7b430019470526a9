"""Model families: name → class. Adding one is one file, one line here, one parity test."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    from shortft.families.sd import StableDiffusion

    return StableDiffusion.load(model, precision=precision, device=device or default_device())
