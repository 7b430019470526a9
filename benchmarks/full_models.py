"""The architectures of the released models at full size, made from their configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

from shortft.assets import asset
from shortft.families.flux import Flux
from shortft.families.flux2 import Flux2Klein
from shortft.families.pipeline import PipelineFamily
from shortft.families.sd import StableDiffusion
from shortft.families.sd3 import StableDiffusion3
from shortft.families.sdxl import StableDiffusionXL


def tokenizer() -> CLIPTokenizer:
    """The embedded model's, at the length of the released ones."""
    words = CLIPTokenizer.from_pretrained(asset("emoji", "tokenizer"))
    words.model_max_length = 77
    return words


def clip_text(kind: Any, width: int, layers: int, heads: int) -> Any:
    words = tokenizer()
    return kind(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            projection_dim=width,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
        )
    )


def t5_xxl() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=32128,
            d_model=4096,
            d_kv=64,
            d_ff=10240,
            num_layers=24,
            num_heads=64,
            feed_forward_proj="gated-gelu",
        )
    )


def autoencoder(widths: tuple[int, ...] = (128, 256, 512, 512), **options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=widths,
        layers_per_block=2,
        sample_size=512,
        **options,
    )


def ddim() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def sd15(
    widths: tuple[int, ...] = (320, 640, 1280, 1280),
    decoder: tuple[int, ...] = (128, 256, 512, 512),
    text: int = 768,
    side: int = 64,
) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=autoencoder(decoder, latent_channels=4),
        text_encoder=clip_text(CLIPTextModel, text, 12, text // 64),
        tokenizer=tokenizer(),
        unet=UNet2DConditionModel(
            sample_size=side,
            block_out_channels=widths,
            layers_per_block=2,
            cross_attention_dim=text,
            attention_head_dim=8,
        ),
        scheduler=ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def small() -> StableDiffusionPipeline:
    """SD1.5's layers at a width that runs in seconds."""
    return sd15((32, 64, 64, 64), (32, 32, 32, 32), 64, 16)


def sdxl() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=autoencoder(latent_channels=4, scaling_factor=0.13025, force_upcast=True),
        text_encoder=clip_text(CLIPTextModel, 768, 12, 12),
        text_encoder_2=clip_text(CLIPTextModelWithProjection, 1280, 32, 20),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        scheduler=ddim(),
        add_watermarker=False,
    )


def sd35(*, layers: int, heads: int, dual: int, positions: int) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=128,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=layers,
            attention_head_dim=64,
            num_attention_heads=heads,
            joint_attention_dim=4096,
            caption_projection_dim=64 * heads,
            pooled_projection_dim=2048,
            pos_embed_max_size=positions,
            dual_attention_layers=tuple(range(dual)),
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_text(CLIPTextModelWithProjection, 768, 12, 12),
        tokenizer=tokenizer(),
        text_encoder_2=clip_text(CLIPTextModelWithProjection, 1280, 32, 20),
        tokenizer_2=tokenizer(),
        text_encoder_3=t5_xxl(),
        tokenizer_3=None,
    )


def flux() -> FluxPipeline:
    return FluxPipeline(
        transformer=FluxTransformer2DModel(guidance_embeds=True),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_text(CLIPTextModel, 768, 12, 12),
        tokenizer=tokenizer(),
        text_encoder_2=t5_xxl(),
        tokenizer_2=None,
    )


def flux2() -> Flux2KleinPipeline:
    """Klein, 4 B, as it was before distillation: with guidance."""
    return Flux2KleinPipeline(
        transformer=Flux2Transformer2DModel(
            num_layers=5,
            num_single_layers=20,
            num_attention_heads=24,
            joint_attention_dim=3 * 2560,
            guidance_embeds=False,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=AutoencoderKLFlux2(),
        text_encoder=Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=151936,
                hidden_size=2560,
                intermediate_size=9728,
                num_hidden_layers=36,
                num_attention_heads=32,
                num_key_value_heads=8,
                head_dim=128,
                tie_word_embeddings=True,
            )
        ),
        tokenizer=None,
    )


# Name → family, its pipeline, tokens of a prompt's embedding.
MODELS: dict[str, tuple[type[PipelineFamily], Callable[[], Any], int]] = {
    "small": (StableDiffusion, small, 77),
    "sd15": (StableDiffusion, sd15, 77),
    "sdxl": (StableDiffusionXL, sdxl, 77),
    "sd35-medium": (
        StableDiffusion3,
        lambda: sd35(layers=24, heads=24, dual=13, positions=384),
        77 + 256,
    ),
    "sd35-large": (
        StableDiffusion3,
        lambda: sd35(layers=38, heads=38, dual=0, positions=192),
        77 + 256,
    ),
    "flux": (Flux, flux, 512),
    "flux2": (Flux2Klein, flux2, 512),
}
