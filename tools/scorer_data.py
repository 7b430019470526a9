"""Pictures and captions for the scorers: strong augmentation, and which caption is true of which
picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from captions import Variant, encode, load_latents
from data import BACKDROPS, caption, held_out_backdrops, load_pictures

POOL = 5000
JUNK = 12
DECODED_SHARE = 0.3
UNKNOWN = -2
"""Backdrop of a picture whose background has no name; -1 is white."""


@dataclass(frozen=True)
class Batch:
    """`truth` (B, B): 1 where caption j is true of picture i, 0 where it is false, -1 where it is
    neither.
    """

    images_BCHW: Tensor
    ids_BT: Tensor
    truth_BB: Tensor


def decoded_pool(work: Path, seed: int) -> tuple[list[Variant], Tensor]:
    """Training variants through the autoencoder, their latents perturbed: (POOL, 3, 64, 64) uint8,
    made once.
    """
    _, variants, latents = load_latents(work)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(variants), generator=generator)[:POOL]
    path = work / f"decoded_{seed}.safetensors"
    if not path.exists():
        vae = (
            AutoencoderKL.from_pretrained(work / "vae").eval().to(memory_format=torch.channels_last)
        )
        strength = torch.rand(len(rows), 1, 1, 1, generator=generator).square() * 0.6
        noisy = latents[rows] + strength * torch.randn(latents[rows].shape, generator=generator)
        images = []
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for part in noisy.split(100):
                output = vae.decode(part).sample.float()
                images.append(((output.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
        save_file({"images": torch.cat(images).contiguous()}, path)
    return [variants[row] for row in rows.tolist()], load_file(path)["images"]


def blur(images: Tensor, sigma: float) -> Tensor:
    place = torch.arange(-3, 4, dtype=torch.float32)
    kernel = torch.exp(-place.square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 7)
    images = F.conv2d(F.pad(images, (3, 3, 3, 3), "replicate"), kernel[:, :, :, None], groups=3)[
        ..., :, :
    ]
    return F.conv2d(images, kernel[:, :, None, :], groups=3)


def warp(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Random flip, scale, turn and shift of (B, 4, 64, 64) premultiplied pictures; transparent
    outside.
    """
    size = len(batch)
    flip = (torch.rand(size, generator=generator) < 0.4).float() * -2 + 1
    zoom = 1 / (0.7 + 0.45 * torch.rand(size, generator=generator))
    turn = (torch.rand(size, generator=generator) - 0.5) * math.radians(30)
    shift = (torch.rand(size, 2, generator=generator) - 0.5) * 0.3
    theta = torch.zeros(size, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = turn.cos() * zoom * flip, -turn.sin() * zoom
    theta[:, 1, 0], theta[:, 1, 1] = turn.sin() * zoom * flip, turn.cos() * zoom
    theta[:, :, 2] = shift
    return F.grid_sample(
        batch, F.affine_grid(theta, list(batch.shape), align_corners=False), align_corners=False
    )


def degrade(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur, noise, contrast, brightness and an erased patch, each on a random part of (B, 3, 64,
    64) in [0, 1].
    """
    size = len(images)
    chance = torch.rand(4, size, 1, 1, 1, generator=generator)
    sigma = 0.4 + float(torch.rand(1, generator=generator)) * 1.4
    images = torch.where(chance[0] < 0.25, blur(images, sigma), images)
    level = torch.rand(size, 1, 1, 1, generator=generator) * 0.1
    noise = torch.randn(images.shape, generator=generator) * level
    images = torch.where(chance[1] < 0.35, images + noise, images)
    gain = 1 + (torch.rand(size, 3, 1, 1, generator=generator) - 0.5) * 0.2
    contrast = 1 + (torch.rand(size, 1, 1, 1, generator=generator) - 0.5) * 0.4
    images = torch.where(chance[2] < 0.5, ((images - 0.5) * contrast + 0.5) * gain, images)
    erased = images.clone()
    x, y, w = (int(v) for v in torch.randint(4, 44, (3,), generator=generator))
    w = 8 + w // 4
    erased[..., y : y + w, x : x + w] = images.mean((2, 3), keepdim=True)
    return torch.where(chance[3] < 0.12, erased, images).clamp(0, 1)


def junk(images: Tensor, generator: torch.Generator) -> Tensor:
    """(JUNK, 3, 64, 64) that no caption describes: blank, noise, mush, mixed pictures. Keeps a
    reward honest.
    """
    size = JUNK // 4
    blank = torch.rand(size, 3, 1, 1, generator=generator).expand(-1, -1, 64, 64).clone()
    blank[0] = 1.0
    coarse = torch.rand(size, 3, 8, 8, generator=generator)
    noise = F.interpolate(coarse, size=(64, 64), mode="bilinear")
    noise[0] = torch.rand(3, 64, 64, generator=generator)
    mush = F.interpolate(F.avg_pool2d(images[:size], 16), size=(64, 64), mode="bicubic").clamp(0, 1)
    rows = torch.randperm(len(images), generator=generator)[: 4 * size].view(4, size)
    mixed = images[rows].mean(0)
    return torch.cat([blank, noise, mush, mixed])


class ScorerData:
    """Draws training batches for a scorer."""

    def __init__(self, work: Path, tokenizer: CLIPTokenizer, seed: int) -> None:
        self.pictures, arrays = load_pictures(work)
        rgba = torch.from_numpy(arrays).permute(0, 3, 1, 2)
        self.rgba = rgba.contiguous()
        self.tokenizer = tokenizer
        self.generator = torch.Generator().manual_seed(seed)
        self.pool_variants, self.pool = decoded_pool(work, seed)
        names = sorted({picture.concept for picture in self.pictures})
        self.concept = torch.tensor([names.index(picture.concept) for picture in self.pictures])
        core = torch.tensor([not picture.extra for picture in self.pictures])
        coloured = torch.tensor([picture.colour is not None for picture in self.pictures])
        share = torch.where(core, 0.65 / (core & ~coloured).sum(), 0.35 / (~core).sum())
        self.weights = torch.where(coloured, 0.2 / coloured.sum(), share)
        self.siblings = {
            number: (self.concept == number).nonzero()[:, 0]
            for number in self.concept.unique().tolist()
        }
        self.colours = torch.tensor(list(BACKDROPS.values())).float() / 255

    def _rows(self, size: int) -> list[int]:
        """Half of the batch is drawn freely; a quarter brings a sibling along: same thing, other
        style or colour.
        """
        first = torch.multinomial(self.weights, size - size // 4, generator=self.generator).tolist()
        rows = list(first)
        for row in first[: size // 4]:
            family = self.siblings[int(self.concept[row])]
            rows.append(int(family[torch.randint(len(family), (1,), generator=self.generator)]))
        return rows

    def draw(self, size: int) -> Batch:
        names = list(BACKDROPS)
        rows = self._rows(size)
        chance = torch.rand(4, size, generator=self.generator).tolist()
        picks = torch.randint(1 << 30, (size,), generator=self.generator).tolist()
        canvas = torch.ones(size, 3)
        backdrops, decoded = [], []
        for number, row in enumerate(rows):
            if chance[0][number] < DECODED_SHARE and number < size - size // 4:
                place = picks[number] % len(self.pool)
                variant = self.pool_variants[place]
                rows[number] = row = variant.picture
                decoded.append((number, place))
                backdrops.append(names.index(variant.backdrop) if variant.backdrop else -1)
                continue
            if chance[1][number] < 0.55:
                backdrops.append(-1)
                canvas[number] = 1 - 0.05 * torch.rand(3, generator=self.generator)
            elif chance[1][number] < 0.85:
                hidden = held_out_backdrops(self.pictures[row].concept)
                shown = [place for place, name in enumerate(names) if name not in hidden]
                backdrops.append(shown[picks[number] % len(shown)])
                wobble = (torch.rand(3, generator=self.generator) - 0.5) * 0.12
                canvas[number] = (self.colours[backdrops[-1]] + wobble).clamp(0, 1)
            else:
                backdrops.append(UNKNOWN)
                canvas[number] = torch.rand(3, generator=self.generator)
        rgba = self.rgba[rows].float() / 255
        rgba = warp(torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1), self.generator)
        images = rgba[:, :3] + canvas[:, :, None, None] * (1 - rgba[:, 3:])
        if decoded:
            places = torch.tensor(decoded)
            images[places[:, 0]] = self.pool[places[:, 1]].float() / 255
        images = degrade(images, self.generator)
        said = [b if b >= 0 and chance[2][n] < 0.8 else None for n, b in enumerate(backdrops)]
        styled = [
            self.pictures[r].style if chance[3][n] < 0.35 else None for n, r in enumerate(rows)
        ]
        texts = [
            caption(self.pictures[row].caption, style, None if back is None else names[back])
            for row, style, back in zip(rows, styled, said, strict=True)
        ]
        ids = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=20, return_tensors="pt"
        )
        truth = self._truth(rows, backdrops, styled, said)
        images = torch.cat([images, junk(images, self.generator)])
        return Batch(images, ids.input_ids, truth)

    def _truth(
        self,
        rows: list[int],
        backdrops: list[int],
        styled: list[str | None],
        said: list[int | None],
    ) -> Tensor:
        def code(values: list[str | int | None], table: dict[str | int | None, int]) -> Tensor:
            return torch.tensor([table.setdefault(value, len(table)) for value in values])

        texts: dict[str | int | None, int] = {}
        captions = code([self.pictures[row].caption for row in rows], texts)
        plain = torch.tensor([self.pictures[row].colour is None for row in rows])
        styles: dict[str | int | None, int] = {None: 0}
        style_of = code([self.pictures[row].style for row in rows], styles)
        style_said = code(list(styled), styles)
        back_of = torch.tensor(backdrops)
        back_said = torch.tensor([UNKNOWN if value is None else value for value in said])
        same_text = captions[:, None] == captions[None]
        style_fits = (style_said == 0)[None] | (style_of[:, None] == style_said[None])
        back_silent = (back_said == UNKNOWN)[None]
        back_fits = back_silent | (back_of[:, None] == back_said[None])
        truth = (same_text & style_fits & back_fits).float()
        # "car" is true of a blue car as well, and an unnamed background may look like a named one:
        # leave those out.
        same_thing = self.concept[rows][:, None] == self.concept[rows][None]
        unsure = (same_thing & ~same_text & plain[None]) | (
            same_text & ~back_silent & (back_of == UNKNOWN)[:, None]
        )
        return torch.where(unsure, -1.0, truth)


@torch.no_grad()
def round_trip(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """(N, 3, 64, 64) in [0, 1] through the autoencoder."""
    parts = [
        (part * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        for part in images.split(64)
    ]
    decoded = [vae.decode(encode(vae, part)).sample for part in parts]
    return (torch.cat(decoded).clamp(-1, 1) + 1) / 2
