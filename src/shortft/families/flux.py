"""FLUX.1, and every model saved in FluxPipeline's layout."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import FluxPipeline
from torch import Tensor, nn

from shortft.errors import UserError
from shortft.families.base import Conditioning, Guidance, autocast
from shortft.families.files import latent_side
from shortft.families.pipeline import PipelineFamily, refuse_other_inputs
from shortft.families.text import encode_in_batches
from shortft.quiet import quiet
from shortft.schedule import Schedule, flow_schedule_from_config

LATENT_SIDE = 128  # as in FluxPipeline: the transformer's config names no size


class Flux(PipelineFamily):
    """A frozen FluxPipeline taken apart.

    A transformer that predicts the flow eps - x0. T5 gives the embeddings, CLIP the pooled
    vector. Guidance is an input of the network (FLUX.1-dev is distilled from guidance): one
    evaluation per step, and no empty prompt. Latents stay (B, C, h, w) outside; the network sees
    patches of 2 × 2 as tokens, each with its position.
    """

    name = "flux"
    pipeline_class = FluxPipeline
    part = "transformer"
    prompt_tokens = 512
    guidance_scale = 3.5  # as in the pipeline
    prefixes: ClassVar[dict[str, tuple[str, ...]]] = {
        "text_encoder": ("text_encoders.clip_l.",),
        "text_encoder_2": ("text_encoders.t5xxl.",),
    }
    _everywhere: tuple[str, ...] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
        "proj_mlp",
    )

    def _read(self, pipeline: Any, resolution: int | None) -> None:
        config, factor = pipeline.transformer.config, pipeline.vae_scale_factor
        channels = pipeline.vae.config.latent_channels
        refuse_other_inputs(self.source, config.in_channels, 4 * channels)
        self.guidance_embeds = bool(config.guidance_embeds)
        if not self.guidance_embeds:
            self.default_guidance_scale = 1.0
        # By full name: the network's own last layer is called proj_out too.
        layers = range(config.num_single_layers)
        self.lora_targets = (
            *self._everywhere,
            *(f"single_transformer_blocks.{i}.proj_out" for i in layers),
        )
        # Trajectory distillation also moves modulation, projections and the embeddings of time.
        self.shortcut_targets = (
            *self._everywhere,
            "norm1.linear",
            "norm1_context.linear",
            "norm.linear",
            "norm_out.linear",
            "context_embedder",
            "x_embedder",
            "linear_1",
            "linear_2",
            "proj_out",
        )
        side = latent_side(self.source, resolution, LATENT_SIDE, factor=factor, patch=2)
        self.resolution = side * factor
        self._latent_shape = (channels, side, side)

    def schedule(self, num_steps: int) -> Schedule:
        """FLUX's own points: sigma 1 … 1/N, shifted more the more tokens an image has."""
        _, height, width = self._latent_shape
        try:
            return flow_schedule_from_config(
                self._scheduler_config,
                num_steps,
                tokens=height * width // 4,
                smallest=1 / max(num_steps, 1),
            )
        except ValueError as error:
            raise UserError(f"--model {self.source}, --num-steps {num_steps}: {error}") from error

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        def batch(prompts: list[str]) -> tuple[Tensor, ...]:
            with quiet():
                embeddings, pooled, _ = self._text.encode_prompt(prompts, device=self.device)
            return embeddings, pooled

        states, pooled = encode_in_batches(batch, prompts)
        return Conditioning(states, states[:, :0], pooled)

    def predict(
        self,
        net: nn.Module,
        latents: Tensor,
        timestep: float | Tensor,
        cond: Conditioning,
        g: Guidance,
    ) -> Tensor:
        """The prediction (B, C, h, w) under embedded guidance, in the latents' dtype.

        Raises:
            UserError: for guidance on a model that takes none (FLUX.1-schnell).
        """
        if not self.guidance_embeds and g.scale != 1:
            raise UserError(
                f"--guidance-scale {g.scale:g}: {self.source} takes no guidance; give 1"
            )
        assert cond.pooled is not None
        dtype = self.working(latents, self.dtype)
        count, _, height, width = latents.shape
        as_float = functools.partial(torch.as_tensor, dtype=torch.float32, device=latents.device)
        scale = as_float(g.scale).expand(count)
        with autocast(self.device, self.dtype):
            out: Tensor = net(
                hidden_states=to_tokens(latents).to(dtype),
                timestep=as_float(timestep).expand(count) / 1000,  # the network takes it times 1000
                guidance=scale if self.guidance_embeds else None,
                pooled_projections=cond.pooled.to(dtype),
                encoder_hidden_states=cond.positive.to(dtype),
                txt_ids=as_float([[0, 0, 0]]).expand(cond.positive.shape[1], -1),
                img_ids=as_float(positions(height // 2, width // 2)),
                return_dict=False,
            )[0]
        return from_tokens(out.to(latents.dtype), height, width)

    def _read_lora(
        self, net: Any, directory: str, **options: Any
    ) -> tuple[dict[str, Tensor], Any, Any]:
        state, alphas, metadata = FluxPipeline.lora_state_dict(
            directory, return_alphas=True, **options
        )
        return state, alphas, metadata


def to_tokens(latents: Tensor) -> Tensor:
    """(B, C, h, w) → (B, h/2 · w/2, 4C): patches of 2 × 2, row by row, channels outermost."""
    patches = latents.unflatten(2, (-1, 2)).unflatten(4, (-1, 2))  # (B, C, h/2, 2, w/2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def from_tokens(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `to_tokens`."""
    patches = tokens.unflatten(1, (height // 2, width // 2)).unflatten(3, (-1, 2, 2))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def positions(height: int, width: int) -> Tensor:
    """(height · width, 3) position of each token: 0, row, column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
