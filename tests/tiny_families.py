"""Tiny pipelines of every family's real classes, with every type of layer they have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    EulerDiscreteScheduler,
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
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2TokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from shortft.assets import asset
from tiny import tiny_pipeline

PIXELS = 16  # of every tiny model but FLUX, whose own size does not come from its config


def clip_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(asset("emoji", "tokenizer"))


def clip_encoder(
    kind: Any, *, width: int = 16, projection: int = 16, act: str = "quick_gelu"
) -> Any:
    tokenizer = clip_tokenizer()
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            hidden_act=act,
            projection_dim=projection,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def t5_tokenizer() -> T5TokenizerFast:
    """One token per letter."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = [(letter, -2.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    return T5TokenizerFast(vocab=special + letters, extra_ids=0)


def t5_encoder(*, width: int = 16) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer()),
            d_model=width,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )


def qwen_tokenizer() -> Qwen2TokenizerFast:
    """One token per byte, and Qwen3's way of putting a message."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(ByteLevel.alphabet())
    return Qwen2TokenizerFast(
        vocab={token: i for i, token in enumerate([*letters, *special])},
        merges=[],
        extra_special_tokens=special[1:],
        chat_template=(
            "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
            "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
            "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
        ),
    )


def qwen_encoder(*, width: int = 8) -> Qwen3ForCausalLM:
    """Deep enough for the layers 9, 18 and 27, which FLUX.2 klein reads."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(qwen_tokenizer()),
            hidden_size=width,
            intermediate_size=12,
            num_hidden_layers=28,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
            tie_word_embeddings=True,
        )
    )


def autoencoder(kind: Any = AutoencoderKL, **options: Any) -> Any:
    return kind(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),  # of two widths, as real ones, for the shortcuts between them
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=PIXELS,
        **options,
    )


def tiny_sd(*, second: bool = False) -> StableDiffusionPipeline:
    """Stable Diffusion's layers as `tiny_pipeline` has them, with its decoder's attention.

    Args:
        second: as in 2.x: v-prediction, linear projections, heads of one width.
    """
    pipeline = tiny_pipeline("v_prediction" if second else "epsilon")
    if second:
        config = {**pipeline.unet.config, "use_linear_projection": True}
        torch.manual_seed(1)
        pipeline.unet = UNet2DConditionModel.from_config({**config, "attention_head_dim": (1, 2)})
    pipeline.vae = autoencoder(latent_channels=4, scaling_factor=0.18215)
    return pipeline


def tiny_sdxl(*, zeros_for_empty: bool = True, projection: int = 20) -> StableDiffusionXLPipeline:
    """8 × 8 latents; linear projections and the embedding of text, size and crop, as in SDXL."""
    return StableDiffusionXLPipeline(
        vae=autoencoder(latent_channels=4, scaling_factor=0.13025, force_upcast=True),
        text_encoder=clip_encoder(CLIPTextModel),
        text_encoder_2=clip_encoder(
            CLIPTextModelWithProjection, width=24, projection=projection, act="gelu"
        ),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            cross_attention_dim=16 + 24,
            attention_head_dim=(1, 2),
            transformer_layers_per_block=(1, 1),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + projection,
        ),
        # Stability AI's scheduler_config.json, left-overs included.
        scheduler=EulerDiscreteScheduler.from_config(
            {
                "beta_end": 0.012,
                "beta_schedule": "scaled_linear",
                "beta_start": 0.00085,
                "clip_sample": False,
                "interpolation_type": "linear",
                "num_train_timesteps": 1000,
                "prediction_type": "epsilon",
                "sample_max_value": 1.0,
                "set_alpha_to_one": False,
                "skip_prk_steps": True,
                "steps_offset": 1,
                "timestep_spacing": "leading",
                "trained_betas": None,
                "use_karras_sigmas": False,
            }
        ),
        force_zeros_for_empty_prompt=zeros_for_empty,
        add_watermarker=False,
    )


def tiny_sd3(*, t5: bool = True, first: bool = False) -> StableDiffusion3Pipeline:
    """8 × 8 latents; SD3.5 medium's query-key norm and second attention in one layer.

    Args:
        first: as in 3.0, which has neither.
    """
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=36,
            caption_projection_dim=16,
            pooled_projection_dim=12 + 20,
            pos_embed_max_size=8,
            dual_attention_layers=() if first else (0,),
            qk_norm=None if first else "rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
        vae=autoencoder(
            latent_channels=16,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=clip_encoder(CLIPTextModelWithProjection, width=12, projection=12),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(
            CLIPTextModelWithProjection, width=20, projection=20, act="gelu"
        ),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(width=36) if t5 else None,
        tokenizer_3=t5_tokenizer() if t5 else None,
    )


def tiny_flux(
    *, guidance_embeds: bool = True, layers: int = 2, heads: int = 2, head_dim: int = 8
) -> FluxPipeline:
    """Joint and single layers; FLUX.1's shift by resolution."""
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=layers,
            num_single_layers=layers,
            attention_head_dim=head_dim,
            num_attention_heads=heads,
            joint_attention_dim=20,
            pooled_projection_dim=16,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(head_dim // 4, head_dim // 4, head_dim // 2),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=1000,
            shift=3.0 if guidance_embeds else 1.0,
            use_dynamic_shifting=guidance_embeds,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
        vae=autoencoder(
            latent_channels=4,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=clip_encoder(CLIPTextModel),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(width=20),
        tokenizer_2=t5_tokenizer(),
    )


def tiny_flux2(*, distilled: bool = False) -> Flux2KleinPipeline:
    """Joint and single layers; a decoder whose running statistics differ by channel."""
    vae = autoencoder(AutoencoderKLFlux2, latent_channels=4)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return Flux2KleinPipeline(
        transformer=Flux2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=3 * 8,
            timestep_guidance_channels=16,
            axes_dims_rope=(2, 2, 2, 2),
            guidance_embeds=False,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=1000,
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
        vae=vae,
        text_encoder=qwen_encoder(width=8),
        tokenizer=qwen_tokenizer(),
        is_distilled=distilled,
    )


BUILDERS: dict[str, Callable[..., Any]] = {
    "sd": tiny_sd,
    "sdxl": tiny_sdxl,
    "sd3": tiny_sd3,
    "flux": tiny_flux,
    "flux2": tiny_flux2,
}


def tiny(name: str, **options: Any) -> Any:
    """A tiny pipeline with random weights, large enough to tell right from wrong."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = BUILDERS[name](**options)
        # A new transformer's modulation is small: at that size a mistake in time hardly shows.
        denoiser = pipeline.components.get("transformer") or pipeline.components["unet"]
        for parameter in denoiser.parameters():
            if parameter.dim() > 1:
                parameter.data.mul_(1.5)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()  # T5 has dropout
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
