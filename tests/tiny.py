"""Tiny models of the real classes, saved and loaded in the real layout."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from shortft.assets import asset
from shortft.families.sd import StableDiffusion
from shortft.networks import ModelNetworks


def tiny_pipeline(prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    """SD's layer types at a width of 8: 16 × 16 pixels, 8 × 8 latents, random weights."""
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(asset("emoji", "tokenizer"))
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        scaling_factor=0.7,
        mid_block_add_attention=False,
    )
    torch.random.set_rng_state(generator_state)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_family(prediction_type: str = "epsilon") -> StableDiffusion:
    return StableDiffusion(tiny_pipeline(prediction_type), "tiny")


def save_tiny(directory: Path) -> Path:
    tiny_pipeline().save_pretrained(directory)
    return directory


def randomise_loras(nets: ModelNetworks, scale: float = 0.1, seed: int = 1) -> None:
    """LoRAs that do something: B is zero when they are new."""
    generator = torch.Generator().manual_seed(seed)
    for number in range(1, nets.loras + 1):
        for parameter in nets.parameters_of(number).values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.data.add_(scale * noise)


def to_float64(family: StableDiffusion, nets: ModelNetworks) -> None:
    """Every parameter of the model and its LoRAs, in place, so that views keep sharing them."""
    modules = [family.denoiser, family.vae, nets._loras]
    if nets._shortcut is not None:
        modules.append(nets._shortcut)
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = tensor.data.double()
