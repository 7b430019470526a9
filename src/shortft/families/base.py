"""What the chain, the trainer and the tools ask of a model family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from shortft.schedule import Schedule


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (Ho & Salimans 2022).

    Attributes:
        scale: weight of the difference between the branches; 1 runs the prompt's branch alone.
        grad: whether gradient flows through both branches or the prompt's only (half the memory).
    """

    scale: float = 1.0
    grad: Literal["both", "positive"] = "both"


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts: embeddings (B, L, D) of the prompts and of the empty prompt."""

    positive: Tensor
    negative: Tensor

    def __len__(self) -> int:
        return len(self.positive)

    def __getitem__(self, index: slice | Tensor | list[int]) -> Conditioning:
        return Conditioning(self.positive[index], self.negative[index])

    def to(self, *args: Any, **kwargs: Any) -> Conditioning:
        return Conditioning(self.positive.to(*args, **kwargs), self.negative.to(*args, **kwargs))


class Family(Protocol):
    """A model with its text encoder, latent decoder and schedule; frozen throughout."""

    name: str
    source: str
    denoiser: nn.Module
    device: torch.device
    default_guidance_scale: float
    lora_targets: tuple[str, ...]
    shortcut_targets: tuple[str, ...]

    def schedule(self, num_steps: int) -> Schedule: ...

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts; the result lies on the family's device."""

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """(B, C, h, w) fp32 noise; sample i depends on seeds[i] alone."""

    def predict(
        self,
        net: nn.Module,
        latents: Tensor,
        timestep: float | Tensor,
        cond: Conditioning,
        g: Guidance,
    ) -> Tensor:
        """The guided prediction of a view of the denoiser, with the latents' shape and dtype.

        Timestep: one for all samples, or (B,).
        """

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 3, H, W) images in [0, 1], differentiable."""

    def save_lora(self, state: Mapping[str, Tensor], path: Path) -> None:
        """Write the LoRA weights of the denoiser in diffusers' layout."""

    def load_lora(self, net: nn.Module, path: Path, adapter_name: str) -> None:
        """Add a LoRA in any layout that diffusers reads to a view of the denoiser."""


def classifier_free(
    forward: Callable[[Tensor, float | Tensor, Tensor], Tensor],
    latents: Tensor,
    timestep: float | Tensor,
    cond: Conditioning,
    g: Guidance,
) -> Tensor:
    """Guided prediction u + scale·(c - u) of forward(latents, timestep, embeddings)."""
    if g.scale == 1:
        return forward(latents, timestep, cond.positive)
    if g.grad == "positive" and torch.is_grad_enabled():
        with torch.no_grad():
            negative = forward(latents, timestep, cond.negative)
        positive = forward(latents, timestep, cond.positive)
    else:
        both = torch.cat([cond.negative, cond.positive])
        times = torch.cat([timestep, timestep]) if isinstance(timestep, Tensor) else timestep
        negative, positive = forward(torch.cat([latents, latents]), times, both).chunk(2)
    return negative + g.scale * (positive - negative)
