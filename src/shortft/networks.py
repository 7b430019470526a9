"""Base, shortcut and policy: views on one set of frozen weights.

A view is a tree of module objects of its own whose parameters are the very tensors of the base
model. Each view carries the LoRAs that it needs, switched on once, so that nothing is switched
between the steps of a chain. (Switching adapters on one shared module corrupts gradients under
activation recomputation: peft issue 2832.)
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from shortft.families.base import Conditioning, Family, Guidance, recomputed
from shortft.lora_layers import MergedLinear, StackedLinear
from shortft.plans import Step

SHORTCUT = "shortcut"


def lora_name(number: int) -> str:
    """The adapter name of LoRA 1…k."""
    return f"shortft_{number}"


def few_step_guidance(family: Family, chain: float) -> float:
    """What a few-step LoRA runs with where nobody says: unguided, at half the cost.

    Where guidance is an input of the network (FLUX.1-dev) that would save nothing: there it is the
    chain's.
    """
    config: Any = family.denoiser.config
    return chain if config.get("guidance_embeds") else 1.0


def view(module: nn.Module, *, frozen: bool = False) -> nn.Module:
    """A copy of the module tree that shares every parameter and buffer with the original.

    Args:
        frozen: give the copy parameters on the same storage that never require gradient.
    """
    memo: dict[int, Tensor] = {id(buffer): buffer for buffer in module.buffers()}
    for parameter in module.parameters():
        shared = nn.Parameter(parameter.detach(), requires_grad=False) if frozen else parameter
        memo[id(parameter)] = shared
    return copy.deepcopy(module, memo)


def lora_layers(module: nn.Module) -> list[LoraLayer]:
    return [layer for layer in module.modules() if isinstance(layer, LoraLayer)]


def add_lora(
    module: nn.Module, name: str, *, rank: int, targets: Sequence[str], generator: torch.Generator
) -> None:
    """Inject a LoRA (alpha = rank, fp32) that starts as the identity: A Kaiming-uniform, B zero.

    The paper does not give alpha; alpha = rank keeps the scale at 1, the only value that every
    tool reads back alike.
    """
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets))
    # peft draws initial values from the global generator; ours replace them.
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(config, module, adapter_name=name)
    for layer in lora_layers(module):
        if name in layer.lora_A:
            layer.lora_A[name].float()
            layer.lora_B[name].float()
            # Drawn on the CPU, so that the start is the same on every device.
            start = torch.empty(layer.lora_A[name].weight.shape)
            nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
            with torch.no_grad():
                layer.lora_A[name].weight.copy_(start)
                layer.lora_B[name].weight.zero_()


def activate(module: nn.Module, strengths: Mapping[str, float]) -> None:
    """Switch on exactly these adapters, each at its strength.

    `requires_grad` of LoRA parameters is left for the caller to set: peft changes it here.
    """
    for layer in lora_layers(module):
        present = [name for name in strengths if name in layer.lora_A]
        layer.enable_adapters(bool(present))
        if present:
            layer.set_adapter(present)
        for name in present:
            layer.set_scale(name, strengths[name])


def lora_parameters(module: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The parameters of one adapter, by name."""
    return {key: p for key, p in module.named_parameters() if f".{name}." in key}


def lora_state(module: nn.Module, name: str) -> dict[str, Tensor]:
    """The weights of one adapter under the names that diffusers and peft save."""
    return dict(get_peft_model_state_dict(module, adapter_name=name))


def fold(module: nn.Module, name: str) -> nn.Module:
    """A view with an adapter folded into new weights of the layers it touches."""

    def folded(layer: LoraLayer) -> nn.Module:
        plain: Any = layer.get_base_layer()
        if name not in layer.lora_A:
            return plain
        weight = plain.weight.float() + layer.get_delta_weight(name).float()
        clone = copy.copy(plain)
        new = nn.Parameter(weight.to(plain.weight.dtype), requires_grad=False)
        clone._parameters = {**plain._parameters, "weight": new}
        return clone

    whole = view(module)
    for path, layer in list(whole.named_modules()):
        if isinstance(layer, LoraLayer):
            whole.set_submodule(path, folded(layer))
    return whole


def stacked_view(
    module: nn.Module,
    loras: nn.Module,
    names: Sequence[str],
    *,
    frozen: bool,
    merged: bool = False,
) -> nn.Module:
    """A view of a module with named LoRAs active in `StackedLinear` or `MergedLinear` layers.

    Args:
        loras: the same tree with peft layers, which hold the LoRAs.
        frozen: keep gradient from the LoRAs.
        merged: fold them into the layers, which must be plain ones.
    """
    stacked = view(module)
    for path, layer in loras.named_modules():
        if isinstance(layer, LoraLayer):
            under: Any = stacked.get_submodule(path)
            down = [layer.lora_A[name].weight for name in names]
            up = [layer.lora_B[name].weight for name in names]
            new = (
                MergedLinear(under, down, up)
                if merged
                else StackedLinear(under, down, up, frozen=frozen)
            )
            stacked.set_submodule(path, new)
    return stacked


class ModelNetworks:
    """The networks of every plan on one frozen denoiser: base, shortcut, and LoRAs on either.

    Args:
        family: the model.
        guidance: for base and policy.
        shortcut_guidance: for the shortcut; scale 1 for guidance-free few-step LoRAs.
        loras: how many reward LoRAs there are (0 for the base alone).
        rank: their rank.
        seed: of their initial values.
        shortcut: few-step LoRA file, or None if no plan runs the shortcut.
        shortcut_scale: of its LoRA.
        plain_jumps: let the base itself, unguided, stand in for a shortcut.
        merge: fold LoRAs that do not train (the shortcut's, and the rewards' where no gradient
            reaches them) into copies of the layers they touch: faster, more memory.
    """

    def __init__(
        self,
        family: Family,
        *,
        guidance: Guidance,
        shortcut_guidance: Guidance | None = None,
        loras: int = 0,
        rank: int = 4,
        seed: int = 0,
        shortcut: Path | None = None,
        shortcut_scale: float = 1.0,
        merge: bool = False,
        plain_jumps: bool = False,
    ) -> None:
        self.family = family
        self.guidance = guidance
        self.shortcut_guidance = shortcut_guidance or Guidance()
        self.base = family.denoiser
        self.loras = loras
        self._shortcut: nn.Module | None = self.base if plain_jumps else None
        if shortcut is not None:
            self._shortcut = view(self.base)
            family.load_lora(self._shortcut, shortcut, SHORTCUT)
            if shortcut_scale != 1:
                activate(self._shortcut, {SHORTCUT: shortcut_scale})
                self._shortcut.requires_grad_(False)
            if merge:
                self._shortcut = fold(self._shortcut, SHORTCUT)
        self._merge = merge
        self._strength = 1.0
        self._tuned: dict[tuple[str, int, bool], nn.Module] = {}  # views made so far, with LoRAs
        if loras:
            generator = torch.Generator().manual_seed(seed)
            full = view(self.base)
            for number in range(1, loras + 1):
                add_lora(
                    full,
                    lora_name(number),
                    rank=rank,
                    targets=family.lora_targets,
                    generator=generator,
                )
            self._loras = full.to(family.device)
            self.train_only(range(1, loras + 1))

    def train_only(self, numbers: Sequence[int]) -> list[nn.Parameter]:
        """Let exactly these LoRAs require gradient; returns their parameters."""
        chosen = []
        self.base.requires_grad_(False)
        for number in range(1, self.loras + 1):
            for parameter in self.parameters_of(number).values():
                parameter.requires_grad_(number in numbers)
                if number in numbers:
                    chosen.append(parameter)
        return chosen

    def parameters_of(self, number: int) -> dict[str, nn.Parameter]:
        """The parameters of LoRA `number`, by name."""
        return lora_parameters(self._loras, lora_name(number))

    def state_of(self, number: int) -> dict[str, Tensor]:
        """The weights of LoRA `number` in diffusers' naming."""
        return lora_state(self._loras, lora_name(number))

    def set_strength(self, strength: float) -> None:
        """Scale all reward LoRAs."""
        self._strength = strength
        for tuned in self._tuned.values():
            _set_strength(tuned, strength)

    def module(self, step: Step) -> nn.Module:
        """The module that a step runs."""
        under = self._shortcut if step.net == "shortcut" else self.base
        if under is None:
            raise ValueError("the plan runs a shortcut, but none was loaded")
        if not step.adapters:
            return under
        if step.adapters > self.loras:
            raise ValueError(f"the plan stacks {step.adapters} LoRAs, there are {self.loras}")
        key = step.net, step.adapters, step.trains
        if key not in self._tuned:
            names = [lora_name(number) for number in range(1, step.adapters + 1)]
            merged = self._merge and not step.trains
            made = stacked_view(under, self._loras, names, frozen=not step.trains, merged=merged)
            _set_strength(made, self._strength)
            self._tuned[key] = made
        return self._tuned[key]

    def predict(
        self,
        step: Step,
        latents: Tensor,
        timestep: float,
        cond: Conditioning,
        *,
        recompute: bool = False,
    ) -> Tensor:
        """The guided prediction of a step's network, see `chain.Networks`."""
        predict = partial(self.family.predict, self.module(step))
        g = self.guidance_of(step)
        if recompute:
            return recomputed(predict, latents, timestep, cond, g)
        return predict(latents, timestep, cond, g)

    def guidance_of(self, step: Step) -> Guidance:
        """What a step's network runs with."""
        return self.shortcut_guidance if step.net == "shortcut" else self.guidance


def _set_strength(module: nn.Module, strength: float) -> None:
    for layer in module.modules():
        if isinstance(layer, (StackedLinear, MergedLinear)):
            layer.strength = strength
