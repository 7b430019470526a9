"""FLUX.1, and every model saved in FluxPipeline's layout."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import FluxPipeline
from torch import Tensor, nn

from shortft.errors import UserError
from shortft.families.base import Conditioning, Guidance, autocast, seeded_noise
from shortft.families.files import add_lora_file, latent_side, load_pipeline, own_defaults
from shortft.families.text import KnownPrompts, encode_in_batches
from shortft.quiet import quiet
from shortft.schedule import Schedule, flow_schedule_from_config

DEFAULT_GUIDANCE_SCALE = 3.5  # as in FluxPipeline
LATENT_SIDE = 128  # as in FluxPipeline: the transformer's config names no size


class Flux:
    """A frozen FluxPipeline taken apart.

    A transformer that predicts the flow eps - x0. T5 gives the embeddings, CLIP the pooled
    vector. Guidance is an input of the network (FLUX.1-dev is distilled from guidance): one
    evaluation per step, and no empty prompt. Latents stay (B, C, h, w) outside; the network sees
    patches of 2 × 2 as tokens, each with its position.
    """

    name = "flux"
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

    def __init__(
        self,
        pipeline: FluxPipeline,
        source: str,
        *,
        precision: str = "fp32",
        device: str | torch.device = "cpu",
        resolution: int | None = None,
    ) -> None:
        self.source = source
        self.device = torch.device(device)
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.denoiser: nn.Module = pipeline.transformer
        self.vae = pipeline.vae
        config, factor = pipeline.transformer.config, pipeline.vae_scale_factor
        if config.in_channels != 4 * pipeline.vae.config.latent_channels:
            raise UserError(
                f"--model {source}: its denoiser takes more than latents (an inpainting or "
                "image-guided model); give a plain text-to-image model"
            )
        self.guidance_embeds = bool(config.guidance_embeds)
        self.default_guidance_scale = DEFAULT_GUIDANCE_SCALE if self.guidance_embeds else 1.0
        # By full name: the network's own last layer is called proj_out too.
        layers = range(config.num_single_layers)
        self.lora_targets: tuple[str, ...] = (
            *self._everywhere,
            *(f"single_transformer_blocks.{i}.proj_out" for i in layers),
        )
        # Trajectory distillation also moves modulation, projections and the embeddings of time.
        self.shortcut_targets: tuple[str, ...] = (
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
        side = latent_side(source, resolution, LATENT_SIDE, factor=factor, patch=2)
        self.resolution = side * factor
        self._latent_shape = (pipeline.vae.config.latent_channels, side, side)
        self._scheduler_config = dict(pipeline.scheduler.config)
        self._scheduler_config["_class_name"] = type(pipeline.scheduler).__name__
        with quiet():
            for module in (self.denoiser, self.vae):
                module.requires_grad_(False).eval().to(self.device, self.dtype)
            for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
                encoder.requires_grad_(False).eval().to(self.device)
        self._text: FluxPipeline | None = pipeline
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
    ) -> Flux:
        """Load from a local directory or a hub id, text encoders in the same precision.

        Raises:
            UserError: if the model cannot be found, read or is of another family.
        """
        pipeline = load_pipeline(
            FluxPipeline,
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
        family.default_guidance_scale = own.get("guidance_scale", family.default_guidance_scale)
        return family

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

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Embeddings (B, L, D) and pooled vectors (B, P) of the prompts."""
        if self._known is not None:
            return self._known(prompts).to(self.device)

        def batch(prompts: list[str]) -> tuple[Tensor, ...]:
            assert self._text is not None
            with quiet():
                embeddings, pooled, _ = self._text.encode_prompt(prompts, device=self.device)
            return embeddings, pooled

        states, pooled = encode_in_batches(batch, prompts)
        return Conditioning(states, states[:, :0], pooled)

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
        """The prediction (B, C, h, w) under embedded guidance, in the latents' dtype.

        Raises:
            UserError: for guidance on a model that takes none (FLUX.1-schnell).
        """
        if not self.guidance_embeds and g.scale != 1:
            raise UserError(
                f"--guidance-scale {g.scale:g}: {self.source} takes no guidance; give 1"
            )
        assert cond.pooled is not None
        dtype = self.dtype if self.dtype != torch.float32 else latents.dtype
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
        FluxPipeline.save_lora_weights(
            save_directory=path.parent,
            transformer_lora_layers=dict(state),
            weight_name=path.name,
            safe_serialization=True,
        )

    def load_lora(self, net: nn.Module, path: Path, adapter_name: str) -> None:
        """Add a LoRA file (diffusers, peft or kohya layout) to a view of the denoiser.

        Raises:
            UserError: if the file is missing, damaged or made for another architecture.
        """

        def read(directory: str, **options: object) -> tuple[dict[str, Tensor], object, object]:
            state, alphas, metadata = FluxPipeline.lora_state_dict(
                directory, return_alphas=True, **options
            )
            return state, alphas, metadata

        add_lora_file(net, path, adapter_name, self.source, prefix="transformer", read=read)


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
