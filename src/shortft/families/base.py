"""What the chain, the trainer and the tools ask of a model family."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shortft.schedule import Schedule


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (Ho & Salimans 2022), or the scale that stands in for it.

    Attributes:
        scale: weight of the difference between the branches; 1 runs the prompt's branch alone.
            A network distilled from guidance takes it as an input, in one evaluation.
        grad: whether gradient flows through both branches, or the prompt's only: half the memory
            where activations are kept, and not the gradient of what is drawn.
    """

    scale: float = 1.0
    grad: Literal["both", "positive"] = "both"


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts; every tensor's first dimension is the sample.

    Attributes:
        positive: embeddings (B, L, D) of the prompts.
        negative: embeddings of the empty prompt; (B, 0, D) where guidance needs none.
        pooled: one vector per prompt (B, P), for models that take one beside the embeddings.
        negative_pooled: the same of the empty prompt.
    """

    positive: Tensor
    negative: Tensor
    pooled: Tensor | None = None
    negative_pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.positive)

    def __getitem__(self, index: slice | Tensor | list[int]) -> Conditioning:
        return self._map(lambda tensor: tensor[index])

    def to(self, *args: Any, **kwargs: Any) -> Conditioning:
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        return Conditioning(
            change(self.positive),
            change(self.negative),
            None if self.pooled is None else change(self.pooled),
            None if self.negative_pooled is None else change(self.negative_pooled),
        )


class Family(Protocol):
    """A model with its text encoder, latent decoder and schedule; frozen throughout.

    Attributes:
        name: of the family.
        source: where the model came from, as the user named it.
        denoiser: the network that LoRAs are trained on.
        device: where noise, conditioning and images lie.
        default_guidance_scale: where the user names none.
        resolution: height and width of the images in pixels.
        all_parameters: how many numbers its networks hold, text encoders included.
        lora_targets: names of the attention and feed-forward layers, which reward LoRAs change.
        shortcut_targets: those and what a few-step LoRA changes besides.
    """

    name: str
    source: str
    denoiser: nn.Module
    device: torch.device
    default_guidance_scale: float
    resolution: int
    all_parameters: int
    lora_targets: tuple[str, ...]
    shortcut_targets: tuple[str, ...]

    def schedule(self, num_steps: int) -> Schedule: ...

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts; the result lies on the family's device."""

    def encode_ahead(self, prompts: Sequence[str]) -> None:
        """Encode these prompts, keep them in main memory, and let the text encoders go.

        From then on `encode` knows these prompts only.
        """

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

        Timestep: one for all samples, or (B,), in training timesteps [0, T].
        """

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 3, H, W) images in [0, 1], differentiable."""

    def save_lora(self, state: Mapping[str, Tensor], path: Path) -> None:
        """Write the LoRA weights of the denoiser in diffusers' layout."""

    def load_lora(self, net: nn.Module, path: Path, adapter_name: str) -> None:
        """Add a LoRA in any layout that diffusers reads to a view of the denoiser."""


def branches(cond: Conditioning, g: Guidance) -> int:
    """Evaluations of a guided prediction: two where it takes the empty prompt's too."""
    return 1 if g.scale == 1 or not cond.negative.shape[1] else 2


def recomputed(
    predict: Callable[[Tensor, float | Tensor, Conditioning, Guidance], Tensor],
    latents: Tensor,
    timestep: float | Tensor,
    cond: Conditioning,
    g: Guidance,
) -> Tensor:
    """A guided prediction that keeps no activations but runs again in the backward pass.

    Its branches run one after the other, so that the backward pass holds one's activations at a
    time, with the exact gradient of both.
    """
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if branches(cond, g) == 1:
        whole: Tensor = again(predict, latents, timestep, cond, g)
        return whole
    alone = Guidance()
    positive: Tensor = again(predict, latents, timestep, cond, alone)
    empty = Conditioning(cond.negative, cond.negative, cond.negative_pooled, cond.negative_pooled)
    if g.grad == "both":
        negative: Tensor = again(predict, latents, timestep, empty, alone)
    else:
        with torch.no_grad():
            negative = predict(latents, timestep, empty, alone)
    return negative + g.scale * (positive - negative)


def classifier_free(
    forward: Callable[[Tensor, float | Tensor, Tensor, Tensor | None], Tensor],
    latents: Tensor,
    timestep: float | Tensor,
    cond: Conditioning,
    g: Guidance,
) -> Tensor:
    """Guided prediction u + scale·(c - u) of forward(latents, timestep, embeddings, pooled)."""
    if g.scale == 1:
        return forward(latents, timestep, cond.positive, cond.pooled)
    if g.grad == "positive" and torch.is_grad_enabled():
        with torch.no_grad():
            negative = forward(latents, timestep, cond.negative, cond.negative_pooled)
        positive = forward(latents, timestep, cond.positive, cond.pooled)
    else:
        both = torch.cat([cond.negative, cond.positive])
        pooled = None
        if cond.pooled is not None and cond.negative_pooled is not None:
            pooled = torch.cat([cond.negative_pooled, cond.pooled])
        times = torch.cat([timestep, timestep]) if isinstance(timestep, Tensor) else timestep
        guided = forward(torch.cat([latents, latents]), times, both, pooled)
        negative, positive = guided.chunk(2)
    return negative + g.scale * (positive - negative)


def seeded_noise(shape: tuple[int, ...], seeds: Sequence[int]) -> Tensor:
    """(B, *shape) fp32 noise, drawn on the CPU as diffusers draws it from a generator list."""
    return torch.stack(
        [torch.randn((1, *shape), generator=torch.Generator().manual_seed(s))[0] for s in seeds]
    )


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Mixed precision for a model in half precision; nothing for one in fp32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)
