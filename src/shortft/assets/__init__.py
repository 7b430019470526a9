"""What ships with the package: the embedded model, its shortcut, scorers and prompts."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from shortft.inputs import read_prompts

EMBEDDED = "emoji"


def asset(*parts: str) -> Path:
    """Path of a shipped file or directory."""
    return Path(str(resources.files("shortft"))).joinpath("assets", *parts)


def model_path(model: str) -> str:
    """Where a model is loaded from: the embedded one by its name, any other as given."""
    return str(asset(EMBEDDED)) if model == EMBEDDED else model


def prompts_for(model: str, kind: str) -> list[str]:
    """The prompts that ship for a model: "train" or "held_out".

    The embedded model has lists of its own, and "fixed" besides; any other model takes general
    ones.
    """
    folder = ("prompts",) if model == EMBEDDED else ("prompts", "general")
    return read_prompts(asset(*folder, f"{kind}.txt"))
