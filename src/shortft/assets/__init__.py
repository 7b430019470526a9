"""What ships with the package: the embedded model, its shortcut, scorers and prompts."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from shortft.errors import UserError
from shortft.inputs import read_prompts

EMBEDDED = "emoji"


def asset(*parts: str) -> Path:
    """Path of a shipped file or directory."""
    return Path(str(resources.files("shortft"))).joinpath("assets", *parts)


def model_path(model: str) -> str:
    """Where a model is loaded from: the embedded one by its name, any other as given."""
    return str(asset(EMBEDDED)) if model == EMBEDDED else model


def prompts_for(model: str, kind: str) -> list[str]:
    """The model's own list of prompts: "train", "held_out" or "fixed".

    Raises:
        UserError: if no list ships for the model.
    """
    if model != EMBEDDED:
        raise UserError(f"--prompts: none ship for {model}; give a text file, one prompt a line")
    return read_prompts(asset("prompts", f"{kind}.txt"))
