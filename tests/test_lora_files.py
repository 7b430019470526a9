"""One LoRA in every layout that people share loads to the same weights, alpha included."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor

from shortft.errors import UserError
from shortft.families.flux import Flux
from shortft.families.flux2 import Flux2Klein
from shortft.families.sd3 import StableDiffusion3
from shortft.families.sdxl import StableDiffusionXL
from shortft.networks import SHORTCUT, add_lora, lora_parameters, lora_state, view
from tiny import tiny_family
from tiny_families import tiny

RANK, ALPHA = 3, 2.0
FAMILIES = {
    "sd": tiny_family,
    "sdxl": lambda: StableDiffusionXL(tiny("sdxl"), "tiny"),
    "sd3": lambda: StableDiffusion3(tiny("sd3"), "tiny"),
    "flux": lambda: Flux(tiny("flux"), "tiny", resolution=16),
    "flux2": lambda: Flux2Klein(tiny("flux2"), "tiny", resolution=16),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Any:
    return FAMILIES[request.param]()


def random_state(family: Any, targets: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Weights of a LoRA: module.lora_A|B.weight; on every layer that few-step LoRAs change."""
    module, targets = view(family.denoiser), targets or family.shortcut_targets
    generator = torch.Generator().manual_seed(3)
    add_lora(module, SHORTCUT, rank=RANK, targets=targets, generator=generator)
    for parameter in lora_parameters(module, SHORTCUT).values():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return lora_state(module, SHORTCUT)


def renamed(state: dict[str, Tensor], before: str, down: str, up: str, dot: str = ".") -> Any:
    made = {}
    for key, value in state.items():
        module, _, matrix = key.removesuffix(".weight").rpartition(".")
        end = down if matrix == "lora_A" else up
        made[f"{before}{module.replace('.', dot)}.{end}.weight"] = value
    return made


def with_alpha(state: dict[str, Tensor], down: str) -> dict[str, Tensor]:
    ends = f".{down}.weight"
    layers = [key.removesuffix(ends) for key in state if key.endswith(ends)]
    return state | {f"{layer}.alpha": torch.tensor(ALPHA) for layer in layers}


def deltas(family: Any, path: Path) -> dict[str, Tensor]:
    """What the LoRA adds to each layer's weight."""
    module = view(family.denoiser)
    family.load_lora(module, path, SHORTCUT)
    assert not any(p.requires_grad for p in module.parameters())
    return {
        name: layer.get_delta_weight(SHORTCUT)
        for name, layer in module.named_modules()
        if isinstance(layer, LoraLayer)
    }


def write(family: Any, state: dict[str, Tensor], folder: Path) -> dict[str, Path]:
    """The same LoRA in all layouts; those that cannot hold alpha have it in a header or beside."""
    part = family.part
    header = {"lora_adapter_metadata": json.dumps({f"{part}.lora_alpha": ALPHA, f"{part}.r": RANK})}
    peft = renamed(state, f"{part}.", "lora_A", "lora_B")
    kohya = with_alpha(renamed(state, "lora_unet_", "lora_down", "lora_up", "_"), "lora_down")
    files: dict[str, tuple[dict[str, Tensor], dict[str, str]]] = {
        "diffusers, header": (renamed(state, f"{part}.", "lora.down", "lora.up"), header),
        "peft names, header": (peft, header),
        "peft names, alpha keys": (with_alpha(peft, "lora_A"), {}),
        "kohya": (kohya, {"ss_network_alpha": str(ALPHA)}),
        "peft": (renamed(state, "base_model.model.", "lora_A", "lora_B"), {}),
    }
    paths = {}
    for name, (tensors, fields) in files.items():
        file = "adapter_model" if name == "peft" else "pytorch_lora_weights"
        paths[name] = folder / name / f"{file}.safetensors"
        paths[name].parent.mkdir()
        save_file({key: value.contiguous() for key, value in tensors.items()}, paths[name], fields)
    config = {"lora_alpha": ALPHA, "r": RANK, "peft_type": "LORA", "alpha_pattern": {}}
    paths["peft"].with_name("adapter_config.json").write_text(json.dumps(config))
    return paths


def test_every_layout_loads_to_the_same_weights(family: Any, tmp_path: Path):
    state = random_state(family)
    for name, path in write(family, state, tmp_path).items():
        found = deltas(family, path)
        assert len(found) == len(state) / 2
        for module, delta in found.items():
            down, up = (state[f"{module}.lora_{m}.weight"] for m in "AB")
            expected = ALPHA / RANK * (up.flatten(1) @ down.flatten(1)).view(delta.shape)
            torch.testing.assert_close(delta, expected, atol=1e-7, rtol=1e-5, msg=name)
    assert max(float(delta.abs().max()) for delta in found.values()) > 1e-3


def test_an_alpha_of_its_own_for_some_layers(tmp_path: Path):
    family = tiny_family()
    state = random_state(family)
    path = tmp_path / "s.safetensors"
    fields = {"unet.lora_alpha": ALPHA, "unet.alpha_pattern": {"attn1.to_q": 6.0}}
    tensors = renamed(state, "unet.", "lora_A", "lora_B")
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(fields)})
    for module, delta in deltas(family, path).items():
        whole = state[f"{module}.lora_B.weight"].flatten(1)
        whole = whole @ state[f"{module}.lora_A.weight"].flatten(1)
        alpha = 6.0 if module.endswith("attn1.to_q") else ALPHA
        torch.testing.assert_close(delta, alpha / RANK * whole.view(delta.shape))


@pytest.mark.parametrize("flux", ["flux", "flux2"])
def test_other_tools_names_are_left_to_diffusers(tmp_path: Path, flux: str):
    """Black Forest Labs' names of FLUX's layers, as kohya's scripts write them; fused q, k, v."""
    family = FAMILIES[flux]()
    path = tmp_path / "bfl.safetensors"
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(s, generator=generator) for s in ((RANK, 16), (48, RANK)))
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    save_file(tensors | {f"{name}.alpha": torch.tensor(ALPHA)}, path)
    found = deltas(family, path)
    layers = [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]
    assert sorted(found) == sorted(layers)
    whole = torch.cat([found[layer] for layer in layers])
    torch.testing.assert_close(whole, ALPHA / RANK * up @ down, atol=1e-6, rtol=1e-5)


def test_files_that_fit_only_in_part_are_refused(tmp_path: Path):
    family = tiny_family()
    state = renamed(random_state(family), "unet.", "lora_A", "lora_B")
    first = next(iter(state))
    cases = {
        "1 of its": state | {"unet.mid_block.resnets.9.conv1.lora_A.weight": state[first]},
        "lacks one of its two matrices": {k: v for k, v in state.items() if k != first},
        "DoRA": state | {first.replace("lora_A.weight", "dora_scale"): torch.ones(3)},
    }
    for message, tensors in cases.items():
        path = tmp_path / "s.safetensors"
        save_file({key: value.clone() for key, value in tensors.items()}, path)
        with pytest.raises(UserError, match=message) as caught:
            family.load_lora(view(family.denoiser), path, SHORTCUT)
        assert "\n" not in str(caught.value)
