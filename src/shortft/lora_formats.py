"""LoRAs in the layouts of other tools, and one plain LoRA of stacked ones."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from shortft.adapter import AdapterInfo, lora_file
from shortft.drawing.files import write_atomic
from shortft.families.base import Family


def plain_state(states: list[dict[str, Tensor]], info: AdapterInfo) -> dict[str, Tensor]:
    """One LoRA from stacked ones: ranks side by side, weights as often as each one acts.

    Args:
        states: weights of LoRA 1…k by key (`….lora_A.weight` (r, in), `….lora_B.weight` (out, r)).

    Returns:
        Weights of rank k·r under the same keys, alpha = rank.
    """
    shares = [
        sum(count >= number for count in info.stacked) / info.num_steps
        for number in range(1, len(states) + 1)
    ]
    merged: dict[str, Tensor] = {}
    for key in states[0]:
        if ".lora_A." in key:
            merged[key] = torch.cat([state[key] for state in states])
        else:
            pairs = zip(states, shares, strict=True)
            merged[key] = torch.cat([share * state[key] for state, share in pairs], dim=1)
    return merged


def kohya_state(state: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
    """Weights under the names that kohya's tools, A1111 and ComfyUI read.

    U-Nets get kohya's names with an alpha per layer, SDXL's by the blocks of Stability AI's code,
    which kohya's scripts build it from; transformers keep peft's, which ComfyUI reads for SD3,
    FLUX.1 and FLUX.2.
    """
    if not all(key.startswith("unet.") for key in state):
        return dict(state)
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya

    converted = convert_state_dict_to_kohya(dict(state))
    if family.name == "sdxl":
        config: Any = family.denoiser.config
        converted = {_by_sgm(k, config.layers_per_block + 1): v for k, v in converted.items()}
    # alpha = rank throughout, as ours are trained.
    return {
        key: value.float() if key.endswith(".alpha") else value.contiguous()
        for key, value in converted.items()
    }


def _by_sgm(key: str, length: int) -> str:
    """A layer of an attention block by its place among input, middle and output blocks.

    Args:
        length: layers of a block, with the one that changes the resolution.
    """
    found = re.match(r"lora_unet_(down|mid|up)_(?:blocks_(\d+)|block)_attentions_(\d+)_", key)
    if found is None:
        raise ValueError(f"{key}: not a layer of an attention block")
    where, block, layer = found[1], int(found[2] or 0), int(found[3])
    place = {
        "down": f"input_blocks_{1 + length * block + layer}",
        "mid": "middle_block",
        "up": f"output_blocks_{length * block + layer}",
    }[where]
    return f"lora_unet_{place}_1_{key[found.end() :]}"


def write_plain_adapter(
    states: list[dict[str, Tensor]], info: AdapterInfo, family: Family, directory: Path
) -> AdapterInfo:
    """The plain LoRA as an adapter of its own, which acts at every timestep."""
    times = [round(float(t)) for t in family.schedule(info.num_steps).timesteps]
    plain = replace(
        info,
        loras=1,
        rank=info.rank * len(states),
        placement="everywhere",
        timesteps=times,
        stacked=[1] * len(times),
    )
    write_atomic(directory / lora_file(1), save(plain_state(states, info), {"format": "pt"}))
    fields = json.dumps(vars(plain), indent=2) + "\n"
    write_atomic(directory / "adapter.json", fields.encode())
    return plain
