"""Weighted mixes of rewards, and ensembles that are believed only where they agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from shortft.rewards.base import Reward
from shortft.rewards.visit import visiting


class WeightedSum:
    """``sum(weight * reward)`` over its parts; a single part of weight 1 is that part itself.

    Pictures are scored on `device`, None = where they are; scores and gradient come back to them.
    With `visits` the models wait where they are and score on the pictures' device, in `at_work`.

    To log the parts without scoring twice::

        components = reward.components(images, prompts)
        scores = reward.combine(components)
    """

    def __init__(
        self,
        parts: Sequence[tuple[Reward, float]],
        device: torch.device | str | None = None,
        *,
        visits: bool = False,
    ) -> None:
        if not parts:
            raise ValueError("WeightedSum needs at least one reward")
        self.parts = tuple(parts)
        self.device = None if visits else device
        self.visits = visits
        single = self.parts[0][0] if len(parts) == 1 else None
        self.name = (
            single.name if single else ",".join(f"{part.name}:{w:g}" for part, w in self.parts)
        )
        self.report_name = single.report_name if single else self.name
        self.report_higher_is_better = single.report_higher_is_better if single else True

    def at_work(self, device: torch.device | str) -> AbstractContextManager[None]:
        """Where pictures on `device` are scored and the gradient in their pixels is taken."""
        return visiting(self, device) if self.visits else nullcontext()

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,), differentiable in the pixels."""
        return self.combine(self.components(images_BCHW, prompts))

    def components(self, images_BCHW: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Each part's own score (B,), unweighted, by its name; differentiable."""
        return {part.name: self.score(part, images_BCHW, prompts) for part, _ in self.parts}

    def score(self, part: Reward, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """What one part returns, (B,) if it keeps its promise, on the pictures' own device."""
        scores = part(own_copy(images_BCHW, self.device), prompts)
        return scores.to(images_BCHW.device) if isinstance(scores, Tensor) else scores

    def report_of(self, part: Reward, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """What one part reports, (B,) if it keeps its promise, on the pictures' own device."""
        found = part.report(own_copy(images_BCHW, self.device), prompts)
        return found.to(images_BCHW.device) if isinstance(found, Tensor) else found

    def combine(self, components: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum (B,) of what `components` returned."""
        first, weight = self.parts[0]
        total = components[first.name] * weight
        for part, weight in self.parts[1:]:
            total = total + components[part.name] * weight
        return total


def own_copy(images: Tensor, device: torch.device | str | None = None) -> Tensor:
    """Pictures that a reward may change in place without harm to who else looks at them."""
    return images.to(device=device, copy=True)


class Conservative:
    """``mean - caution * spread`` of several scorers' weighted scores.

    The spread is their standard deviation (of the population), picture by picture. Where scorers
    disagree, one of them is likely to be fooled: the penalty turns the gradient towards the lower
    scores. (Reward ensembles against over-optimisation: Coste et al. 2024, arXiv 2310.02743.)

    Args:
        name: the ensemble's specification.
        members: scorers and the weights that bring their scores to one scale; two or more.
        caution: weight of the spread, at least 0.
    """

    report_higher_is_better = True

    def __init__(self, name: str, members: Sequence[tuple[Reward, float]], caution: float) -> None:
        if len(members) < 2 or caution < 0:
            raise ValueError(f"an ensemble needs two scorers and a caution >= 0, got {name}")
        self.name = self.report_name = name
        self.members = tuple(members)
        self.caution = caution

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,), differentiable in the pixels."""
        scores = torch.stack(
            [weight * part(own_copy(images_BCHW), prompts) for part, weight in self.members]
        )
        mean = scores.mean(0)
        # Where all agree the root has no slope; the small number makes it 0 there.
        spread = ((scores - mean).square().mean(0) + 1e-12).sqrt()
        return mean - self.caution * spread

    def report(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """The score itself (B,), no gradient."""
        return self(images_BCHW.detach(), prompts).detach()
