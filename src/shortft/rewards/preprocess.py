"""CLIP's image preprocessing as tensor operations that keep the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

# PIL's numbers in preprocessor_config.json. PyTorch has no Lanczos filter; bicubic is the nearest.
_FILTERS = {1: "bicubic", 2: "bilinear", 3: "bicubic"}
_CLIP_DEFAULTS: dict[str, Any] = {
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_normalize": True,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
_SIGLIP_DEFAULTS: dict[str, Any] = {
    **_CLIP_DEFAULTS,
    "size": {"height": 224, "width": 224},
    "do_center_crop": False,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
}


@dataclass(frozen=True)
class ClipPreprocess:
    """Resize, crop and normalise as the published preprocessing does, without PIL or rounding.

    A processor works on 8-bit pictures and rounds again after resizing; this does not, so
    pixels differ from the published way by at most the rounding and the filter's fixed-point
    arithmetic (about 0.004 on average after resizing, in normalised units).
    """

    resize: int | tuple[int, int] | None
    """Length of the shorter side (of the longer one if `pad`), or (height, width); None leaves
    the size alone."""
    crop: tuple[int, int] | None
    """(height, width) of the centre crop, zero-padded where the picture is smaller."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mode: str = "bicubic"
    pad: bool = False
    """Fit the longer side to `resize` and pad with black to a square, as HPSv2's open_clip does
    (``ResizeMaxSize``; it forgets to pad where nothing is resized, this always does)."""
    round_crop: bool = False
    """Round the crop's corner half to even, as torchvision does, instead of down."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, siglip: bool = False) -> ClipPreprocess:
        """From the keys of ``preprocessor_config.json``; missing ones take CLIP's defaults.

        Args:
            config: what the file holds.
            siglip: take SiglipImageProcessor's defaults instead of CLIPImageProcessor's.

        Raises:
            ValueError: a size or filter that has no counterpart here.
        """
        config = {**(_SIGLIP_DEFAULTS if siglip else _CLIP_DEFAULTS), **config}
        if config["resample"] not in _FILTERS:
            raise ValueError(f"resample {config['resample']} is not supported")
        normalize = config["do_normalize"]
        return cls(
            resize=_size(config["size"], square=False) if config["do_resize"] else None,
            crop=_pair(config["crop_size"]) if config["do_center_crop"] else None,
            mean=tuple(config["image_mean"]) if normalize else (0.0, 0.0, 0.0),
            std=tuple(config["image_std"]) if normalize else (1.0, 1.0, 1.0),
            mode=_FILTERS[config["resample"]],
        )

    @classmethod
    def of_clip(cls, size: int, *, pad: bool = False, round_crop: bool = False) -> ClipPreprocess:
        """CLIP's own numbers for square inputs of `size` pixels."""
        return cls(
            resize=size,
            crop=None if pad else (size, size),
            mean=_CLIP_DEFAULTS["image_mean"],
            std=_CLIP_DEFAULTS["image_std"],
            pad=pad,
            round_crop=round_crop,
        )

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 3, h, w) normalised, in float32."""
        images = images_BCHW.float()
        height, width = images.shape[-2:]
        target = self._resized(height, width)
        if target != (height, width):
            images = F.interpolate(
                images, size=target, mode=self.mode, align_corners=False, antialias=True
            ).clamp(0, 1)  # the filter overshoots at edges, where PIL's 8 bits saturate
        if self.pad and isinstance(self.resize, int):
            images = _pad_to_square(images, self.resize)
        if self.crop is not None:
            images = _center_crop(images, *self.crop, rounded=self.round_crop)
        mean = images.new_tensor(self.mean).view(1, 3, 1, 1)
        std = images.new_tensor(self.std).view(1, 3, 1, 1)
        return (images - mean) / std

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.resize is None:
            return height, width
        if isinstance(self.resize, tuple):
            return self.resize
        short, long = min(height, width), max(height, width)
        if self.pad:
            scale = self.resize / long
            return round(height * scale), round(width * scale)
        long = int(self.resize * long / short)  # truncated, as transformers does
        return (self.resize, long) if height <= width else (long, self.resize)


def _center_crop(images: Tensor, height: int, width: int, *, rounded: bool) -> Tensor:
    """Centre crop; sides that are too short are padded with black, the odd pixel in front."""
    pad_y, pad_x = max(height - images.shape[-2], 0), max(width - images.shape[-1], 0)
    if pad_y or pad_x:
        images = F.pad(images, (-(-pad_x // 2), pad_x // 2, -(-pad_y // 2), pad_y // 2))
    spare_y, spare_x = images.shape[-2] - height, images.shape[-1] - width
    top, left = (
        (round(spare_y / 2), round(spare_x / 2)) if rounded else (spare_y // 2, spare_x // 2)
    )
    return images[..., top : top + height, left : left + width]


def _pad_to_square(images: Tensor, side: int) -> Tensor:
    """Black around the picture, the odd pixel behind."""
    pad_y, pad_x = side - images.shape[-2], side - images.shape[-1]
    return F.pad(images, (pad_x // 2, -(-pad_x // 2), pad_y // 2, -(-pad_y // 2)))


def _size(size: int | Mapping[str, int], *, square: bool) -> int | tuple[int, int]:
    if isinstance(size, int):  # old configurations
        return (size, size) if square else size
    keys = {key for key, value in size.items() if value is not None}
    if keys == {"height", "width"}:
        return size["height"], size["width"]
    if keys == {"shortest_edge"}:
        return size["shortest_edge"]
    raise ValueError(f"size {dict(size)} is not supported")


def _pair(size: int | Mapping[str, int]) -> tuple[int, int]:
    pair = _size(size, square=True)
    return pair if isinstance(pair, tuple) else (pair, pair)
