"""FLUX.2 klein, and every model saved in Flux2KleinPipeline's layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor, nn

from shortft.errors import UserError
from shortft.families.base import Conditioning, Guidance, autocast, classifier_free
from shortft.families.files import latent_side
from shortft.families.pipeline import PipelineFamily, refuse_other_inputs
from shortft.families.text import encode_in_batches, with_empty
from shortft.quiet import quiet
from shortft.schedule import Schedule, flow_schedule_from_config

TOKENS_ALONG_SIDE = 64  # as in Flux2KleinPipeline: the transformer's config names no size
PROMPTS_AT_ONCE = 4  # Qwen3 gives scores of 151,936 words for each of 512 tokens


class Flux2Klein(PipelineFamily):
    """A frozen Flux2KleinPipeline taken apart.

    A transformer that predicts the flow eps - x0. Three hidden layers of Qwen3, side by side, are
    the embeddings. Guidance is classifier-free with an encoded empty prompt; a model distilled to
    few steps takes none. Latents are patches of 2 × 2 of the decoder's, normalised by its running
    statistics: one position (row, column) of (B, C, h, w) is one token of the network.
    """

    name = "flux2"
    pipeline_class = Flux2KleinPipeline
    part = "transformer"
    prompt_tokens = 512
    guidance_scale = 4.0  # as in the pipeline
    prefixes: ClassVar[dict[str, tuple[str, ...]]] = {"text_encoder": ()}  # never in a file
    decoders = ("AutoencoderKLFlux2",)
    _everywhere: tuple[str, ...] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
        "linear_in",
        "linear_out",
        "to_qkv_mlp_proj",
    )

    def _read(self, pipeline: Any, resolution: int | None) -> None:
        config = pipeline.transformer.config
        refuse_other_inputs(
            self.source, config.in_channels, 4 * pipeline.vae.config.latent_channels
        )
        self.distilled = bool(pipeline.config.is_distilled)
        if self.distilled:
            self.default_guidance_scale = 1.0
        # By full name: a joint block calls a list of modules to_out, a single block a layer.
        layers = range(config.num_single_layers)
        self.lora_targets = (
            *self._everywhere,
            *(f"single_transformer_blocks.{i}.attn.to_out" for i in layers),
        )
        # Trajectory distillation also moves modulation, projections and the embeddings of time.
        self.shortcut_targets = (
            *self.lora_targets,
            "double_stream_modulation_img.linear",
            "double_stream_modulation_txt.linear",
            "single_stream_modulation.linear",
            "norm_out.linear",
            "context_embedder",
            "x_embedder",
            "linear_1",
            "linear_2",
            "proj_out",
        )
        factor = 2 * pipeline.vae_scale_factor
        side = latent_side(self.source, resolution, TOKENS_ALONG_SIDE, factor=factor)
        self.resolution = side * factor
        self._latent_shape = (config.in_channels, side, side)

    def schedule(self, num_steps: int) -> Schedule:
        """FLUX.2's own points: sigma 1 … 1/N, shifted by the numbers of tokens and of steps."""
        _, height, width = self._latent_shape
        try:
            return flow_schedule_from_config(
                self._scheduler_config,
                num_steps,
                mu=compute_empirical_mu(height * width, num_steps),
                smallest=1 / max(num_steps, 1),
            )
        except ValueError as error:
            raise UserError(f"--model {self.source}, --num-steps {num_steps}: {error}") from error

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        def batch(prompts: list[str]) -> tuple[Tensor, ...]:
            with quiet():
                embeddings, _ = self._text.encode_prompt(prompts, device=self.device)
            return (embeddings,)

        wanted = list(prompts) if self.distilled else ["", *prompts]
        (states,) = encode_in_batches(batch, wanted, size=PROMPTS_AT_ONCE)
        return Conditioning(states, states[:, :0]) if self.distilled else with_empty(states)

    def predict(
        self,
        net: nn.Module,
        latents: Tensor,
        timestep: float | Tensor,
        cond: Conditioning,
        g: Guidance,
    ) -> Tensor:
        """Guided prediction (B, C, h, w) in the latents' dtype.

        Raises:
            UserError: for guidance on a distilled model.
        """
        if self.distilled and g.scale != 1:
            raise UserError(
                f"--guidance-scale {g.scale:g}: {self.source} takes no guidance; give 1"
            )

        def forward(
            x: Tensor, t: float | Tensor, embeddings: Tensor, pooled: Tensor | None
        ) -> Tensor:
            dtype = self.working(x, self.dtype)
            times = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(len(x))
            with autocast(self.device, self.dtype):
                out: Tensor = net(
                    hidden_states=x.flatten(2).transpose(1, 2).to(dtype),
                    timestep=times / 1000,  # the network takes it times 1000
                    encoder_hidden_states=embeddings.to(dtype),
                    txt_ids=positions(1, 1, embeddings.shape[1]).to(x.device),
                    img_ids=positions(x.shape[2], x.shape[3], 1).to(x.device),
                    return_dict=False,
                )[0]
            return out.to(x.dtype).transpose(1, 2).unflatten(2, x.shape[2:])

        return classifier_free(forward, latents, timestep, cond, g)

    def _as_decoded(self, latents: Tensor) -> Tensor:
        """The decoder's (B, C/4, 2h, 2w) latents from normalised patches (B, C, h, w)."""
        statistics = self.vae.bn
        spread = (statistics.running_var + self.vae.config.batch_norm_eps).sqrt()
        mean, spread = (
            x.to(latents.device, latents.dtype).view(1, -1, 1, 1)
            for x in (statistics.running_mean, spread)
        )
        return nn.functional.pixel_shuffle(latents * spread + mean, 2)

    def _read_lora(
        self, net: Any, directory: str, **options: Any
    ) -> tuple[dict[str, Tensor], Any, Any]:
        state, metadata = Flux2KleinPipeline.lora_state_dict(directory, **options)
        return state, None, metadata  # diffusers multiplies kohya's alpha into the weights


def positions(height: int, width: int, length: int) -> Tensor:
    """(height · width · length, 4) position of each token: 0, row, column, place in the text."""
    axes = (torch.arange(size) for size in (1, height, width, length))
    return torch.cartesian_prod(*axes)
