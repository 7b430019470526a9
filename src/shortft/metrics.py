"""What a reward does not tell: variety, collapse, and how sure a mean is. Tensors only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

RESAMPLES = 10_000

Embedder = Callable[[Tensor], Tensor]
"""Pictures (B, 3, H, W) in [0, 1] -> features (B, D), such as `ClipReward.embed_images`."""

BLANK_CONTRAST = 0.02
"""A picture whose luminance spreads less than this (about 5 of 255 levels) shows nothing."""


@torch.no_grad()
def diversity(images_BCHW: Tensor, embed: Embedder, prompts: Sequence[str] | None = None) -> Tensor:
    """How much pictures of one prompt differ when only the noise does.

    Args:
        images_BCHW: pictures in [0, 1], two or more of each prompt, in any order.
        embed: features to compare, e.g. `ClipReward.embed_images` of the held-out scorer.
        prompts: the B prompts; None = all pictures have the same one.

    Returns:
        (P,): per prompt, in order of first appearance, the mean of ``1 - cosine`` over all pairs
        of its pictures, in [0, 2]; 0 means that they are all alike.

    Raises:
        ValueError: a prompt has a single picture.
    """
    features = F.normalize(embed(images_BCHW).float(), dim=-1)
    return torch.stack(
        [_mean_cosine_distance(features[rows]) for rows in _groups(features, prompts)]
    )


@torch.no_grad()
def _mean_cosine_distance(features_ND: Tensor) -> Tensor:
    count = len(features_ND)
    # The sum of all entries of the cosine matrix is |sum of features|^2, its diagonal is count.
    pairs = features_ND.double().sum(0).square().sum() - count
    return (1 - pairs / (count * (count - 1))).clamp_min(0).float()


def _groups(values: Tensor, prompts: Sequence[str] | None) -> list[Tensor]:
    prompts = [""] * len(values) if prompts is None else prompts
    if len(prompts) != len(values):
        raise ValueError(f"{len(values)} pictures but {len(prompts)} prompts")
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    for prompt, members in rows.items():
        if len(members) < 2:
            raise ValueError(f"diversity needs two or more pictures of {prompt!r}")
    return [torch.tensor(members, device=values.device) for members in rows.values()]


class PictureStatistics(NamedTuple):
    """One value per picture, each (B,) float32 in [0, 1]."""

    luminance: Tensor
    """mean brightness (Rec. 601)"""
    contrast: Tensor
    """standard deviation of the brightness over the picture"""
    roughness: Tensor
    """mean brightness difference of neighbouring pixels; high for noise"""
    black: Tensor
    """share of pixels with every channel below 2 %: saturated to black"""
    white: Tensor
    """share of pixels with every channel above 98 %: saturated to white"""
    blank: Tensor
    """1 where the contrast is below `BLANK_CONTRAST`, else 0"""


@torch.no_grad()
def picture_statistics(images_BCHW: Tensor) -> PictureStatistics:
    """Figures in which collapsed (blank, dark, noisy) pictures stand out, of (B, 3, H, W)."""
    images = images_BCHW.float()
    luma = (images * images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1)
    steps_x, steps_y = luma.diff(dim=-1).abs(), luma.diff(dim=-2).abs()
    contrast = luma.std(dim=(1, 2), unbiased=False)
    return PictureStatistics(
        luminance=luma.mean((1, 2)),
        contrast=contrast,
        roughness=(steps_x.mean((1, 2)) + steps_y.mean((1, 2))) / 2,
        black=(images < 0.02).all(1).float().mean((1, 2)),
        white=(images > 0.98).all(1).float().mean((1, 2)),
        blank=(contrast < BLANK_CONTRAST).float(),
    )


def collapse_warnings(before_BCHW: Tensor, after_BCHW: Tensor) -> list[str]:
    """Plain-language signs that tuning ruined the pictures; an empty list if there is none.

    Args:
        before_BCHW, after_BCHW: the same prompts and noise, by the base and the tuned model.
    """
    before, after = picture_statistics(before_BCHW), picture_statistics(after_BCHW)
    found = []
    for what, old, new, bad in (
        ("blank pictures", before.blank, after.blank, lambda a, b: b > a + 0.1),
        ("contrast", before.contrast, after.contrast, lambda a, b: b < a / 2),
        ("brightness", before.luminance, after.luminance, lambda a, b: abs(b - a) > 0.25),
        ("roughness", before.roughness, after.roughness, lambda a, b: b > 2 * a + 0.02),
    ):
        a, b = float(old.mean()), float(new.mean())
        if bad(a, b):
            found.append(f"{what} went from {a:.2f} to {b:.2f}: look at the pictures")
    return found


class Interval(NamedTuple):
    """A mean with the ends of its confidence interval."""

    mean: float
    low: float
    high: float


@torch.no_grad()
def bootstrap_interval(
    values: Tensor,
    generator: torch.Generator,
    *,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap interval of the mean of independent `values` (N,).

    For "after minus before" on the same prompts and noise pass the differences: the interval is
    narrower, and clear of 0 when the change is real. Several seeds of one prompt are not
    independent: average them first.

    Args:
        values: (N,), any float dtype, N >= 1.
        generator: a CPU generator, the only source of randomness.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    flat = values.detach().double().cpu().flatten()
    if not len(flat) or not flat.isfinite().all():
        raise ValueError("bootstrap_interval needs one or more finite values")
    means = torch.cat(
        [
            flat[torch.randint(len(flat), (rows, len(flat)), generator=generator)].mean(1)
            for rows in _chunks(RESAMPLES, max(1, 4_000_000 // len(flat)))
        ]
    )
    tail = (1 - level) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(float(flat.mean()), low, high)


def _chunks(total: int, size: int) -> list[int]:
    """Counts of at most `size` that add up to `total`, so that memory stays bounded."""
    return [min(size, total - start) for start in range(0, total, size)]
