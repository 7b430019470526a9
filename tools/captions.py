"""Which caption and which latent a training sample of the base model has, held-out ones apart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from data import BACKDROPS, Picture, caption, composite, held_out_backdrops, load_pictures, ranked

BACKDROP_SHARE = 0.22
RECOLOUR_SHARE = 0.15
STYLE_SHARE = 0.4
EMPTY_SHARE = 0.1


@dataclass(frozen=True)
class Variant:
    """A picture on a background (None: white): one latent."""

    picture: int
    backdrop: str | None


def training_variants(pictures: list[Picture]) -> list[Variant]:
    """All combinations of the training split; a recoloured picture is drawn on two of the
    backgrounds only.
    """
    variants = []
    for number, picture in enumerate(pictures):
        if picture.extra:
            continue
        hidden = held_out_backdrops(picture.concept)
        shown = [backdrop for backdrop in BACKDROPS if backdrop not in hidden]
        if picture.colour:
            shown = ranked(f"{picture.concept}/{picture.colour}/{picture.style}", shown)[:2]
        variants += [Variant(number, backdrop) for backdrop in (None, *shown)]
    return variants


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray) -> Tensor:
    """(N, 64, 64, 3) uint8 -> (N, 4, 16, 16) latents."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return (
        vae.encode(pixels.to(memory_format=torch.channels_last)).latent_dist.mean
        * vae.config.scaling_factor
    )


def load_latents(work: Path) -> tuple[list[Picture], list[Variant], Tensor]:
    """Pictures, variants and their latents; encodes on the first call and keeps the result under
    `work`.
    """
    pictures, arrays = load_pictures(work)
    variants = training_variants(pictures)
    path = work / "latents.safetensors"
    if not path.exists():
        vae = (
            AutoencoderKL.from_pretrained(work / "vae").eval().to(memory_format=torch.channels_last)
        )
        parts = []
        for first in range(0, len(variants), 64):
            images = [
                composite(
                    arrays[v.picture], BACKDROPS[v.backdrop] if v.backdrop else (255, 255, 255)
                )
                for v in variants[first : first + 64]
            ]
            parts.append(encode(vae, np.stack(images)))
        save_file({"latents": torch.cat(parts).contiguous()}, path)
    return pictures, variants, load_file(path)["latents"]


class Sampler:
    """Draws batches: latents (B, 4, 16, 16) and token ids (B, 20); concepts are equally likely."""

    def __init__(self, work: Path, tokenizer: CLIPTokenizer) -> None:
        self.pictures, self.variants, self.latents = load_latents(work)
        self.tokenizer = tokenizer
        self.ids: dict[str, Tensor] = {}
        kind = [
            (self.pictures[v.picture].colour is not None, v.backdrop is not None)
            for v in self.variants
        ]
        count = {pair: kind.count(pair) for pair in set(kind)}
        share = {
            (recoloured, backed): (RECOLOUR_SHARE if recoloured else 1 - RECOLOUR_SHARE)
            * (BACKDROP_SHARE if backed else 1 - BACKDROP_SHARE)
            for recoloured in (False, True)
            for backed in (False, True)
        }
        self.weights = torch.tensor([share[pair] / count[pair] for pair in kind])

    def tokens(self, text: str) -> Tensor:
        if text not in self.ids:
            found = self.tokenizer(
                text, padding="max_length", truncation=True, max_length=20, return_tensors="pt"
            )
            self.ids[text] = found.input_ids[0]
        return self.ids[text]

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.multinomial(self.weights, size, generator=generator)
        chance = torch.rand(2, size, generator=generator).tolist()
        ids = []
        for number, row in enumerate(rows.tolist()):
            variant = self.variants[row]
            picture = self.pictures[variant.picture]
            style = picture.style if chance[0][number] < STYLE_SHARE else None
            text = caption(picture.caption, style, variant.backdrop)
            ids.append(self.tokens("" if chance[1][number] < EMPTY_SHARE else text))
        return self.latents[rows], torch.stack(ids)
