"""Align text-to-image diffusion models with a reward, end to end through a short chain.

Importing this package loads neither torch nor diffusers; its public names load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shortft.routing import load_adapter

__version__ = "0.1.0"
__all__ = ["__version__", "load_adapter"]

_HOMES = {"load_adapter": "shortft.routing"}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
