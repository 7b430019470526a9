"""LoRA files in the layouts that people share: diffusers', peft's and kohya's."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import Tensor, nn

from shortft.errors import UserError
from shortft.families.files import UNREADABLE, first_line
from shortft.quiet import quiet

# How a module's two matrices and its alpha are called.
_PART = re.compile(
    r"(?P<module>.+)\."
    r"(?:(?P<down>lora_A(?:\.\w+)?|lora\.down|lora_down)\.weight"
    r"|(?P<up>lora_B(?:\.\w+)?|lora\.up|lora_up)\.weight|(?P<alpha>alpha))"
)
_TEXT = ("lora_te", "text_encoder")  # of the text encoders, which a shortcut leaves alone
_KOHYA = ("lora_unet_", "lora_transformer_")  # before a module's name with _ for every dot


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
        read: diffusers' reader, for files that name layers as other tools do: (directory,
            weight_name=…, …) → weights in diffusers' or peft's names, network alphas or None, and
            metadata or None.

    Raises:
        UserError: if the file is missing, damaged or made for another architecture.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such LoRA file")
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            own, alphas, metadata = read_lora(path, net, prefix), None, None
            if own is not None:
                state = own
            else:
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
            wanted = sum(
                key.startswith(f"{prefix}.") and key.endswith(("lora_A.weight", ".down.weight"))
                for key in state
            )
            found = sum(
                isinstance(m, LoraLayer) and adapter_name in m.lora_A for m in net.modules()
            )
            if found != wanted:
                raise ValueError(f"{wanted - found} of its {wanted} layers are not in the model")
    except UNREADABLE as error:
        raise UserError(
            f"{path}: cannot be loaded as a LoRA of {source} ({first_line(error)}); "
            "check that it was made for this architecture"
        ) from error
    net.requires_grad_(False)


def read_lora(path: Path, net: nn.Module, prefix: str) -> dict[str, Tensor] | None:
    """A file's weights in peft's names with alpha = rank, whatever its layout and alpha were.

    Alpha is taken from the file's own keys, from diffusers' field in its header, or from peft's
    ``adapter_config.json`` beside it, in this order; where none of them says, it is the rank.

    Args:
        net: the denoiser, whose modules the file may name by dots or, as kohya does, by
            underscores.
        prefix: of the denoiser's keys in diffusers' layout, and of the keys that are returned.

    Returns:
        ``prefix.MODULE.lora_A.weight`` and ``….lora_B.weight``; None if the file names something
        that is not in `net`.

    Raises:
        ValueError: a matrix without its counterpart, or DoRA's magnitudes.
    """
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        header = file.metadata() or {}
    if any("dora_scale" in key or "lora_magnitude_vector" in key for key in tensors):
        raise ValueError("it is a DoRA, whose magnitudes are not read")
    by_flat_name = {name.replace(".", "_"): name for name, _ in net.named_modules()}
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(_TEXT):
            continue
        match = _PART.fullmatch(key)
        module = match and by_flat_name.get(_flat(match["module"], prefix))
        if not match or not module:
            return None
        part = next(name for name in ("down", "up", "alpha") if match[name])
        layers.setdefault(module, {})[part] = tensor
    said = _said(path, header, prefix)
    state: dict[str, Tensor] = {}
    for module, parts in layers.items():
        if not {"down", "up"} <= parts.keys():
            raise ValueError(f"{module} lacks one of its two matrices")
        rank = len(parts["down"])
        alpha = float(parts["alpha"]) if "alpha" in parts else _alpha(said, module, rank)
        up = parts["up"] if alpha == rank else parts["up"].float() * (alpha / rank)
        state[f"{prefix}.{module}.lora_A.weight"] = parts["down"]
        state[f"{prefix}.{module}.lora_B.weight"] = up
    return state


def _flat(module: str, prefix: str) -> str:
    """A module's name with underscores for dots, without what a layout puts before it."""
    for before in (*_KOHYA, f"{prefix}.", "base_model.model."):
        module = module.removeprefix(before)
    return module.replace(".", "_")


def _said(path: Path, header: Mapping[str, str], prefix: str) -> Mapping[str, Any]:
    """LoraConfig's fields from diffusers' header, or from peft's file beside the weights."""
    if "lora_adapter_metadata" in header:
        fields = json.loads(header["lora_adapter_metadata"])
        return {key.removeprefix(f"{prefix}."): value for key, value in fields.items()}
    config = path.with_name("adapter_config.json")
    if path.name == "adapter_model.safetensors" and config.is_file():
        return dict(json.loads(config.read_text(encoding="utf-8")))
    return {}


def _alpha(said: Mapping[str, Any], module: str, rank: int) -> float:
    """What makes peft's scale alpha / rank for one module; rank-stabilised LoRAs included."""
    patterns = said.get("alpha_pattern") or {}
    alpha = float(patterns.get(get_pattern_key(patterns, module), said.get("lora_alpha", rank)))
    return alpha * math.sqrt(rank) if said.get("use_rslora") else alpha
