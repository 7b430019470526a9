"""Stable Diffusion 1.x and 2.x, and every model saved in StableDiffusionPipeline's layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from diffusers import StableDiffusionPipeline
from torch import Tensor

from shortft.families.base import Conditioning
from shortft.families.pipeline import UNetFamily
from shortft.families.text import encode_in_batches


class StableDiffusion(UNetFamily):
    """A frozen StableDiffusionPipeline taken apart."""

    name = "sd"
    pipeline_class = StableDiffusionPipeline
    guidance_scale = 7.5  # as in the pipeline
    load_options: ClassVar[dict[str, Any]] = {"safety_checker": None}
    prefixes: ClassVar[dict[str, tuple[str, ...]]] = {"text_encoder": ("cond_stage_model.",)}

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        tokenizer, encoder = self._text.tokenizer, self._text.text_encoder

        def batch(prompts: list[str]) -> tuple[Tensor, ...]:
            tokens = tokenizer(
                prompts,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            states: Tensor = encoder(tokens.input_ids.to(self.device))[0]
            return (states,)

        (states,) = encode_in_batches(batch, ["", *prompts])
        return Conditioning(states[1:], states[:1].expand(len(prompts), -1, -1))
