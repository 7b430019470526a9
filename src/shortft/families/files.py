"""Reading models and LoRAs through diffusers, with one clear line for whatever is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from shortft.assets import model_path
from shortft.errors import UserError
from shortft.quiet import quiet

DEFAULTS_FILE = "shortft.json"  # a model directory may name its own, see `own_defaults`
UNREADABLE = (OSError, ValueError, TypeError, RuntimeError, KeyError, SafetensorError)


def load_pipeline(
    pipeline_class: Any, model: str, *, revision: str | None = None, **options: Any
) -> Any:
    """A diffusers pipeline from the embedded name, a local directory or a hub id.

    Args:
        pipeline_class: what the model must be.
        revision: commit, tag or branch on the hub; None for its newest.
        options: for `from_pretrained`.

    Raises:
        UserError: if the model cannot be found, read or is of another family.
    """
    path = model_path(model)
    try:
        with quiet():
            index = pipeline_class.load_config(path, revision=revision)
            # Parts that were left out when the model was saved, such as SD3's T5.
            absent = {name: None for name, part in index.items() if part == [None, None]}
            return pipeline_class.from_pretrained(
                path, revision=revision, use_safetensors=True, **(absent | options)
            )
    except UNREADABLE as error:
        raise UserError(
            f"--model {model}: cannot be loaded as a {pipeline_class.__name__} "
            f"({first_line(error)}); give `emoji`, a directory saved by save_pretrained, or a hub "
            "id"
        ) from error


def own_defaults(model: str) -> dict[str, Any]:
    """What a model directory names in ``shortft.json``: guidance_scale, resolution; or nothing."""
    defaults = Path(model_path(model)) / DEFAULTS_FILE
    if not defaults.is_file():
        return {}
    return dict(json.loads(defaults.read_text(encoding="utf-8")))


def latent_side(
    source: str, resolution: int | None, own: int, *, factor: int, patch: int = 1
) -> int:
    """Height and width of the latents.

    Args:
        resolution: height and width of the images in pixels; None for the model's own.
        own: the model's own height and width of latents.
        factor: pixels per latent.
        patch: latents per token, along one side.

    Raises:
        UserError: if the latents would not be whole.
    """
    if resolution is None:
        return own
    if resolution <= 0 or resolution % (factor * patch):
        raise UserError(
            f"--resolution {resolution}: {source} needs a multiple of {factor * patch} pixels"
        )
    return resolution // factor


def add_lora_file(
    net: Any,
    path: Path,
    adapter_name: str,
    source: str,
    *,
    prefix: str,
    read: Callable[..., tuple[dict[str, Tensor], Any, Any]],
) -> None:
    """Add a LoRA file to a view of a denoiser, frozen.

    Args:
        net: the view, a diffusers model.
        source: the model's name, for messages.
        prefix: of the denoiser's keys in the file.
        read: (directory, weight_name=…, …) → weights in diffusers' or peft's names, network
            alphas or None, and metadata or None.

    Raises:
        UserError: if the file is missing, damaged or made for another architecture.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such LoRA file")
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            state, alphas, metadata = read(
                str(path.parent),
                weight_name=path.name,
                return_lora_metadata=True,
                use_safetensors=True,
                local_files_only=True,
            )
            if not any(key.startswith(f"{prefix}.") and "lora" in key for key in state):
                raise ValueError(f"it holds no LoRA weights of a {prefix}")
            net.load_lora_adapter(
                state,
                prefix=prefix,
                network_alphas=alphas,
                adapter_name=adapter_name,
                metadata=metadata,
            )
    except UNREADABLE as error:
        raise UserError(
            f"{path}: cannot be loaded as a LoRA of {source} ({first_line(error)}); "
            "check that it was made for this architecture"
        ) from error
    net.requires_grad_(False)


def first_line(error: BaseException) -> str:
    """An error's first line, for use inside another message."""
    return str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
