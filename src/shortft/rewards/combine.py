"""Weighted mixes of rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from shortft.rewards.base import Reward


class WeightedSum:
    """``sum(weight * reward)`` over its parts; a single part of weight 1 is that part itself.

    To log the parts without scoring twice::

        components = reward.components(images, prompts)
        scores = reward.combine(components)
    """

    def __init__(self, parts: Sequence[tuple[Reward, float]]) -> None:
        if not parts:
            raise ValueError("WeightedSum needs at least one reward")
        self.parts = tuple(parts)
        single = self.parts[0][0] if len(parts) == 1 else None
        self.name = (
            single.name if single else ",".join(f"{part.name}:{w:g}" for part, w in self.parts)
        )
        self.report_name = single.report_name if single else self.name
        self.report_higher_is_better = single.report_higher_is_better if single else True

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,), differentiable in the pixels."""
        return self.combine(self.components(images_BCHW, prompts))

    def components(self, images_BCHW: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Each part's own score (B,), unweighted, by its name; differentiable."""
        return {part.name: part(images_BCHW, prompts) for part, _ in self.parts}

    def combine(self, components: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum (B,) of what `components` returned."""
        first, weight = self.parts[0]
        total = components[first.name] * weight
        for part, weight in self.parts[1:]:
            total = total + components[part.name] * weight
        return total

    def report(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """The single part's report (B,); of a mix, the weighted sum itself (no unit)."""
        if len(self.parts) == 1:
            return self.parts[0][0].report(images_BCHW, prompts)
        return self(images_BCHW.detach(), prompts).detach()

    def reports(self, images_BCHW: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Each part's `report` (B,), by the part's name."""
        return {part.name: part.report(images_BCHW, prompts) for part, _ in self.parts}
