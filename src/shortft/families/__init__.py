"""Model families: name → class. Adding one is one file, one line here, one parity test."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shortft.families.base import Family


def load_family(model: str, *, precision: str = "fp32", device: str = "cpu") -> Family:
    """Load a model by the embedded name, a local directory or a hub id.

    Raises:
        UserError: if it cannot be found or belongs to no supported family.
    """
    from shortft.families.sd import StableDiffusion

    return StableDiffusion.load(model, precision=precision, device=device)
