"""Stable Diffusion 1.x and 2.x, and every model saved in StableDiffusionPipeline's layout."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from safetensors import SafetensorError
from torch import Tensor, nn

from shortft.assets import model_path
from shortft.errors import UserError
from shortft.families.base import Conditioning, Guidance, classifier_free
from shortft.quiet import quiet
from shortft.schedule import Schedule, schedule_from_config

DEFAULT_GUIDANCE_SCALE = 7.5  # as in StableDiffusionPipeline
DEFAULTS_FILE = "shortft.json"  # a model directory may name its own: {"guidance_scale": 3.0}


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
        size = pipeline.unet.config.sample_size
        self._latent_shape = (1, pipeline.unet.config.in_channels, size, size)
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
    def load(cls, model: str, *, precision: str = "fp32", device: str = "cpu") -> StableDiffusion:
        """Load by the embedded name, a local directory or a hub id.

        Raises:
            UserError: if the model cannot be found, read or is of another family.
        """
        path = model_path(model)
        try:
            with quiet():
                pipeline = StableDiffusionPipeline.from_pretrained(
                    path, dtype=torch.float32, safety_checker=None, use_safetensors=True
                )
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise UserError(
                f"--model {model}: cannot be loaded as a Stable Diffusion pipeline ({reason}); "
                "give `emoji`, a directory saved by save_pretrained, or a hub id"
            ) from error
        family = cls(pipeline, model, precision=precision, device=device)
        defaults = Path(path) / DEFAULTS_FILE
        if defaults.is_file():
            family.default_guidance_scale = float(
                json.loads(defaults.read_text())["guidance_scale"]
            )
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
        tokens = self.tokenizer(
            ["", *prompts],
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        batches = tokens.input_ids.to(self.device).split(64)
        states = torch.cat([self.text_encoder(ids)[0] for ids in batches])
        return Conditioning(states[1:], states[:1].expand(len(prompts), -1, -1))

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """(B, C, h, w) fp32 noise, drawn on the CPU as diffusers draws it from a generator list."""
        shape = self._latent_shape
        drawn = [
            torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds
        ]
        return torch.cat(drawn).to(self.device)

    def predict(
        self,
        net: nn.Module,
        latents: Tensor,
        timestep: float | Tensor,
        cond: Conditioning,
        g: Guidance,
    ) -> Tensor:
        """Guided prediction (B, C, h, w) in the latents' dtype."""

        def forward(x: Tensor, t: float | Tensor, embeddings: Tensor) -> Tensor:
            with self._autocast():
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
        with self._autocast():
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
        if not path.is_file():
            raise UserError(f"{path}: no such LoRA file")
        try:
            state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(
                str(path.parent),
                weight_name=path.name,
                unet_config=net.config,
                return_lora_metadata=True,
                use_safetensors=True,
                local_files_only=True,
            )
            StableDiffusionPipeline.load_lora_into_unet(
                state, network_alphas=alphas, unet=net, adapter_name=adapter_name, metadata=metadata
            )
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"{path}: cannot be loaded as a LoRA of {self.source} ({reason}); "
                "check that it was made for this architecture"
            ) from error
        net.requires_grad_(False)

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def _dtype_of(self, x: Tensor) -> torch.dtype:
        """Half precision where it is asked for; otherwise the caller's (tests use float64)."""
        return self.dtype if self.dtype != torch.float32 else x.dtype
