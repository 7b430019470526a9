"""An exponential moving average of the LoRAs' weights: what a run hands out, if it is asked to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Weights = dict[int, dict[str, Tensor]]


class Average:
    """Running average of the weights of LoRA 1…k; with a decay of 0, nothing at all.

    After update n the average keeps min(decay, (1 + n) / (10 + n)) of itself, so that the start
    is soon forgotten (as diffusers' EMAModel does).

    Args:
        loras: parameters by LoRA number and name; not copied.
        decay: in [0, 1).
    """

    def __init__(self, loras: Mapping[int, Mapping[str, nn.Parameter]], decay: float) -> None:
        self.decay = decay
        self.loras = loras if decay else {}
        self.weights = self._copy()
        self._aside: Weights | None = None

    def _copy(self) -> Weights:
        return {
            number: {name: p.detach().clone() for name, p in group.items()}
            for number, group in self.loras.items()
        }

    def update(self, count: int) -> None:
        """Take in the weights as they are after update `count`."""
        keep = min(self.decay, (1 + count) / (10 + count))
        for number, group in self.loras.items():
            for name, parameter in group.items():
                self.weights[number][name].lerp_(parameter.detach(), 1 - keep)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """For a checkpoint."""
        return {f"ema_{number}": group for number, group in self.weights.items()}

    def restore(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go back to a checkpoint; one that has no average starts a new one."""
        self.weights = self._copy()
        for number, group in self.weights.items():
            for name, value in saved.get(f"ema_{number}", {}).items():
                group[name].copy_(value)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the networks run with the average."""
        self._aside = self._copy()
        try:
            self._fill(self.weights)
            yield
        finally:
            self.put_back()

    def put_back(self) -> None:
        """Let the networks have their own weights again; may be cut short and called once more."""
        if self._aside is not None:
            self._fill(self._aside)
            self._aside = None

    @torch.no_grad()
    def _fill(self, weights: Weights) -> None:
        for number, group in self.loras.items():
            for name, parameter in group.items():
                parameter.copy_(weights[number][name])
