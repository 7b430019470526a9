"""Write the outlines of released models: their configurations in diffusers' layout, no weights.

    python tools/outlines.py             # into src/shortft/assets/outlines, in seconds

`shortft train --dry-run` and `shortft doctor` count parameters, memory and operations on an empty
network made from an outline, so that nothing has to be downloaded for an estimate. The values are
written down from the models' published architectures; no file of theirs was at hand. At the end the
parameters of each denoiser are compared with the known number.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import diffusers
import torch

ROOT = Path(__file__).parent.parent / "src" / "shortft" / "assets" / "outlines"

CLIP_L = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_L_PROJECTED = {**CLIP_L, "architectures": ["CLIPTextModelWithProjection"]}
CLIP_G = {
    **CLIP_L_PROJECTED,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
T5_XXL = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False,
    "tie_word_embeddings": False,
}
QWEN3_4B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
VAE_16 = {
    **VAE,
    "latent_channels": 16,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
SD3 = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}

# Pipeline, denoiser, VAE, scheduler, text encoders; and the denoiser's parameters as published.
Outline = tuple[
    str,
    tuple[str, dict[str, Any]],
    dict[str, Any],
    tuple[str, dict[str, Any]],
    list[dict[str, Any]],
    float,
]
OUTLINES: dict[str, Outline] = {
    "sd15": (
        "StableDiffusionPipeline",
        (
            "UNet2DConditionModel",
            {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        ),
        VAE,
        (
            "PNDMScheduler",
            {**BETAS, "set_alpha_to_one": False, "skip_prk_steps": True},
        ),
        [CLIP_L],
        859.5e6,
    ),
    "sdxl": (
        "StableDiffusionXLPipeline",
        (
            "UNet2DConditionModel",
            {
                "sample_size": 128,
                "block_out_channels": [320, 640, 1280],
                "down_block_types": [
                    "DownBlock2D",
                    "CrossAttnDownBlock2D",
                    "CrossAttnDownBlock2D",
                ],
                "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
                "transformer_layers_per_block": [1, 2, 10],
                "attention_head_dim": [5, 10, 20],
                "cross_attention_dim": 2048,
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
            },
        ),
        {**VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
        ("EulerDiscreteScheduler", {**BETAS, "timestep_spacing": "leading"}),
        [CLIP_L, CLIP_G],
        2567.5e6,
    ),
    "sd3": (
        "StableDiffusion3Pipeline",
        ("SD3Transformer2DModel", SD3),
        {**VAE_16, "scaling_factor": 1.5305, "shift_factor": 0.0609},
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        [CLIP_L_PROJECTED, CLIP_G, T5_XXL],
        2028.3e6,
    ),
    "sd35": (
        "StableDiffusion3Pipeline",
        (
            "SD3Transformer2DModel",
            {
                **SD3,
                "pos_embed_max_size": 384,
                "dual_attention_layers": list(range(13)),
                "qk_norm": "rms_norm",
            },
        ),
        {**VAE_16, "scaling_factor": 1.5305, "shift_factor": 0.0609},
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        [CLIP_L_PROJECTED, CLIP_G, T5_XXL],
        2243.2e6,
    ),
    "flux": (
        "FluxPipeline",
        (
            "FluxTransformer2DModel",
            {"pooled_projection_dim": 768, "guidance_embeds": True},
        ),
        {**VAE_16, "scaling_factor": 0.3611, "shift_factor": 0.1159},
        (
            "FlowMatchEulerDiscreteScheduler",
            {"shift": 3.0, "use_dynamic_shifting": True},
        ),
        [CLIP_L, T5_XXL],
        11901.4e6,
    ),
    "flux2": (
        "Flux2KleinPipeline",
        (
            "Flux2Transformer2DModel",
            {
                "num_layers": 5,
                "num_single_layers": 20,
                "num_attention_heads": 24,
                "joint_attention_dim": 7680,
                "guidance_embeds": False,
            },
        ),
        {**VAE, "latent_channels": 32, "sample_size": 1024},
        (
            "FlowMatchEulerDiscreteScheduler",
            {"shift": 3.0, "use_dynamic_shifting": True},
        ),
        [QWEN3_4B],
        3880e6,
    ),
}


def write(folder: Path, config: dict[str, Any], name: str = "config.json") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / name).write_text(text, encoding="utf-8")


def main() -> int:
    for name, (pipeline, denoiser, vae, scheduler, encoders, published) in OUTLINES.items():
        folder = ROOT / name
        part = "unet" if denoiser[0].startswith("UNet") else "transformer"
        index: dict[str, Any] = {"_class_name": pipeline}
        index[part] = ["diffusers", denoiser[0]]
        kind = "AutoencoderKLFlux2" if name == "flux2" else "AutoencoderKL"
        index["vae"] = ["diffusers", kind]
        index["scheduler"] = ["diffusers", scheduler[0]]
        write(folder / part, {"_class_name": denoiser[0], **denoiser[1]})
        write(folder / "vae", {"_class_name": kind, **vae})
        write(
            folder / "scheduler",
            {"_class_name": scheduler[0], **scheduler[1]},
            "scheduler_config.json",
        )
        for number, config in enumerate(encoders, start=1):
            suffix = "" if number == 1 else f"_{number}"
            index[f"text_encoder{suffix}"] = ["transformers", config["architectures"][0]]
            write(folder / f"text_encoder{suffix}", config)
        write(folder, index, "model_index.json")
        with torch.device("meta"):
            network = getattr(diffusers, denoiser[0])(**denoiser[1])
        count = sum(p.numel() for p in network.parameters())
        print(f"{name}: {count / 1e6:.1f} M parameters, known {published / 1e6:.1f} M")
        if abs(count / published - 1) > 0.002:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
