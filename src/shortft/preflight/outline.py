"""A model without weights, for counting: real modules whose tensors have shapes only."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from shortft.config import Config
from shortft.errors import UserError
from shortft.families import FAMILIES
from shortft.families.base import Conditioning
from shortft.families.pipeline import PipelineFamily
from shortft.preflight.places import configurations
from shortft.quiet import quiet
from shortft.run_plans import lora_count

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def read_index(folder: Path) -> dict[str, Any]:
    """A pipeline's ``model_index.json``.

    Raises:
        UserError: there is none, it is damaged, or its family is not supported.
    """
    try:
        index = dict(json.loads((folder / "model_index.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"--model {folder}: no readable model_index.json ({type(error).__name__}); give a "
            "directory saved by save_pretrained"
        ) from None
    name = index.get("_class_name")
    if name not in FAMILIES:
        raise UserError(
            f"--model {folder}: is a {name}; supported are {', '.join(sorted(FAMILIES))}"
        )
    return index


def empty_family(
    folder: Path,
    *,
    precision: str = "fp32",
    resolution: int | None = None,
    tiny_decoder: bool = False,
    gpu: bool = False,
) -> Any:
    """A family made from a directory's configurations on the meta device; no weight is read.

    Args:
        folder: in diffusers' layout; weights and text encoders may be absent.
        tiny_decoder: an AutoencoderTiny decodes in place of the model's own decoder, if the
            family can use one.
        gpu: choose attention as it is chosen on a GPU.

    Raises:
        UserError: a configuration is missing or damaged, or the resolution does not fit.
    """
    index = read_index(folder)
    file, class_name = FAMILIES[str(index["_class_name"])]
    family_class = getattr(importlib.import_module(f"shortft.families.{file}"), class_name)
    pipeline_class = family_class.pipeline_class
    modules, options = pipeline_class._get_signature_keys(pipeline_class)
    parts: dict[str, Any] = dict.fromkeys(modules)
    parts |= {name: index[name] for name in options if name in index}
    if "requires_safety_checker" in options:
        parts["requires_safety_checker"] = False
    try:
        with quiet(), torch.device("meta"):
            for name in (family_class.part, "vae"):
                parts[name] = _made(folder, index, name)
            if tiny_decoder and "AutoencoderTiny" in family_class.decoders:
                channels = parts["vae"].config.latent_channels
                parts["vae"] = diffusers.AutoencoderTiny(latent_channels=channels)
        with quiet():
            parts["scheduler"] = _made(folder, index, "scheduler")
            family = family_class(
                pipeline_class(**parts),
                str(folder),
                precision=precision,
                device="meta",
                resolution=resolution,
            )
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--model {folder}: its configuration cannot be read ({reason}); give a directory "
            "saved by save_pretrained"
        ) from None
    if not gpu and family.part == "unet":
        family.denoiser.set_attn_processor(AttnProcessor())
    return family


def outline(config: Config) -> Any:
    """The empty family of a run's model, or None: not known here, or loading will say why not."""
    folder = configurations(config.pipeline or config.model)
    if folder is None:
        return None
    try:
        family = empty_family(folder)
    except UserError:
        return None
    family.source = config.model
    return family


def encoder_parameters(folder: Path) -> int:
    """Parameters of all text encoders of a model."""
    index, total = read_index(folder), 0
    for name in ENCODERS:
        if not isinstance(index.get(name), list) or index[name][1] is None:
            continue
        with quiet(), torch.device("meta"):
            config = transformers.AutoConfig.from_pretrained(folder / name)
            total += parameters(getattr(transformers, index[name][1])(config))
    return total


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def linear_parameters(network: nn.Module) -> int:
    """Numbers in the weights that processes may share out, see `families.sharding`."""
    return sum(m.weight.numel() for m in network.modules() if type(m) is nn.Linear)


def lora_layers(family: PipelineFamily) -> list[nn.Linear]:
    """The layers that reward LoRAs change."""
    return [
        layer
        for layer in adapted_layers(family, family.lora_targets)
        if isinstance(layer, nn.Linear)
    ]


def adapted_layers(family: PipelineFamily, targets: Sequence[str]) -> list[nn.Linear | nn.Conv2d]:
    """The denoiser's layers of these names."""
    ends = tuple(f".{target}" for target in targets)
    return [
        layer
        for name, layer in family.denoiser.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and f".{name}".endswith(ends)
    ]


def lora_numbers(config: Config, family: PipelineFamily) -> int:
    """Numbers in all reward LoRAs of a run."""
    sides = sum(layer.in_features + layer.out_features for layer in lora_layers(family))
    return config.rank * sides * lora_count(config)


def blank_prompt(family: PipelineFamily) -> Conditioning:
    """One prompt: zeros in the shape that `encode` gives, on the current default device."""
    config: Any = family.denoiser.config
    width = config.get("cross_attention_dim") or config.get("joint_attention_dim")
    pooled = config.get("pooled_projection_dim")
    if config.get("addition_embed_type") == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    states = torch.zeros(1, family.prompt_tokens, width)
    vector = torch.zeros(1, pooled) if pooled else None
    return Conditioning(states, states.clone(), vector, vector)


def as_if_real(modules: Iterable[nn.Module]) -> None:
    """Give meta modules parameters that pass for tensors on the CPU.

    To be called inside a `FakeTensorMode`: autocast, which the meta device lacks, then works as
    in training. A parameter that several modules share stays shared.
    """
    done: dict[int, Tensor] = {}

    def replaced(old: Tensor) -> Tensor:
        if id(old) not in done:
            new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=old.requires_grad)
            done[id(old)] = new
            kept.append(old)  # so that its id is not used again
        return done[id(old)]

    kept: list[Tensor] = []
    for module in modules:
        for part in module.modules():
            for table in (part._parameters, part._buffers):
                for name, tensor in table.items():
                    if tensor is not None and tensor.device.type == "meta":
                        table[name] = replaced(tensor)  # type: ignore[assignment]


def _made(folder: Path, index: dict[str, Any], name: str) -> Any:
    kind = getattr(diffusers, index[name][1])
    return kind.from_config(kind.load_config(folder / name))
