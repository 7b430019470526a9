"""Prompts encoded in batches, and known ones kept when the text encoders have left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from shortft.errors import UserError
from shortft.families.base import Conditioning

BATCH = 32


def encode_in_batches(
    encode: Callable[[list[str]], tuple[Tensor, ...]], prompts: Sequence[str], size: int = BATCH
) -> tuple[Tensor, ...]:
    """What encode returns for each prompt (tensors whose first dimension is the prompt), joined."""
    parts = [encode(list(prompts[i : i + size])) for i in range(0, len(prompts), size)]
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def with_empty(states: Tensor, pooled: Tensor | None = None) -> Conditioning:
    """Conditioning from embeddings and pooled vectors whose first row is the empty prompt's."""
    count = len(states) - 1
    positive, negative = states[1:], states[:1].expand(count, -1, -1)
    if pooled is None:
        return Conditioning(positive, negative)
    return Conditioning(positive, negative, pooled[1:], pooled[:1].expand(count, -1))


class KnownPrompts:
    """Conditionings of known prompts in main memory; the empty prompt's is kept once.

    Args:
        device: where they are used.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[str]], Conditioning],
        prompts: Sequence[str],
        device: torch.device,
    ) -> None:
        unique = list(dict.fromkeys(prompts))
        self._row = {prompt: row for row, prompt in enumerate(unique)}
        self._device = device
        # Each part leaves the device before the next one needs its memory.
        parts = [_kept(encode(unique[i : i + BATCH])) for i in range(0, len(unique), BATCH)]
        self._positive = torch.cat([part.positive for part in parts])
        pooled = [part.pooled for part in parts if part.pooled is not None]
        self._pooled = torch.cat(pooled) if pooled else None
        self._negative, self._negative_pooled = parts[0].negative, parts[0].negative_pooled

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """The conditioning of prompts, on the device; all rows of the empty prompt's are one.

        Raises:
            UserError: for a prompt that was not encoded ahead.
        """
        unknown = [prompt for prompt in prompts if prompt not in self._row]
        if unknown:
            raise UserError(
                f"prompt {unknown[0]!r}: not encoded before the text encoders left memory; give "
                "all prompts to encode_ahead, or load the model again"
            )
        rows = [self._row[prompt] for prompt in prompts]

        def alike(empty: Tensor) -> Tensor:
            return empty.to(self._device).expand(len(rows), *empty.shape[1:])

        return Conditioning(
            self._positive[rows].to(self._device),
            alike(self._negative),
            None if self._pooled is None else self._pooled[rows].to(self._device),
            None if self._negative_pooled is None else alike(self._negative_pooled),
        )


def _kept(part: Conditioning) -> Conditioning:
    """A part in main memory, with one row of the empty prompt's."""
    pooled = part.negative_pooled
    return replace(
        part, negative=part.negative[[0]], negative_pooled=None if pooled is None else pooled[[0]]
    ).to("cpu")
