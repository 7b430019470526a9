"""Stable Diffusion 3 and 3.5, and every model saved in StableDiffusion3Pipeline's layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn

from shortft.errors import UserError
from shortft.families.base import Conditioning, Guidance, autocast, classifier_free
from shortft.families.files import latent_side
from shortft.families.pipeline import PipelineFamily
from shortft.families.text import encode_in_batches, with_empty
from shortft.quiet import quiet
from shortft.schedule import Schedule, flow_schedule_from_config


class StableDiffusion3(PipelineFamily):
    """A frozen StableDiffusion3Pipeline taken apart.

    A transformer that predicts the flow eps - x0. Two CLIP encoders and T5 make one sequence of
    embeddings; `pooled` is the two CLIP projections side by side. T5 may be absent: zeros stand
    in for it, as the model was trained to accept.
    """

    name = "sd3"
    pipeline_class = StableDiffusion3Pipeline
    part = "transformer"
    prompt_tokens = 77 + 256  # CLIP's and T5's
    guidance_scale = 7.0  # as in the pipeline
    prefixes: ClassVar[dict[str, tuple[str, ...]]] = {
        "text_encoder": ("text_encoders.clip_l.",),
        "text_encoder_2": ("text_encoders.clip_g.",),
        "text_encoder_3": ("text_encoders.t5xxl.",),
    }
    lora_targets: tuple[str, ...] = (
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
    )
    # Trajectory distillation also moves modulation, projections and the embeddings of time.
    shortcut_targets: tuple[str, ...] = (
        *lora_targets,
        "norm1.linear",
        "norm1_context.linear",
        "norm_out.linear",
        "context_embedder",
        "linear_1",
        "linear_2",
        "proj_out",
    )

    def _read(self, pipeline: Any, resolution: int | None) -> None:
        config, factor = pipeline.transformer.config, pipeline.vae_scale_factor
        side = latent_side(
            self.source, resolution, config.sample_size, factor=factor, patch=config.patch_size
        )
        if side > config.pos_embed_max_size * config.patch_size:
            largest = config.pos_embed_max_size * config.patch_size * factor
            raise UserError(
                f"--resolution {resolution}: {self.source} knows positions up to {largest} pixels"
            )
        self.resolution = side * factor
        self._latent_shape = (config.in_channels, side, side)
        self._tokens = (side // config.patch_size) ** 2

    def schedule(self, num_steps: int) -> Schedule:
        """SD3's own points, whose first and last do not move with their number."""
        try:
            found = flow_schedule_from_config(
                self._scheduler_config, num_steps, tokens=self._tokens
            )
            return replace(found, cut_by="span")
        except ValueError as error:
            raise UserError(f"--model {self.source}, --num-steps {num_steps}: {error}") from error

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        def batch(prompts: list[str]) -> tuple[Tensor, ...]:
            with quiet():
                embeddings, _, pooled, _ = self._text.encode_prompt(
                    prompts, None, None, device=self.device, do_classifier_free_guidance=False
                )
            return embeddings, pooled

        return with_empty(*encode_in_batches(batch, ["", *prompts]))

    def predict(
        self,
        net: nn.Module,
        latents: Tensor,
        timestep: float | Tensor,
        cond: Conditioning,
        g: Guidance,
    ) -> Tensor:
        """Guided prediction (B, C, h, w) in the latents' dtype."""

        def forward(
            x: Tensor, t: float | Tensor, embeddings: Tensor, pooled: Tensor | None
        ) -> Tensor:
            assert pooled is not None
            dtype = self.working(x, self.dtype)
            times = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(len(x))
            with autocast(self.device, self.dtype):
                out: Tensor = net(
                    hidden_states=x.to(dtype),
                    timestep=times,
                    encoder_hidden_states=embeddings.to(dtype),
                    pooled_projections=pooled.to(dtype),
                    return_dict=False,
                )[0]
            return out.to(x.dtype)

        return classifier_free(forward, latents, timestep, cond, g)

    def _read_lora(
        self, net: Any, directory: str, **options: Any
    ) -> tuple[dict[str, Tensor], Any, Any]:
        state, metadata = StableDiffusion3Pipeline.lora_state_dict(directory, **options)
        return state, None, metadata  # diffusers reads no kohya files for it
