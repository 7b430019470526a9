"""Where a shortcut comes from and how it runs: shipped, a file, or a published few-step LoRA.

Light to import: the command line checks names before anything heavy is loaded.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from shortft.assets import EMBEDDED, asset
from shortft.errors import UserError

BASE_JUMPS = ("none", "plain")  # jumps by the base itself, guided or not


@dataclass(frozen=True)
class Published:
    """A few-step LoRA on the hub that preserves its base's trajectory.

    Attributes:
        repo, file: where it lies.
        steps: what it was distilled for; ShortFT's segments must be as many.
        guidance_scale: what it runs with; 1 is unguided.
        scale: of the LoRA.
    """

    repo: str
    file: str
    steps: int
    guidance_scale: float = 1.0
    scale: float = 1.0


HYPER = "ByteDance/Hyper-SD"
# As their authors' model card says; no file was at hand to try. See docs/shortcuts.md.
PUBLISHED = {
    "hyper-sd15-4": Published(HYPER, "Hyper-SD15-4steps-lora.safetensors", 4),
    "hyper-sd15-8": Published(HYPER, "Hyper-SD15-8steps-lora.safetensors", 8),
    "hyper-sd15-8-cfg": Published(HYPER, "Hyper-SD15-8steps-CFG-lora.safetensors", 8, 5.0),
    "hyper-sdxl-4": Published(HYPER, "Hyper-SDXL-4steps-lora.safetensors", 4),
    "hyper-sdxl-8": Published(HYPER, "Hyper-SDXL-8steps-lora.safetensors", 8),
    "hyper-sdxl-8-cfg": Published(HYPER, "Hyper-SDXL-8steps-CFG-lora.safetensors", 8, 5.0),
    "hyper-sd3-4": Published(HYPER, "Hyper-SD3-4steps-CFG-lora.safetensors", 4, 3.0, 0.125),
    "hyper-sd3-8": Published(HYPER, "Hyper-SD3-8steps-CFG-lora.safetensors", 8, 5.0, 0.125),
    "hyper-flux-8": Published(HYPER, "Hyper-FLUX.1-dev-8steps-lora.safetensors", 8, 3.5, 0.125),
}
_ON_HUB = re.compile(r"([\w.-]+/[\w.-]+)/([^@]+\.safetensors)(?:@([\w.-]+))?")


@dataclass(frozen=True)
class Shortcut:
    """A shortcut ready to load.

    Attributes:
        path: the LoRA's file; None where the base itself jumps.
        guidance_scale: what it was made to run with.
        scale: of the LoRA.
    """

    path: Path | None
    guidance_scale: float = 1.0
    scale: float = 1.0


def check_shortcut(option: str, value: str) -> str:
    """Return `value` if it names a shortcut; files on the hub are not looked for yet.

    Raises:
        UserError: if it does not.
    """
    known = ("auto", *BASE_JUMPS, *PUBLISHED)
    if value in known or Path(value).is_file() or _ON_HUB.fullmatch(value):
        return value
    near = difflib.get_close_matches(value, known, n=1)
    remedy = "give 'auto', 'none', 'plain' or a LoRA's file"
    if near:
        remedy = f"did you mean {near[0]!r}?"
    raise UserError(f"{option} {value or repr(value)}: no such file; {remedy}")


def find_shortcut(model: str, name: str, segments: int) -> Shortcut:
    """The shortcut that an option names; one on the hub is downloaded.

    Args:
        segments: of the chain; a published shortcut fits one number only.

    Raises:
        UserError: if there is none, it cannot be fetched, or it fits other segments.
    """
    if name in BASE_JUMPS:
        return Shortcut(None)
    if name in PUBLISHED:
        found = PUBLISHED[name]
        if found.steps != segments:
            raise UserError(
                f"--segments {segments}: {name} was distilled for {found.steps} steps; use "
                f"--segments {found.steps}"
            )
        path = fetch(name, found.repo, found.file, None)
        return Shortcut(path, found.guidance_scale, found.scale)
    on_hub = None if Path(name).is_file() else _ON_HUB.fullmatch(name)
    if on_hub:
        return Shortcut(fetch(name, on_hub[1], on_hub[2], on_hub[3]))
    if name == "auto" and model != EMBEDDED:
        raise UserError(
            f"--shortcut auto: no shortcut ships for {model}; give a few-step LoRA file (make one "
            f"by `shortft shortcut`), one of {', '.join(PUBLISHED)}, or `none` for DDIM jumps"
        )
    path = asset("shortcut", "shortcut.safetensors") if name == "auto" else Path(name)
    if not path.is_file():
        raise UserError(f"--shortcut {name}: no such file; make one by `shortft shortcut`")
    return Shortcut(path, own_guidance(path))


def fetch(name: str, repo: str, file: str, revision: str | None) -> Path:
    """A file of the hub, downloaded once.

    Raises:
        UserError: if it cannot be had.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, file, revision=revision))
    except Exception as error:  # the network fails in many ways; each means "not there"
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--shortcut {name}: {file} of {repo} cannot be fetched ({reason}); give a local file"
        ) from error


def own_guidance(shortcut: Path) -> float:
    """The guidance that a shortcut was made to run with, from the JSON file beside it.

    1 (unguided, as released few-step LoRAs run) where there is no such file.

    Raises:
        UserError: if the file is damaged.
    """
    card = shortcut.with_suffix(".json")
    if not card.is_file():
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
