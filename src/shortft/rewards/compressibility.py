"""How small a picture is as a JPEG file."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from kornia.color import rgb_to_ycbcr
from kornia.enhance import JPEGCodecDifferentiable
from PIL import Image
from torch import Tensor

# Least squares of true entropy-coded bits on sum(0.5 * log2(1 + SHARPNESS * c^2)) over 1,800 emoji
# pictures and edits at quality 95; `benchmarks/jpeg_size.py` prints the figures.
_SHARPNESS = 16.0
_BITS_PER_UNIT = 1.65


class Compressibility:
    """Minus the estimated JPEG size in bits per pixel (entropy-coded data, no header).

    The estimate follows the encoder: kornia's YCbCr, 4:2:0 chroma, 8 x 8 DCT, kornia's (the
    standard) quantisation tables at the stated quality, differences of neighbouring DC terms.
    A quantised coefficient c then costs about log2 |c| bits and nothing near 0, for which
    ``0.5 * log2(1 + 16 c^2)`` stands, smooth everywhere, so every pixel has a gradient. Rank
    correlation with the true size is 0.998; for the older reward of DRaFT (Clark et al. 2024,
    minus the distance to the picture after a differentiable JPEG codec) it is 0.87 at best.

    Pictures of one colour score best, so anchor it, e.g. ``clip:1,compressibility:0.1``. With
    ``larger=True`` it is incompressibility, which noise wins.

    Args:
        quality: JPEG quality 1 to 100; 95 is the one of DDPO's reward (Black et al. 2024).
        larger: reward large files instead of small ones.
    """

    def __init__(self, quality: int = 95, *, larger: bool = False) -> None:
        if not 1 <= quality <= 100:
            raise ValueError(f"JPEG quality {quality} is not within 1 to 100")
        self.quality = quality
        self.name = "incompressibility" if larger else "compressibility"
        self.report_name = f"JPEG size (kB, quality {quality})"
        self.report_higher_is_better = larger
        self._sign = 1.0 if larger else -1.0
        codec = JPEGCodecDifferentiable()
        self._luma_table = _scaled(codec.get_buffer("quantization_table_y"), quality)
        self._chroma_table = _scaled(codec.get_buffer("quantization_table_c"), quality)

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str] = ()) -> Tensor:
        """Scores (B,), about -4 for a detailed emoji, near 0 for one colour; no prompts used."""
        return self._sign * self.bits_per_pixel(images_BCHW)

    @torch.no_grad()
    def report(self, images_BCHW: Tensor, prompts: Sequence[str] = ()) -> Tensor:
        """Size (B,) in kB (1,000 bytes) of the file that PIL writes, header included."""
        pixels = (images_BCHW.float().clamp(0, 1) * 255).round().byte()
        sizes = [
            _jpeg_bytes(Image.fromarray(picture.numpy()), self.quality) / 1000
            for picture in pixels.permute(0, 2, 3, 1).cpu()
        ]
        return torch.tensor(sizes, dtype=torch.float32, device=images_BCHW.device)

    def bits_per_pixel(self, images_BCHW: Tensor) -> Tensor:
        """Estimated entropy-coded bits (B,) divided by H * W, differentiable in the pixels."""
        height, width = images_BCHW.shape[-2:]
        luma, blue, red = self.coefficients(images_BCHW)
        units = _cost(luma) + _cost(blue) + _cost(red)
        return _BITS_PER_UNIT * units / (height * width)

    def coefficients(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """DCT coefficients of Y, Cb, Cr over their quantisation step, not rounded.

        Each is (B, blocks down, blocks across, 8, 8). Computed in float32, or float64 if the
        pictures are, whatever autocast says: bfloat16 is coarser than a step of 1.
        """
        with torch.autocast(images_BCHW.device.type, enabled=False):
            images = images_BCHW if images_BCHW.dtype == torch.float64 else images_BCHW.float()
            height, width = images.shape[-2:]
            # As libjpeg does: edges repeat up to whole macroblocks, chroma averages 2 x 2 pixels.
            images = F.pad(images, (0, -width % 16, 0, -height % 16), mode="replicate")
            ycbcr = 255 * rgb_to_ycbcr(images)
            chroma = F.avg_pool2d(ycbcr[:, 1:], 2)
            return (
                _dct(ycbcr[:, 0]) / self._luma_table.to(images),
                _dct(chroma[:, 0]) / self._chroma_table.to(images),
                _dct(chroma[:, 1]) / self._chroma_table.to(images),
            )


def _scaled(table: Tensor, quality: int) -> Tensor:
    """libjpeg's quantisation table (8, 8) at `quality`, from the standard one."""
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    return ((table * percent + 50) / 100).floor().clamp(1, 255)


def _dct(plane_BHW: Tensor) -> Tensor:
    """Orthonormal 8 x 8 DCT-II of each block, level-shifted by 128: (B, H/8, W/8, 8, 8)."""
    n = torch.arange(8, dtype=plane_BHW.dtype, device=plane_BHW.device)
    basis = torch.cos((2 * n[None] + 1) * n[:, None] * (torch.pi / 16)) / 2
    basis = torch.cat([basis[:1] / 2**0.5, basis[1:]])
    batch, height, width = plane_BHW.shape
    blocks = (plane_BHW - 128).view(batch, height // 8, 8, width // 8, 8).transpose(2, 3)
    return basis @ blocks @ basis.T


def _cost(coefficients: Tensor) -> Tensor:
    """Cost (B,) of one plane; DC terms are coded as differences along the rows of blocks."""
    dc = coefficients[..., 0, 0].flatten(1)
    dc = torch.diff(dc, dim=1, prepend=torch.zeros_like(dc[:, :1]))
    ac = coefficients.flatten(3)[..., 1:].flatten(1)
    values = torch.cat([dc, ac], dim=1)
    return 0.5 * torch.log2(1 + _SHARPNESS * values.square()).sum(1)


def _jpeg_bytes(picture: Image.Image, quality: int) -> int:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return file.tell()
