"""Stable Diffusion 3 and 3.5, and every model saved in StableDiffusion3Pipeline's layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn

from shortft.errors import UserError
from shortft.families.base import Conditioning, Guidance, autocast, classifier_free, seeded_noise
from shortft.families.files import add_lora_file, latent_side, load_pipeline, own_defaults
from shortft.families.text import KnownPrompts, encode_in_batches
from shortft.quiet import quiet
from shortft.schedule import Schedule, flow_schedule_from_config

DEFAULT_GUIDANCE_SCALE = 7.0  # as in StableDiffusion3Pipeline


class StableDiffusion3:
    """A frozen StableDiffusion3Pipeline taken apart.

    A transformer that predicts the flow eps - x0. Two CLIP encoders and T5 make one sequence of
    embeddings; `pooled` is the two CLIP projections side by side. T5 may be absent: zeros stand
    in for it, as the model was trained to accept.
    """

    name = "sd3"
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

    def __init__(
        self,
        pipeline: StableDiffusion3Pipeline,
        source: str,
        *,
        precision: str = "fp32",
        device: str | torch.device = "cpu",
        resolution: int | None = None,
    ) -> None:
        self.source = source
        self.device = torch.device(device)
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.default_guidance_scale = DEFAULT_GUIDANCE_SCALE
        self.denoiser: nn.Module = pipeline.transformer
        self.vae = pipeline.vae
        config, factor = pipeline.transformer.config, pipeline.vae_scale_factor
        side = latent_side(
            source, resolution, config.sample_size, factor=factor, patch=config.patch_size
        )
        if side > config.pos_embed_max_size * config.patch_size:
            largest = config.pos_embed_max_size * config.patch_size * factor
            raise UserError(
                f"--resolution {resolution}: {source} knows positions up to {largest} pixels"
            )
        self.resolution = side * factor
        self._latent_shape = (config.in_channels, side, side)
        self._tokens = (side // config.patch_size) ** 2
        self._scheduler_config = dict(pipeline.scheduler.config)
        self._scheduler_config["_class_name"] = type(pipeline.scheduler).__name__
        with quiet():
            for module in (self.denoiser, self.vae):
                module.requires_grad_(False).eval().to(self.device, self.dtype)
            for encoder in (
                pipeline.text_encoder,
                pipeline.text_encoder_2,
                pipeline.text_encoder_3,
            ):
                if encoder is not None:
                    encoder.requires_grad_(False).eval().to(self.device)
        self._text: StableDiffusion3Pipeline | None = pipeline
        self._known: KnownPrompts | None = None

    @classmethod
    def load(
        cls,
        model: str,
        *,
        precision: str = "fp32",
        device: str = "cpu",
        revision: str | None = None,
        resolution: int | None = None,
    ) -> StableDiffusion3:
        """Load from a local directory or a hub id, text encoders in the same precision.

        Raises:
            UserError: if the model cannot be found, read or is of another family.
        """
        pipeline = load_pipeline(
            StableDiffusion3Pipeline,
            model,
            revision=revision,
            dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        )
        own = own_defaults(model)
        family = cls(
            pipeline,
            model,
            precision=precision,
            device=device,
            resolution=resolution or own.get("resolution"),
        )
        family.default_guidance_scale = own.get("guidance_scale", DEFAULT_GUIDANCE_SCALE)
        return family

    def schedule(self, num_steps: int) -> Schedule:
        try:
            return flow_schedule_from_config(self._scheduler_config, num_steps, tokens=self._tokens)
        except ValueError as error:
            raise UserError(f"--model {self.source}, --num-steps {num_steps}: {error}") from error

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Embeddings (B, L, D) and pooled vectors (B, P) of the prompts and the empty prompt."""
        if self._known is not None:
            return self._known(prompts).to(self.device)

        def batch(prompts: list[str]) -> tuple[Tensor, ...]:
            assert self._text is not None
            with quiet():
                embeddings, _, pooled, _ = self._text.encode_prompt(
                    prompts, None, None, device=self.device, do_classifier_free_guidance=False
                )
            return embeddings, pooled

        states, pooled = encode_in_batches(batch, ["", *prompts])
        b = len(prompts)
        return Conditioning(
            states[1:], states[:1].expand(b, -1, -1), pooled[1:], pooled[:1].expand(b, -1)
        )

    def encode_ahead(self, prompts: Sequence[str]) -> None:
        """Encode these prompts, keep them in main memory, and let the text encoders go."""
        self._known = KnownPrompts(self.encode, prompts)
        self._text = None

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """(B, C, h, w) fp32 noise, as the pipeline draws it from generators on the CPU."""
        return seeded_noise(self._latent_shape, seeds).to(self.device)

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
            dtype = self.dtype if self.dtype != torch.float32 else x.dtype
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

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 3, H, W) images in [0, 1] from latents (B, C, h, w)."""
        config = self.vae.config
        dtype = self.dtype if self.dtype != torch.float32 else latents.dtype
        with autocast(self.device, self.dtype):
            scaled = latents / config.scaling_factor + config.shift_factor
            image = self.vae.decode(scaled.to(dtype), return_dict=False)[0]
        return (image.to(latents.dtype) / 2 + 0.5).clamp(0, 1)

    def save_lora(self, state: Mapping[str, Tensor], path: Path) -> None:
        """Write the LoRA weights of the denoiser in diffusers' layout."""
        StableDiffusion3Pipeline.save_lora_weights(
            save_directory=path.parent,
            transformer_lora_layers=dict(state),
            weight_name=path.name,
            safe_serialization=True,
        )

    def load_lora(self, net: nn.Module, path: Path, adapter_name: str) -> None:
        """Add a LoRA file (diffusers or peft layout) to a view of the denoiser.

        Raises:
            UserError: if the file is missing, damaged or made for another architecture.
        """

        def read(directory: str, **options: object) -> tuple[dict[str, Tensor], object, object]:
            state, metadata = StableDiffusion3Pipeline.lora_state_dict(directory, **options)
            return state, None, metadata

        add_lora_file(net, path, adapter_name, self.source, prefix="transformer", read=read)
