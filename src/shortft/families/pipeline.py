"""What all families on diffusers pipelines do alike; a family's own file says what differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from shortft.errors import UserError
from shortft.families.base import Conditioning, Guidance, autocast, classifier_free, seeded_noise
from shortft.families.decoder import load_decoder
from shortft.families.files import latent_side, load_pipeline, own_defaults
from shortft.families.lora_files import add_lora_file
from shortft.families.scheduler import check_scheduler
from shortft.families.sharding import shard
from shortft.families.source import Source
from shortft.families.text import KnownPrompts
from shortft.quiet import quiet
from shortft.schedule import Schedule, flow_schedule_from_config, schedule_from_config

DECODER_PREFIXES = ("first_stage_model.", "vae.")
Own = TypeVar("Own", bound="PipelineFamily")


class PipelineFamily:
    """A frozen diffusers pipeline taken apart. A subclass adds `schedule` and `predict`.

    Attributes:
        part: the denoiser's name in the pipeline, and the prefix of its keys in LoRA files.
        guidance_scale: the pipeline's own default.
        load_options: for `from_pretrained`.
        prefixes: text encoder → how its keys start in a single file of the original layout.
        text_in_fp32: keep the text encoders in fp32 whatever the precision.
        prompt_tokens: length of a prompt's embeddings.
        decoders: diffusers' classes that can stand in for the decoder.
    """

    name: str
    pipeline_class: ClassVar[Any]
    part: ClassVar[str]
    guidance_scale: ClassVar[float]
    load_options: ClassVar[dict[str, Any]] = {}
    prefixes: ClassVar[dict[str, tuple[str, ...]]]
    text_in_fp32: ClassVar[bool] = False
    prompt_tokens: ClassVar[int] = 77
    decoders: ClassVar[tuple[str, ...]] = ("AutoencoderKL", "AutoencoderTiny")
    resolution: int
    lora_targets: tuple[str, ...]
    shortcut_targets: tuple[str, ...]
    _latent_shape: tuple[int, int, int]

    def __init__(
        self,
        pipeline: Any,
        source: str,
        *,
        precision: str = "fp32",
        device: str | torch.device = "cpu",
        resolution: int | None = None,
        sharded: bool = False,
    ) -> None:
        self.source = source
        self.device = torch.device(device)
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.default_guidance_scale = self.guidance_scale
        self.denoiser: nn.Module = getattr(pipeline, self.part)
        self.vae = pipeline.vae
        self.vae_dtype = self._vae_dtype()
        networks = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
        self.all_parameters = sum(p.numel() for net in networks for p in net.parameters())
        self._scheduler_config = dict(pipeline.scheduler.config)
        self._scheduler_config["_class_name"] = type(pipeline.scheduler).__name__
        self._text: Any = pipeline
        self._known: KnownPrompts | None = None
        self._read(pipeline, resolution)
        encoders = [getattr(pipeline, f"text_encoder{n}", None) for n in ("", "_2", "_3")]
        with quiet():
            self.denoiser.requires_grad_(False).eval().to(self.dtype)
            if sharded:  # before the device sees it, which may not hold all of it
                shard(self.denoiser)
            self.denoiser.to(self.device)
            self.vae.requires_grad_(False).eval().to(self.device, self.vae_dtype)
            for encoder in encoders:
                if encoder is not None:
                    encoder.requires_grad_(False).eval().to(self.device)

    def _read(self, pipeline: Any, resolution: int | None) -> None:
        """Set `resolution`, `_latent_shape`, and what else the family takes from the pipeline.

        Raises:
            UserError: if the model or the resolution does not fit.
        """
        raise NotImplementedError

    def _vae_dtype(self) -> torch.dtype:
        return self.dtype

    @classmethod
    def load(
        cls: type[Own],
        source: Source,
        *,
        precision: str = "fp32",
        device: str = "cpu",
        resolution: int | None = None,
        decoder: str | None = None,
        sharded: bool = False,
    ) -> Own:
        """Load from where the model lies.

        Args:
            sharded: share the denoiser's weights out over processes, see `shard`.
            decoder: what takes the place of the model's own decoder, see `load_decoder`.

        Raises:
            UserError: if the model cannot be found, read or is of another family.
        """
        check_scheduler(source, cls.pipeline_class, cls._try_scheduler)
        half = precision == "bf16" and not cls.text_in_fp32
        dtype = torch.bfloat16 if half else torch.float32
        options = dict(cls.load_options)
        if decoder is not None:
            options["vae"] = load_decoder(decoder, source, cls.name, cls.decoders)
        pipeline = cls.open(source, dtype, **options)
        own = own_defaults(source)
        family = cls(
            pipeline,
            source.name,
            precision=precision,
            device=device,
            resolution=resolution or own.get("resolution"),
            sharded=sharded,
        )
        family.default_guidance_scale = own.get("guidance_scale", family.default_guidance_scale)
        return family

    @staticmethod
    def _try_scheduler(config: Mapping[str, Any]) -> None:
        """Raise what `schedule` would, whatever the number of steps and the size."""
        flow_schedule_from_config(config, 1, tokens=1)

    @classmethod
    def open(cls, source: Source, dtype: torch.dtype, **options: Any) -> Any:
        """The whole pipeline, as diffusers loads it.

        Raises:
            UserError: if the model cannot be found, read or is of another family.
        """
        return load_pipeline(
            cls.pipeline_class,
            source,
            cls.prefixes | {"vae": DECODER_PREFIXES},
            dtype=dtype,
            **options,
        )

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Embeddings of the prompts, and what else the family's network is told of them."""
        if self._known is not None:
            return self._known(prompts)
        return self._encode(prompts)

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        raise NotImplementedError

    def encode_ahead(self, prompts: Sequence[str]) -> None:
        """Encode these prompts, keep them in main memory, and let the text encoders go."""
        self._known = KnownPrompts(self.encode, prompts, self.device)
        self._text = None

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """(B, C, h, w) fp32 noise, as the pipeline draws it from generators on the CPU."""
        return seeded_noise(self._latent_shape, seeds).to(self.device)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 3, H, W) images in [0, 1] from latents (B, C, h, w)."""
        decoded = self._as_decoded(latents).to(self.working(latents, self.vae_dtype))
        with autocast(self.device, self.vae_dtype):
            image = self.vae.decode(decoded)[0]
        return (image.to(latents.dtype) / 2 + 0.5).clamp(0, 1)

    def _as_decoded(self, latents: Tensor) -> Tensor:
        """Latents as the decoder takes them."""
        config = self.vae.config
        scaled: Tensor = latents / config.scaling_factor
        return scaled + config.shift_factor if config.get("shift_factor") else scaled

    def working(self, x: Tensor, half: torch.dtype) -> torch.dtype:
        """Half precision where it is asked for; otherwise the caller's (tests use float64)."""
        return half if self.dtype != torch.float32 else x.dtype

    def save_lora(self, state: Mapping[str, Tensor], path: Path) -> None:
        """Write the LoRA weights of the denoiser in diffusers' layout."""
        self.pipeline_class.save_lora_weights(
            save_directory=path.parent,
            weight_name=path.name,
            safe_serialization=True,
            **{f"{self.part}_lora_layers": dict(state)},
        )

    def load_lora(self, net: nn.Module, path: Path, adapter_name: str) -> None:
        """Add a LoRA file in any layout that diffusers reads for the family to a view.

        Raises:
            UserError: if the file is missing, damaged or made for another architecture.
        """

        def read(directory: str, **options: Any) -> tuple[dict[str, Tensor], Any, Any]:
            return self._read_lora(net, directory, **options)

        add_lora_file(net, path, adapter_name, self.source, prefix=self.part, read=read)

    def _read_lora(
        self, net: Any, directory: str, **options: Any
    ) -> tuple[dict[str, Tensor], Any, Any]:
        """Weights in diffusers' or peft's names, network alphas or None, metadata or None."""
        raise NotImplementedError


class UNetFamily(PipelineFamily):
    """Stable Diffusion up to XL: a U-Net with classifier-free guidance."""

    part = "unet"
    text_in_fp32 = True
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

    def _read(self, pipeline: Any, resolution: int | None) -> None:
        config = pipeline.unet.config
        refuse_other_inputs(self.source, config.in_channels, pipeline.vae.config.latent_channels)
        factor = pipeline.vae_scale_factor
        side = latent_side(self.source, resolution, config.sample_size, factor=factor)
        self.resolution = side * factor
        self._latent_shape = (config.in_channels, side, side)
        if self.device.type == "cpu":
            # The fused kernel's backward is slower than plain attention on CPUs, most so in bf16.
            pipeline.unet.set_attn_processor(AttnProcessor())
        # With channels last CPUs are slow at group norms in bf16: up to a sixth of an update.
        first = self.device.type == "cpu" and self.dtype == torch.bfloat16
        self._layout = torch.contiguous_format if first else torch.channels_last
        if not self._scheduler_config["_class_name"].startswith(("DDIM", "PNDM")):
            # Euler's chain, as SDXL ships with, ends at sigma 0 whatever this left-over says.
            self._scheduler_config["set_alpha_to_one"] = True
        pipeline.unet.to(memory_format=self._layout)
        pipeline.vae.to(memory_format=self._layout)

    @staticmethod
    def _try_scheduler(config: Mapping[str, Any]) -> None:
        schedule_from_config(config, 1)

    def schedule(self, num_steps: int) -> Schedule:
        try:
            return schedule_from_config(self._scheduler_config, num_steps)
        except KeyError as error:
            name = self._scheduler_config["_class_name"]
            raise UserError(
                f"--model {self.source}: its scheduler {name} has no {error}, so it is not "
                "supported; give a model with Stable Diffusion's own noise schedule"
            ) from error
        except ValueError as error:
            raise UserError(f"--model {self.source}, --num-steps {num_steps}: {error}") from error

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
            dtype = self.working(x, self.dtype)
            more = None if pooled is None else self._added(x, pooled.to(dtype))
            with autocast(self.device, self.dtype):
                out: Tensor = net(
                    x.contiguous(memory_format=self._layout).to(dtype),
                    t,
                    embeddings.to(dtype),
                    added_cond_kwargs=more,
                    return_dict=False,
                )[0]
            return out.to(x.dtype)

        return classifier_free(forward, latents, timestep, cond, g)

    def _added(self, x: Tensor, pooled: Tensor) -> dict[str, Tensor]:
        """What the network is told besides embeddings."""
        raise NotImplementedError

    def _read_lora(
        self, net: Any, directory: str, **options: Any
    ) -> tuple[dict[str, Tensor], Any, Any]:
        found: tuple[dict[str, Tensor], Any, Any] = self.pipeline_class.lora_state_dict(
            directory, unet_config=net.config, **options
        )
        return found


def refuse_other_inputs(source: str, takes: int, latents: int) -> None:
    """Whether a denoiser takes latents alone.

    Raises:
        UserError: if not.
    """
    if takes != latents:
        raise UserError(
            f"--model {source}: its denoiser takes more than latents (an inpainting or "
            "image-guided model); give a plain text-to-image model"
        )
