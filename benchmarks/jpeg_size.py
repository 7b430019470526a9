"""How well differentiable stand-ins follow the true size of a JPEG file.

    python benchmarks/jpeg_size.py FOLDER_OF_64PX_PNGS [--quality 95] [--pictures 150]

Each picture comes on white in 12 versions (blurred, noisy, posterised, ...). Printed: correlation
of each stand-in with the bytes that PIL writes; the least-squares line behind `Compressibility`;
and how many bytes are left when pixels follow each stand-in's gradient.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from kornia.enhance import JPEGCodecDifferentiable
from PIL import Image
from torch import Tensor

from shortft.rewards.compressibility import Compressibility

CODEC = JPEGCodecDifferentiable()


def load(path: Path) -> Tensor:
    """One picture (3, 64, 64) composited on white."""
    picture = Image.open(path).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    pixels = torch.frombuffer(bytearray(white.convert("RGB").tobytes()), dtype=torch.uint8)
    return pixels.view(64, 64, 3).permute(2, 0, 1).float() / 255


def blur(images: Tensor, sigma: float) -> Tensor:
    x = torch.arange(-6.0, 7.0)
    kernel = torch.exp(-x.square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).view(1, 1, 1, 13).expand(3, 1, 1, 13)
    images = F.conv2d(F.pad(images, (6, 6, 0, 0), mode="replicate"), kernel, groups=3)
    kernel = kernel.transpose(2, 3)
    return F.conv2d(F.pad(images, (0, 0, 6, 6), mode="replicate"), kernel, groups=3)


def versions(images: Tensor) -> Tensor:
    """(P, 3, H, W) -> (P, 12, 3, H, W)."""
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(images.shape, generator=generator) for _ in range(3)]
    zoomed = F.interpolate(images[..., 16:48, 16:48], size=64, mode="bicubic", antialias=True)
    made = [
        images,
        *(blur(images, sigma) for sigma in (0.5, 1.0, 2.0)),
        *(images + amount * n for amount, n in zip((0.01, 0.03, 0.08), noise, strict=True)),
        images / 2 + images.mean((2, 3), keepdim=True) / 2,
        (images * 4).round() / 4,
        images.mean(1, keepdim=True).expand_as(images),
        images / 2,
        zoomed,
    ]
    return torch.stack(made, 1).clamp(0, 1)


def codec_distance(images: Tensor, quality: float, norm: int) -> Tensor:
    """DRaFT's reward with the sign turned: distance to the picture after the JPEG codec."""
    difference = (images - CODEC(images, torch.tensor([quality]))).flatten(1)
    return difference.norm(p=norm, dim=1)


def summed(cost: Callable[[Tensor], Tensor], reward: Compressibility, images: Tensor) -> Tensor:
    return torch.stack(
        [cost(plane).flatten(1).sum(1) for plane in reward.coefficients(images)]
    ).sum(0)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's, over the last dimension."""
    return F.cosine_similarity(a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True), dim=-1)


def ranks(values: Tensor) -> Tensor:
    return values.argsort(-1).argsort(-1).double()


def descend(size: Callable[[Tensor], Tensor], reward: Compressibility, start: Tensor) -> str:
    """Follow the normalised gradient of `size` for 60 steps; show change and bytes on the way."""
    images, shown, before = start, [], reward.report(start, [])
    for number in range(1, 61):
        images = images.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(size(images).sum(), images)
        norm = gradient.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
        images = (images.detach() - 0.1 * gradient / norm).clamp(0, 1)
        if number % 20 == 0:
            change = (images - start).square().mean((1, 2, 3)).sqrt().mean()
            shown.append(f"{change:.4f}: {(reward.report(images, []) / before).mean():.3f}")
    return "  ".join(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quality", type=int, default=95)
    parser.add_argument("--pictures", type=int, default=150)
    args = parser.parse_args()

    paths = sorted(args.folder.glob("*.png"))
    random.Random(0).shuffle(paths)
    images = torch.stack([load(path) for path in paths[: args.pictures]])
    table, reward = versions(images), Compressibility(args.quality)
    shape = table.shape[:2]
    true = (1000 * reward.report(table.flatten(0, 1), [])).double().view(shape)
    stand_ins: dict[str, Callable[[Tensor], Tensor]] = {
        "Compressibility": reward.bits_per_pixel,
        "sum log2(1 + |c|)": lambda x: summed(lambda c: torch.log2(1 + c.abs()), reward, x),
        "sum |c|": lambda x: summed(torch.abs, reward, x),
        "|x - codec(x)|2, q 95": lambda x: codec_distance(x, 95, 2),
        "|x - codec(x)|1, q 95": lambda x: codec_distance(x, 95, 1),
        "|x - codec(x)|2, q 20": lambda x: codec_distance(x, 20, 2),
        "|x - codec(x)|2, q 5": lambda x: codec_distance(x, 5, 2),
    }
    print(f"{true.numel()} pictures, quality {args.quality}, mean {true.mean():.0f} bytes")
    print("stand-in               Pearson Spearman | untouched | within one picture")
    for name, size in stand_ins.items():
        with torch.no_grad():
            value = size(table.flatten(0, 1)).double().view(shape)
        figures = (
            correlation(value.flatten(), true.flatten()),
            correlation(ranks(value.flatten()), ranks(true.flatten())),
            correlation(ranks(value[:, 0]), ranks(true[:, 0])),
            correlation(ranks(value), ranks(true)).mean(),
        )
        print(
            f"{name:22s} {figures[0]:7.3f} {figures[1]:8.3f} | {figures[2]:9.3f} | {figures[3]:.3f}"
        )

    with torch.no_grad():
        bits = reward.bits_per_pixel(table.flatten(0, 1)).double() * 64 * 64
    line = torch.stack([bits / 8, torch.ones_like(bits)], 1)
    slope, header = torch.linalg.lstsq(line, true.flatten()[:, None]).solution.flatten().tolist()
    spread = (line @ torch.tensor([slope, header]).double() - true.flatten()).std()
    print(f"bytes = {slope:.3f} * estimate + {header:.0f}, residual {spread:.0f} bytes")

    print("pixels that follow the gradient, RMS change: share of bytes left")
    for name, size in stand_ins.items():
        print(f"{name:22s} {descend(size, reward, images[:48])}")


if __name__ == "__main__":
    main()
