"""What ships with the package: the embedded model, its shortcut, scorers and prompts."""

from __future__ import annotations

import json
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


def shortcut_for(model: str, shortcut: str) -> Path | None:
    """The few-step LoRA file that an option names; None for a plain DDIM jump.

    Raises:
        UserError: if there is none.
    """
    if shortcut in ("none", "plain"):
        return None
    if shortcut != "auto":
        path = Path(shortcut)
    elif model == EMBEDDED:
        path = asset("shortcut", "shortcut.safetensors")
    else:
        raise UserError(
            f"--shortcut auto: no shortcut ships for {model}; give a few-step LoRA file (make one "
            "by `shortft shortcut`), or `none` for plain DDIM jumps"
        )
    if not path.is_file():
        raise UserError(f"--shortcut {shortcut}: no such file; make one by `shortft shortcut`")
    return path


def own_guidance(shortcut: Path | None) -> float:
    """The guidance that a shortcut was made to run with, from the JSON file beside it.

    1 (unguided, as released few-step LoRAs run) where there is no such file.

    Raises:
        UserError: if the file is damaged.
    """
    card = shortcut.with_suffix(".json") if shortcut else None
    if card is None or not card.is_file():
        return 1.0
    try:
        return float(json.loads(card.read_text(encoding="utf-8"))["shortcut_guidance_scale"])
    except KeyError:
        return 1.0
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{card}: damaged ({error}); restore it, or remove it and give "
            "--shortcut-guidance-scale"
        ) from error


def prompts_for(model: str, kind: str) -> list[str]:
    """The model's own list of prompts: "train", "held_out" or "fixed".

    Raises:
        UserError: if no list ships for the model.
    """
    if model != EMBEDDED:
        raise UserError(f"--prompts: none ship for {model}; give a text file, one prompt a line")
    return read_prompts(asset("prompts", f"{kind}.txt"))
