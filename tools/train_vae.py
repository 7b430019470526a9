"""Train the embedded model's AutoencoderKL: 64 x 64 pixels <-> 16 x 16 x 4 latents of about unit
variance.

    python tools/train_vae.py --work build/assets --minutes 9

Needs what data.py wrote; leaves `vae/` (fp32) under --work and appends its figures to
tools/log/vae.csv.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from data import TOOLS, load_pictures
from parallel import average, launch, same_everywhere

KL_WEIGHT = 2e-4


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def over(rgba: Tensor, colour: Tensor) -> Tensor:
    """(B, 4, H, W) in [0, 1] over (B, 3) colours -> (B, 3, H, W) in [-1, 1]."""
    alpha = rgba[:, 3:]
    return (rgba[:, :3] * alpha + colour[:, :, None, None] * (1 - alpha)) * 2 - 1


def augment(rgba: Tensor, generator: torch.Generator) -> Tensor:
    """Flips, shifts, swapped colour channels and plain backgrounds; (B, 4, 64, 64) uint8 -> (B, 3,
    64, 64).
    """
    batch = rgba.float() / 255
    size = len(batch)
    draw = torch.rand(size, 4, generator=generator)
    batch = torch.where((draw[:, 0] < 0.5)[:, None, None, None], batch.flip(-1), batch)
    shift_y, shift_x = (int(v) for v in torch.randint(-6, 7, (2,), generator=generator))
    moved = torch.roll(batch, (shift_y, shift_x), (-2, -1))
    batch = torch.where((draw[:, 1] < 0.5)[:, None, None, None], moved, batch)
    order = torch.randperm(3, generator=generator)
    swapped = torch.cat([batch[:, order], batch[:, 3:]], 1)
    batch = torch.where((draw[:, 2] < 0.15)[:, None, None, None], swapped, batch)
    colour = torch.rand(size, 3, generator=generator)
    colour = torch.where((draw[:, 3] < 0.5)[:, None], torch.ones(()), colour)
    return over(batch, colour)


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 and squared error, and L1 between horizontal and vertical differences at three scales."""
    loss = F.l1_loss(output, target) + 2 * F.mse_loss(output, target)
    for _ in range(3):
        for axis in (-1, -2):
            loss = loss + 0.25 * F.l1_loss(output.diff(dim=axis), target.diff(dim=axis))
        output, target = F.avg_pool2d(output, 2), F.avg_pool2d(target, 2)
    return loss


def train(
    vae: AutoencoderKL, rgba: Tensor, weights: Tensor, args: argparse.Namespace, rank: int
) -> int:
    generator = torch.Generator().manual_seed(args.seed * 100 + rank)
    ema = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    if args.decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    parameters = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=args.lr, weight_decay=1e-4, betas=(0.9, 0.99), fused=True
    )
    start = shown = time.time()
    step, done = 0, 0.0
    while done < 1:
        for group in optimizer.param_groups:
            group["lr"] = (
                args.lr * min(1, (step + 1) / 50) * max(0.5 * (1 + math.cos(math.pi * done)), 0.01)
            )
        rows = torch.multinomial(weights, args.batch, generator=generator)
        images = augment(rgba[rows], generator).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
        mean, std = posterior.mean.float(), posterior.std.float()
        if args.decoder_only:  # sampled latents are a little off: learn to decode such ones
            std = torch.full_like(std, 0.05)
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            output = vae.decode(latents).sample
        kl = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).mean()
        reconstruction = reconstruction_loss(output.float(), images)
        loss = reconstruction + KL_WEIGHT * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        done = average(parameters, (time.time() - start) / (60 * args.minutes))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        ema.update_parameters(vae)
        step += 1
        if rank == 0 and time.time() - shown > 20:
            shown = time.time()
            rate = step * args.batch * args.workers / (shown - start)
            print(
                f"{step} {reconstruction.item():.4f} kl {kl.item():.2f} {rate:.0f} images/s",
                flush=True,
            )
    vae.load_state_dict(ema.module.state_dict())
    return step


@torch.no_grad()
def latent_moments(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Per-channel mean and spread (4,) of the latents of (N, 3, 64, 64) images."""
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in images.split(64)])
    return latents.mean((0, 2, 3)), latents.std((0, 2, 3))


@torch.no_grad()
def fold(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Fold z' = (z - mean) / std into the two 1 x 1 convolutions around the latents: exact, as both
    are affine.
    """
    into, out = vae.quant_conv, vae.post_quant_conv
    into.weight[:4] /= std[:, None, None, None]
    into.bias[:4] = (into.bias[:4] - mean) / std
    into.bias[4:] -= 2 * std.log()
    out.bias += (out.weight * mean[None, :, None, None]).sum((1, 2, 3))
    out.weight *= std[None, :, None, None]


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """Mean over images of the PSNR in dB, pixels in [0, 1]."""
    values = []
    for part in images.split(64):
        output = vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1)
        values.append(-10 * ((output - part) / 2).square().mean((1, 2, 3)).clamp_min(1e-8).log10())
    return float(torch.cat(values).mean())


def work(rank: int, args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    pictures, arrays = load_pictures(args.work)
    rgba = torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous()
    extra = torch.tensor([picture.extra for picture in pictures])
    weights = torch.where(extra, 0.25 / extra.sum(), 0.75 / (~extra).sum())
    vae = AutoencoderKL.from_pretrained(args.resume) if args.resume else make_vae()
    vae = vae.train().to(memory_format=torch.channels_last)
    same_everywhere(vae.parameters())
    steps = train(vae, rgba, weights, args, rank)
    if rank == 0:
        torch.set_num_threads(args.workers)
        finish(vae.float().eval(), rgba, extra, steps, args)


def finish(
    vae: AutoencoderKL, rgba: Tensor, extra: Tensor, steps: int, args: argparse.Namespace
) -> None:
    """Fold the latents' moments into the weights, save, measure, log."""
    white = over(rgba.float() / 255, torch.ones(len(rgba), 3))
    grey = over(rgba[~extra][::3].float() / 255, torch.full((len(rgba[~extra][::3]), 3), 0.7))
    if not args.decoder_only:
        fold(vae, *latent_moments(vae, torch.cat([white[~extra][::2], grey[::2]])))
    vae.save_pretrained(args.work / "vae")
    mean, std = latent_moments(vae, white[~extra][::3])
    row = {
        "steps": steps,
        "images": steps * args.batch * args.workers,
        "minutes": args.minutes,
        "resumed": bool(args.resume),
        "decoder_only": args.decoder_only,
        "psnr_core_white": round(psnr(vae, white[~extra]), 2),
        "psnr_core_grey": round(psnr(vae, grey), 2),
        "psnr_extra_white": round(psnr(vae, white[extra][::5]), 2),
        "latent_mean": " ".join(f"{v:.3f}" for v in mean.tolist()),
        "latent_std": " ".join(f"{v:.3f}" for v in std.tolist()),
        "parameters": sum(p.numel() for p in vae.parameters()),
    }
    print(row)
    log = TOOLS / "log" / "vae.csv"
    log.parent.mkdir(exist_ok=True)
    fresh = not log.exists()
    with log.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("build/assets"))
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--batch", type=int, default=8, help="pictures per process and step")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument(
        "--resume", type=Path, help="start from this VAE; the optimizer starts afresh"
    )
    parser.add_argument(
        "--decoder-only",
        action="store_true",
        help="with --resume: leave the latents as they are, so that the base model need not change",
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    launch(work, args, args.workers)


if __name__ == "__main__":
    main()
