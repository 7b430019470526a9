"""Stable Diffusion 1.x and 2.x, and every model saved in StableDiffusionPipeline's layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from shortft.errors import UserError
from shortft.families.base import Conditioning, Guidance, autocast, classifier_free, seeded_noise
from shortft.families.files import add_lora_file, latent_side, load_pipeline, own_defaults
from shortft.families.text import KnownPrompts, encode_in_batches
from shortft.quiet import quiet
from shortft.schedule import Schedule, schedule_from_config

DEFAULT_GUIDANCE_SCALE = 7.5  # as in StableDiffusionPipeline


class StableDiffusion:
    """A frozen StableDiffusionPipeline taken apart."""

    name = "sd"
    lora_targets: tuple[str, ...] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "ff.net.0.proj",
        "ff.net.2",
    )
    # Trajectory distillation also moves convolutions, projections and the time embedding.
    shortcut_targets: tuple[str, ...] = (
        *lora_targets,
        "proj_in",
        "proj_out",
        "conv1",
        "conv2",
        "conv_shortcut",
        "conv",
        "time_emb_proj",
        "linear_1",
        "linear_2",
    )

    def __init__(
        self,
        pipeline: StableDiffusionPipeline,
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
        self.denoiser: nn.Module = pipeline.unet
        if pipeline.unet.config.in_channels != pipeline.vae.config.latent_channels:
            raise UserError(
                f"--model {source}: its denoiser takes more than latents (an inpainting or "
                "image-guided model); give a plain text-to-image model"
            )
        own, factor = pipeline.unet.config.sample_size, pipeline.vae_scale_factor
        side = latent_side(source, resolution, own, factor=factor)
        self.resolution = side * factor
        self._latent_shape = (pipeline.unet.config.in_channels, side, side)
        self._known: KnownPrompts | None = None
        self.vae = pipeline.vae
        self.text_encoder = pipeline.text_encoder
        self.tokenizer = pipeline.tokenizer
        self._scheduler_config = dict(pipeline.scheduler.config)
        self._scheduler_config["_class_name"] = type(pipeline.scheduler).__name__
        if self.device.type == "cpu":
            # The fused kernel's backward is slower than plain attention on CPUs, most so in bf16.
            self.denoiser.set_attn_processor(AttnProcessor())
        with quiet():
            for module, dtype in (
                (self.denoiser, self.dtype),
                (self.vae, self.dtype),
                (self.text_encoder, torch.float32),
            ):
                module.requires_grad_(False).eval().to(self.device, dtype)
        self.denoiser.to(memory_format=torch.channels_last)
        self.vae.to(memory_format=torch.channels_last)

    @classmethod
    def load(
        cls,
        model: str,
        *,
        precision: str = "fp32",
        device: str = "cpu",
        revision: str | None = None,
        resolution: int | None = None,
    ) -> StableDiffusion:
        """Load by the embedded name, a local directory or a hub id.

        Raises:
            UserError: if the model cannot be found, read or is of another family.
        """
        pipeline = load_pipeline(
            StableDiffusionPipeline,
            model,
            revision=revision,
            dtype=torch.float32,
            safety_checker=None,
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

    def pipeline(self) -> StableDiffusionPipeline:
        """An ordinary diffusers pipeline on this model's modules, with a DDIM scheduler."""
        with quiet():
            return StableDiffusionPipeline(
                vae=self.vae,
                text_encoder=self.text_encoder,
                tokenizer=self.tokenizer,
                unet=self.denoiser,
                scheduler=DDIMScheduler.from_config(self._scheduler_config),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )

    def schedule(self, num_steps: int) -> Schedule:
        try:
            return schedule_from_config(self._scheduler_config, num_steps)
        except ValueError as error:
            raise UserError(f"--num-steps {num_steps}: {error}") from error

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Embeddings (B, L, D) of the prompts and of the empty prompt."""
        if self._known is not None:
            return self._known(prompts).to(self.device)

        def batch(prompts: list[str]) -> tuple[Tensor, ...]:
            tokens = self.tokenizer(
                prompts,
                padding="max_length",
                max_length=self.tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            states: Tensor = self.text_encoder(tokens.input_ids.to(self.device))[0]
            return (states,)

        (states,) = encode_in_batches(batch, ["", *prompts])
        return Conditioning(states[1:], states[:1].expand(len(prompts), -1, -1))

    def encode_ahead(self, prompts: Sequence[str]) -> None:
        """Encode these prompts, keep them in main memory, and let the text encoder go."""
        self._known = KnownPrompts(self.encode, prompts)
        self.text_encoder = None

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
            x: Tensor, t: float | Tensor, embeddings: Tensor, _pooled: Tensor | None
        ) -> Tensor:
            with autocast(self.device, self.dtype):
                x = x.contiguous(memory_format=torch.channels_last)
                out: Tensor = net(
                    x.to(self._dtype_of(x)),
                    t,
                    embeddings.to(self._dtype_of(x)),
                    return_dict=False,
                )[0]
            return out.to(x.dtype)

        return classifier_free(forward, latents, timestep, cond, g)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 3, H, W) images in [0, 1] from latents (B, C, h, w)."""
        with autocast(self.device, self.dtype):
            scaled = latents / self.vae.config.scaling_factor
            image = self.vae.decode(scaled.to(self._dtype_of(latents)), return_dict=False)[0]
        return (image.to(latents.dtype) / 2 + 0.5).clamp(0, 1)

    def save_lora(self, state: Mapping[str, Tensor], path: Path) -> None:
        StableDiffusionPipeline.save_lora_weights(
            save_directory=path.parent,
            unet_lora_layers=dict(state),
            weight_name=path.name,
            safe_serialization=True,
        )

    def load_lora(self, net: nn.Module, path: Path, adapter_name: str) -> None:
        """Add a LoRA file (diffusers, peft or kohya layout) to a view of the denoiser.

        Raises:
            UserError: if the file is missing, damaged or made for another architecture.
        """

        def read(directory: str, **options: object) -> tuple[dict[str, Tensor], object, object]:
            state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(
                directory, unet_config=net.config, **options
            )
            return state, alphas, metadata

        add_lora_file(net, path, adapter_name, self.source, prefix="unet", read=read)

    def _dtype_of(self, x: Tensor) -> torch.dtype:
        """Half precision where it is asked for; otherwise the caller's (tests use float64)."""
        return self.dtype if self.dtype != torch.float32 else x.dtype
