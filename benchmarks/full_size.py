"""One ShortFT update on the full Stable Diffusion 1.5 architecture, with random weights.

    python benchmarks/full_size.py                      # 512 × 512, bf16, per-step recomputation
    python benchmarks/full_size.py --size small         # the same script in seconds

Weights do not matter for time and memory, so that nothing is downloaded. Prints parameters, seconds
of one stage-1 update, and the peak of the process's memory (on a GPU: of its allocator).
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from shortft.assets import asset
from shortft.drawing.progress import memory_text
from shortft.families import default_device
from shortft.families.base import Guidance
from shortft.families.sd import StableDiffusion
from shortft.memory import peak_memory_bytes
from shortft.methods.shortft import shortft_plan
from shortft.networks import ModelNetworks
from shortft.plans import inference_plan
from shortft.rewards import make_reward
from shortft.step import Batch, train_step

SIZES = {  # widths of the U-Net and the decoder, text width, latent side
    "sd15": ((320, 640, 1280, 1280), (128, 256, 512, 512), 768, 64),
    "small": ((32, 64, 64, 64), (32, 32, 32, 32), 64, 16),
}


def pipeline(size: str) -> StableDiffusionPipeline:
    """Stable Diffusion 1.5's modules, made from their configurations."""
    widths, decoder, text, side = SIZES[size]
    tokenizer = CLIPTokenizer.from_pretrained(asset("emoji", "tokenizer"))
    return StableDiffusionPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=decoder,
            layers_per_block=2,
            latent_channels=4,
            sample_size=8 * side,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408,
                hidden_size=text,
                intermediate_size=4 * text,
                num_hidden_layers=12,
                num_attention_heads=12 if text % 12 == 0 else 4,
                max_position_embeddings=77,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        ),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=side,
            block_out_channels=widths,
            layers_per_block=2,
            cross_attention_dim=text,
            attention_head_dim=8,
        ),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=sorted(SIZES), default="sd15")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--guidance-grad", choices=("both", "positive"), default="both")
    parser.add_argument("--no-recompute", action="store_true")
    options = parser.parse_args()
    device = default_device()
    torch.manual_seed(0)
    family = StableDiffusion(
        pipeline(options.size), options.size, precision=options.precision, device=device
    )
    count = sum(p.numel() for p in family.denoiser.parameters())
    print(f"denoiser {count / 1e6:.0f} M parameters on {device}, {options.precision}", flush=True)
    schedule = family.schedule(50)
    nets = ModelNetworks(
        family,
        guidance=Guidance(7.5, options.guidance_grad),
        loras=4,
        rank=options.rank,
        plain_jumps=True,  # in place of an unguided few-step LoRA, at its cost
    )
    loras = [p for n in range(1, 5) for p in nets.parameters_of(n).values()]
    print(f"LoRAs {sum(p.numel() for p in loras) / 1e6:.0f} M parameters", flush=True)
    plan = shortft_plan(schedule, 4, 1)
    nets.train_only(plan.trainable)
    began = time.monotonic()
    outcome = train_step(
        plan,
        [Batch(["red apple"] * options.batch, list(range(options.batch)))],
        family,
        nets,
        schedule,
        make_reward("symmetry", None, device),
        torch.optim.AdamW(loras, lr=1e-4),
        Accelerator(cpu=device == "cpu"),
        inference=inference_plan(schedule, 4),
        max_grad_norm=1.0,
        recompute=not options.no_recompute,
    )
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.monotonic() - began
    print(
        f"stage 1, batch {options.batch}: {plan.calls} calls, {plan.grad_calls} with gradient, "
        f"{seconds:.0f} s, peak {memory_text(peak_memory_bytes())}, gradient norm "
        f"{outcome.grad_norm:.3g}{', not finite' if outcome.skipped else ''}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
