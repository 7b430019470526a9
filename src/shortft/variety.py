"""How much pictures of one prompt differ, by what is at hand to see them with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from shortft.metrics import Embedder
from shortft.rewards.clip import ClipReward
from shortft.rewards.combine import WeightedSum


@contextmanager
def embedder(
    scorers: Sequence[WeightedSum | None], device: torch.device | str
) -> Iterator[tuple[Embedder, str]]:
    """What `diversity` compares: features of the first CLIP among scorers, else thumbnails.

    And what they are called.

    Args:
        device: where the pictures are.
    """
    every = ((scorer, part) for scorer in scorers if scorer for part, _ in scorer.parts)
    for scorer, part in every:
        if isinstance(part, ClipReward):
            with scorer.at_work(device):
                yield partial(_features, part), part.name
            return
    yield thumbnails, "thumbnails"


def _features(clip: ClipReward, images_BCHW: Tensor) -> Tensor:
    return clip.embed_images(images_BCHW.to(clip.model.device))


def thumbnails(images_BCHW: Tensor) -> Tensor:
    """(B, 768) pixels of 16 × 16 thumbnails about mid grey."""
    return F.interpolate(images_BCHW.float(), (16, 16), mode="area").flatten(1) - 0.5
