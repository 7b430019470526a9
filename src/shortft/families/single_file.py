"""Single-file checkpoints: the original layouts that model sites share."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders import FromSingleFileMixin
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from shortft.errors import UserError
from shortft.families.source import Source

# How a denoiser's keys begin: in whole files; FLUX's and SD3's own; under diffusers' names.
DENOISERS = ("model.diffusion_model.", "double_blocks.", "joint_blocks.", "transformer_blocks.")
# How keys end that stand beside weights in 8 or 4 bits. diffusers' converters drop them, so that
# the weights would be loaded without their scale.
SCALES = (
    "scale_weight",
    "weight_scale",
    "scale_input",
    "input_scale",
    "scaled_fp8",
    "comfy_quant",
    "absmax",
)
# Parts that no family uses; a pipeline takes None for them.
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")


def load_single_file(
    pipeline_class: Any,
    source: Source,
    prefixes: Mapping[str, tuple[str, ...]],
    *,
    dtype: torch.dtype,
    **options: Any,
) -> Any:
    """A pipeline whose weights lie in one file, by diffusers' own converters.

    A directory as `source.pipeline` is enough without a hub. What the file lacks (FLUX's and
    SD3's text encoders often, FLUX's decoder) is read from there. Where diffusers reads no whole
    pipeline from a file (FLUX.2), it holds the transformer alone.

    Args:
        prefixes: part of the pipeline → how its keys in a single file may start.
        options: for `from_single_file`; parts among them are used as they are.

    Raises:
        UserError: if weights are missing in both places. Other errors are for the caller.
    """
    assert source.file is not None
    index = pipeline_class.load_config(source.pipeline, revision=source.revision)
    names = tuple(shapes(source.file))
    parts: dict[str, Any] = {name: None for name in UNUSED if name in index}
    for part, starts in prefixes.items():
        wanted = part not in options and index.get(part, [None])[0] is not None
        if wanted and not any(name.startswith(starts) for name in names):
            parts[part] = _load_part(part, index[part], source, dtype)
    shared = {"revision": source.revision, "dtype": dtype}
    try:
        if issubclass(pipeline_class, FromSingleFileMixin):
            pipeline = pipeline_class.from_single_file(
                str(source.file), config=source.pipeline, **shared, **(parts | options)
            )
        else:
            parts["transformer"] = getattr(diffusers, index["transformer"][1]).from_single_file(
                str(source.file), config=source.pipeline, subfolder="transformer", **shared
            )
            pipeline = pipeline_class.from_pretrained(
                source.pipeline, use_safetensors=True, **shared, **(parts | options)
            )
    except NotImplementedError as error:  # a weight without a value cannot be moved
        raise holes(source, "some weights") from error
    for part, module in pipeline.components.items():
        if isinstance(module, nn.Module):
            _refuse_holes(part, module, source)
    return pipeline


def shapes(file: Path) -> dict[str, Tensor]:
    """Names and shapes of a safetensors file, as tensors on the meta device.

    Raises:
        UserError: if it is not such a file, or its weights need scales.
    """
    if file.suffix != ".safetensors":
        raise UserError(
            f"--model {file}: is not a .safetensors file; pickles (.ckpt, .pt) may run code and "
            "are not read, convert it"
        )
    try:
        with safe_open(file, framework="pt") as opened:
            found = {
                name: torch.empty(opened.get_slice(name).get_shape(), device="meta")
                for name in opened.keys()  # noqa: SIM118 (not a mapping)
            }
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"--model {file}: cannot be read ({error}); it may be cut off, download it again"
        ) from error
    for name in found:
        if name.endswith(SCALES):
            raise UserError(
                f"--model {file}: its weights are in 8 or 4 bits with scales beside them ({name}), "
                "which is not supported; give a file in 16 or 32 bits"
            )
    return found


def published_pipeline(file: Path) -> str:
    """Hub id of the published model that diffusers takes a file of this layout for."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    return str(fetch_diffusers_config(shapes(file))["pretrained_model_name_or_path"])


def recognised(file: Path) -> str | None:
    """`published_pipeline` of a file that holds a denoiser; diffusers takes others for SD 1.5's."""
    try:
        names = shapes(file)
        if any(name.startswith(DENOISERS) for name in names):
            return published_pipeline(file)
    except (UserError, ValueError, KeyError):  # loading will say what is wrong with it
        pass
    return None


def _load_part(part: str, named: list[str], source: Source, dtype: torch.dtype) -> Any:
    """A part that the file lacks, from `source.pipeline`."""
    library, class_name = named
    if library not in ("diffusers", "transformers"):
        raise ValueError(f"{part} is a {library}.{class_name}")
    try:
        return getattr(importlib.import_module(library), class_name).from_pretrained(
            source.pipeline,
            subfolder=part,
            revision=source.revision,
            dtype=dtype,
            use_safetensors=True,
        )
    except OSError as error:
        raise UserError(
            f"--model {source.name}: holds no {part}, nor does {source.pipeline}; give a "
            "--pipeline that has its weights"
        ) from error


def _refuse_holes(part: str, module: nn.Module, source: Source) -> None:
    """Whether all weights were found; those that were not stay without a value."""
    if isinstance(module, PreTrainedModel):
        module.tie_weights()  # T5's embedding stands in the file once
    missing = [name for name, tensor in module.state_dict().items() if tensor.is_meta]
    if missing:
        raise holes(source, f"{len(missing)} weights of the {part}, such as {missing[0]},")


def holes(source: Source, what: str) -> UserError:
    return UserError(
        f"--model {source.name}: lacks {what} that {source.pipeline} describes; check that the "
        "file is a whole model, and that --pipeline is of the same kind"
    )
