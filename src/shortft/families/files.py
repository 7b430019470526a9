"""Reading models through diffusers, with one clear line for whatever is wrong."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import SingleFileComponentError
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError

from shortft.errors import UserError
from shortft.families.single_file import load_single_file
from shortft.families.source import Source
from shortft.quiet import quiet

DEFAULTS_FILE = "shortft.json"  # a model directory may name its own, see `own_defaults`
UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    RuntimeError,
    LookupError,
    AttributeError,
    ImportError,  # of a library that a part needs
    SafetensorError,
    SingleFileComponentError,
)
NETWORKS = ("unet", "transformer", "vae", "text_encoder")  # how a pipeline's parts are called
GATED = "it is gated: accept its licence on the hub, and log in by `hf auth login`"


def load_pipeline(
    pipeline_class: Any,
    source: Source,
    prefixes: Mapping[str, tuple[str, ...]],
    *,
    dtype: torch.dtype,
    **options: Any,
) -> Any:
    """A diffusers pipeline from a local directory, a hub id or a single file.

    Args:
        pipeline_class: what the model must be.
        prefixes: see `load_single_file`.
        dtype: number format of its networks.
        options: for `from_pretrained`.

    Raises:
        UserError: if the model cannot be found, read or is of another family.
    """
    try:
        with quiet():
            place, revision = source.pipeline, source.revision
            index = pipeline_class.load_config(place, revision=revision)
            for name, part in index.items():
                if name.startswith(NETWORKS) and part[1] is not None and name not in options:
                    _refuse_quantised(source, name)
            if source.file is not None:
                return load_single_file(pipeline_class, source, prefixes, dtype=dtype, **options)
            # Parts that were left out when the model was saved, such as SD3's T5.
            absent = {name: None for name, part in index.items() if part == [None, None]}
            read = functools.partial(
                pipeline_class.from_pretrained,
                place,
                revision=revision,
                use_safetensors=True,
                dtype=dtype,
                **(absent | options),
            )
            try:
                return read()
            except UNREADABLE:
                # Some repositories hold their weights in half precision only.
                with contextlib.suppress(*UNREADABLE):
                    return read(variant="fp16")
                raise
    except UNREADABLE as error:
        remedy = "give `emoji`, a directory saved by save_pretrained, or a hub id"
        if source.file is not None:
            remedy = f"check that --pipeline ({source.pipeline}) is of the same kind"
        # What diffusers looks up by name or place in a file of another kind says nothing to a user.
        foreign = isinstance(error, LookupError)
        reason = "its weights are named otherwise" if foreign else first_line(error)
        raise UserError(
            f"--model {source.name}: cannot be loaded as a {pipeline_class.__name__} "
            f"({reason}); {remedy}"
        ) from error


def _refuse_quantised(source: Source, part: str) -> None:
    """Whether a part's weights are numbers, by its ``config.json``."""
    config: Any = {}
    with contextlib.suppress(OSError):  # loading will say what is wrong
        config = AutoencoderKL.load_config(
            source.pipeline, subfolder=part, revision=source.revision
        )
    method = config.get("quantization_config")
    if method:
        raise UserError(
            f"--model {source.name}: its {part} is quantised ({method.get('quant_method')}), which "
            "is not supported; give the model that it was made from"
        )


def own_defaults(source: Source) -> dict[str, Any]:
    """What a model directory names in ``shortft.json``: guidance_scale, resolution; or nothing."""
    defaults = Path(source.pipeline) / DEFAULTS_FILE
    if not defaults.is_file():
        return {}
    try:
        named = dict(json.loads(defaults.read_text(encoding="utf-8")))
        kinds = {"guidance_scale": float, "resolution": int}
        return {n: kind(named[n]) for n, kind in kinds.items() if named.get(n) is not None}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{defaults}: damaged ({first_line(error)}); restore or remove it"
        ) from error


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


def first_line(error: BaseException) -> str:
    """An error's first line, for use inside another message.

    Libraries say of a hub that does not answer that it lacks a file, and of a model behind a login
    that there is none; this says what is the matter.
    """
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    refusals = [cause for cause in causes if isinstance(cause, HfHubHTTPError)]
    if any(isinstance(cause, GatedRepoError) for cause in refusals):  # a RepositoryNotFoundError
        return GATED
    if any(isinstance(cause, RepositoryNotFoundError) for cause in refusals):
        return "the hub shows none of this name: misspelt, or private; log in by `hf auth login`"
    if any(cause.response.status_code in (401, 403) for cause in refusals):
        return "the hub refuses this machine's token; log in again by `hf auth login`"
    if any(isinstance(cause, LocalEntryNotFoundError) for cause in causes):
        return "the hub cannot be reached, and its cache on this machine has no copy"
    return str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
