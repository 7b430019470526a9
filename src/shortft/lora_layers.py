"""Linear layers with several LoRAs at once; alpha = rank, so that no scale appears."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StackedLinear(nn.Module):
    """A linear layer with several LoRAs as one branch of their summed rank.

    Equal to peft's layer with these adapters active, at a third of its overhead for four of them:
    ``x Wᵀ + x [A₁; …; Aₙ]ᵀ [B₁ … Bₙ]ᵀ``.

    Args:
        base_layer: the frozen layer.
        down, up: the LoRAs' A and B, used, not copied.
        frozen: keep gradient from the LoRA parameters; the input's gradient passes.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        down: Sequence[nn.Parameter],
        up: Sequence[nn.Parameter],
        *,
        frozen: bool,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.down, self.up = nn.ParameterList(down), nn.ParameterList(up)
        self.frozen = frozen
        self.strength = 1.0

    def forward(self, x: Tensor) -> Tensor:
        down, up = torch.cat(list(self.down)), torch.cat(list(self.up), dim=1)
        if self.frozen:
            down, up = down.detach(), up.detach()
        if self.strength != 1:
            up = up * self.strength
        # Autocast has a format of its own: a copy in the LoRAs' would only be kept for nothing.
        inner = x if torch.is_autocast_enabled(x.device.type) else x.to(down.dtype)
        branch = F.linear(F.linear(inner, down), up)
        base: Tensor = self.base_layer(x)
        return base + branch.to(base.dtype)


class MergedLinear(nn.Module):
    """The same layer with frozen LoRAs folded into one weight, ``W + BA``.

    The weight is made at the first call and again whenever the LoRAs have changed since, so that
    only views that are run take memory. The input's gradient passes, the LoRAs get none.

    Args:
        base_layer: the frozen layer.
        down, up: the LoRAs' A and B, used, not copied.
    """

    def __init__(
        self, base_layer: nn.Linear, down: Sequence[nn.Parameter], up: Sequence[nn.Parameter]
    ) -> None:
        super().__init__()
        self.base_layer: nn.Linear = base_layer
        self.down, self.up = nn.ParameterList(down), nn.ParameterList(up)
        self.strength = 1.0
        self._weight: Tensor | None = None
        self._made_of: tuple[float, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self._merged(), self.base_layer.bias)

    @torch.no_grad()
    def _merged(self) -> Tensor:
        # Optimizers and loading change parameters in place, which their version counts.
        made_of = (self.strength, *(p._version for p in (*self.down, *self.up)))
        if self._weight is None or made_of != self._made_of:
            weight: Tensor = self.base_layer.weight
            dtype = torch.promote_types(weight.dtype, self.down[0].dtype)
            with torch.autocast(weight.device.type, enabled=False):
                change = torch.cat(list(self.up), dim=1) @ torch.cat(list(self.down))
                merged = weight.to(dtype) + self.strength * change.to(dtype)
            self._weight, self._made_of = merged.to(weight.dtype), made_of
        return self._weight
