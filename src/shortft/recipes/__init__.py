"""Named complete configurations, each a YAML file beside this one."""

from __future__ import annotations

from importlib import resources
from typing import Any

import yaml

from shortft.errors import UserError

# GB of GPU memory that each takes, as `shortft train RECIPE --dry-run` estimates; a test compares.
MEMORY_GB = {
    "emoji": 1.3,
    "sd15-hps": 48.5,
    "sd15-hps-24gb": 11,
    "sd15-pick": 48.5,
    "sdxl-hps": 52,
    "sdxl-hps-24gb": 18.5,
    "sd3-pick": 33,
    "sd3-pick-24gb": 16,
    "flux-hps": 67,
    "paper": 44.5,
}


def recipe_names() -> list[str]:
    folder = resources.files("shortft.recipes")
    return sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".yaml"))


def recipe(name: str) -> dict[str, Any]:
    """The settings of a named recipe.

    Raises:
        UserError: for an unknown name.
    """
    if name not in recipe_names():
        raise UserError(f"recipe {name}: unknown; there are {', '.join(recipe_names())}")
    text = resources.files("shortft.recipes").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))
