"""Left-right symmetry."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Symmetry:
    """Minus the mean absolute difference between a picture and its mirror image, in [-1, 0].

    ShortFT and DRTune report a symmetry reward in another unit: do not compare the figures.

    Any picture of one colour scores a perfect 0, so the reward on its own ends in blank pictures:
    anchor it, e.g. ``clip:1,symmetry:0.5``. Dividing the error by the picture's contrast does not
    help, it ends in dark noise instead.
    """

    name = "symmetry"
    report_name = "mirror error"
    report_higher_is_better = False

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str] = ()) -> Tensor:
        """Scores (B,) in [-1, 0]; the prompts do not matter."""
        images = images_BCHW if images_BCHW.dtype == torch.float64 else images_BCHW.float()
        return -(images - images.flip(-1)).abs().mean(dim=(1, 2, 3))

    def report(self, images_BCHW: Tensor, prompts: Sequence[str] = ()) -> Tensor:
        """Mirror error (B,): 0 perfectly symmetric, 1 white facing black."""
        return -self(images_BCHW.detach())
