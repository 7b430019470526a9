"""Stable Diffusion XL, and every model saved in StableDiffusionXLPipeline's layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from shortft.families.base import Conditioning
from shortft.families.pipeline import UNetFamily
from shortft.families.text import encode_in_batches, with_empty
from shortft.quiet import quiet


class StableDiffusionXL(UNetFamily):
    """A frozen StableDiffusionXLPipeline taken apart.

    Two text encoders: the embeddings are their second-last states side by side, `pooled` is the
    second one's projection. The network is also told the image's size and crop (time ids).
    """

    name = "sdxl"
    pipeline_class = StableDiffusionXLPipeline
    guidance_scale = 5.0  # as in the pipeline
    load_options: ClassVar[dict[str, Any]] = {"add_watermarker": False}
    prefixes: ClassVar[dict[str, tuple[str, ...]]] = {
        "text_encoder": ("conditioner.embedders.0.",),
        "text_encoder_2": ("conditioner.embedders.1.",),
    }

    def _vae_dtype(self) -> torch.dtype:
        # SDXL's own decoder leaves the range of half precision; a repaired one says so.
        return torch.float32 if self.vae.config.force_upcast else self.dtype

    def _read(self, pipeline: Any, resolution: int | None) -> None:
        super()._read(pipeline, resolution)
        self._zeros_for_empty = bool(pipeline.config.force_zeros_for_empty_prompt)

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        def batch(prompts: list[str]) -> tuple[Tensor, ...]:
            with quiet():
                embeddings, _, pooled, _ = self._text.encode_prompt(
                    prompts, device=self.device, do_classifier_free_guidance=False
                )
            return embeddings, pooled

        states, pooled = encode_in_batches(batch, ["", *prompts])
        if self._zeros_for_empty:
            states[0], pooled[0] = 0, 0
        return with_empty(states, pooled)

    def _added(self, x: Tensor, pooled: Tensor) -> dict[str, Tensor]:
        # Original size, top left corner of the crop, target size.
        side = self.resolution
        time_ids = x.new_tensor([[side, side, 0, 0, side, side]])
        return {"text_embeds": pooled, "time_ids": time_ids.expand(len(x), -1)}
