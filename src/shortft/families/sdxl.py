"""Stable Diffusion XL, and every model saved in StableDiffusionXLPipeline's layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from shortft.errors import UserError
from shortft.families.base import Conditioning, Guidance, autocast, classifier_free, seeded_noise
from shortft.families.files import add_lora_file, latent_side, load_pipeline, own_defaults
from shortft.families.text import KnownPrompts, encode_in_batches
from shortft.quiet import quiet
from shortft.schedule import Schedule, schedule_from_config

DEFAULT_GUIDANCE_SCALE = 5.0  # as in StableDiffusionXLPipeline


class StableDiffusionXL:
    """A frozen StableDiffusionXLPipeline taken apart.

    Two text encoders: the embeddings are their second-last states side by side, `pooled` is the
    second one's projection. The network is also told the image's size and crop (time ids).
    """

    name = "sdxl"
    lora_targets: tuple[str, ...] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "ff.net.0.proj",
        "ff.net.2",
    )
    # Trajectory distillation also moves convolutions, projections and the embeddings of time.
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
        pipeline: StableDiffusionXLPipeline,
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
        self.vae = pipeline.vae
        # SDXL's own decoder leaves the range of half precision; a repaired one says so.
        self.vae_dtype = torch.float32 if pipeline.vae.config.force_upcast else self.dtype
        if pipeline.unet.config.in_channels != pipeline.vae.config.latent_channels:
            raise UserError(
                f"--model {source}: its denoiser takes more than latents (an inpainting or "
                "image-guided model); give a plain text-to-image model"
            )
        own, factor = pipeline.unet.config.sample_size, pipeline.vae_scale_factor
        side = latent_side(source, resolution, own, factor=factor)
        self.resolution = side * factor
        self._latent_shape = (pipeline.unet.config.in_channels, side, side)
        self._zeros_for_empty = bool(pipeline.config.force_zeros_for_empty_prompt)
        self._scheduler_config = dict(pipeline.scheduler.config)
        name = self._scheduler_config["_class_name"] = type(pipeline.scheduler).__name__
        if not name.startswith(("DDIM", "PNDM")):
            # Euler's chain, which SDXL ships with, ends at sigma 0 whatever this left-over says.
            self._scheduler_config["set_alpha_to_one"] = True
        if self.device.type == "cpu":
            # The fused kernel's backward is slower than plain attention on CPUs, most so in bf16.
            self.denoiser.set_attn_processor(AttnProcessor())
        with quiet():
            for module, dtype in (
                (self.denoiser, self.dtype),
                (self.vae, self.vae_dtype),
                (pipeline.text_encoder, torch.float32),
                (pipeline.text_encoder_2, torch.float32),
            ):
                module.requires_grad_(False).eval().to(self.device, dtype)
        self.denoiser.to(memory_format=torch.channels_last)
        self.vae.to(memory_format=torch.channels_last)
        self._text: StableDiffusionXLPipeline | None = pipeline
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
    ) -> StableDiffusionXL:
        """Load from a local directory or a hub id.

        Raises:
            UserError: if the model cannot be found, read or is of another family.
        """
        pipeline = load_pipeline(
            StableDiffusionXLPipeline,
            model,
            revision=revision,
            dtype=torch.float32,
            add_watermarker=False,
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
            return schedule_from_config(self._scheduler_config, num_steps)
        except KeyError as error:
            name = self._scheduler_config["_class_name"]
            raise UserError(
                f"--model {self.source}: its scheduler {name} has no {error}, so it is not "
                "supported; give a model with SDXL's own noise schedule"
            ) from error
        except ValueError as error:
            raise UserError(f"--num-steps {num_steps}: {error}") from error

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Embeddings (B, L, D) and pooled vectors (B, P) of the prompts and the empty prompt."""
        if self._known is not None:
            return self._known(prompts).to(self.device)

        def batch(prompts: list[str]) -> tuple[Tensor, ...]:
            assert self._text is not None
            with quiet():
                embeddings, _, pooled, _ = self._text.encode_prompt(
                    prompts, device=self.device, do_classifier_free_guidance=False
                )
            return embeddings, pooled

        states, pooled = encode_in_batches(batch, ["", *prompts])
        if self._zeros_for_empty:
            states[0], pooled[0] = 0, 0
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
        # Original size, top left corner of the crop, target size.
        side = self.resolution
        time_ids = latents.new_tensor([[side, side, 0, 0, side, side]])

        def forward(
            x: Tensor, t: float | Tensor, embeddings: Tensor, pooled: Tensor | None
        ) -> Tensor:
            assert pooled is not None
            dtype = self.dtype if self.dtype != torch.float32 else x.dtype
            with autocast(self.device, self.dtype):
                out: Tensor = net(
                    x.contiguous(memory_format=torch.channels_last).to(dtype),
                    t,
                    embeddings.to(dtype),
                    added_cond_kwargs={
                        "text_embeds": pooled.to(dtype),
                        "time_ids": time_ids.expand(len(x), -1),
                    },
                    return_dict=False,
                )[0]
            return out.to(x.dtype)

        return classifier_free(forward, latents, timestep, cond, g)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 3, H, W) images in [0, 1] from latents (B, C, h, w)."""
        dtype = self.vae_dtype if self.dtype != torch.float32 else latents.dtype
        with autocast(self.device, self.vae_dtype):
            scaled = latents / self.vae.config.scaling_factor
            image = self.vae.decode(scaled.to(dtype), return_dict=False)[0]
        return (image.to(latents.dtype) / 2 + 0.5).clamp(0, 1)

    def save_lora(self, state: Mapping[str, Tensor], path: Path) -> None:
        """Write the LoRA weights of the denoiser in diffusers' layout."""
        StableDiffusionXLPipeline.save_lora_weights(
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
            state, alphas, metadata = StableDiffusionXLPipeline.lora_state_dict(
                directory, unet_config=net.config, **options
            )
            return state, alphas, metadata

        add_lora_file(net, path, adapter_name, self.source, prefix="unet", read=read)
