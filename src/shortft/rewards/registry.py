"""Rewards by name. Each factory imports its own file, so that naming a reward costs nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from shortft.rewards.base import Reward

if TYPE_CHECKING:
    import torch

    from shortft.rewards.clip import ClipReward
    from shortft.rewards.combine import WeightedSum

RewardFactory = Callable[["str | Path | None", "torch.device | str"], Reward]
"""(CLIP model or None for the embedded one, device) -> Reward"""


def _clip(scorer: str | Path | None, device: torch.device | str) -> Reward:
    from shortft.rewards.clip import ClipReward

    return ClipReward.load(scorer, device)


def _symmetry(scorer: str | Path | None, device: torch.device | str) -> Reward:
    from shortft.rewards.symmetry import Symmetry

    return Symmetry()


def _compressibility(scorer: str | Path | None, device: torch.device | str) -> Reward:
    from shortft.rewards.compressibility import Compressibility

    return Compressibility()


def _incompressibility(scorer: str | Path | None, device: torch.device | str) -> Reward:
    from shortft.rewards.compressibility import Compressibility

    return Compressibility(larger=True)


REWARDS: dict[str, RewardFactory] = {
    "clip": _clip,
    "symmetry": _symmetry,
    "compressibility": _compressibility,
    "incompressibility": _incompressibility,
}


def make_reward(
    spec: str, scorer: str | Path | None = None, device: torch.device | str = "cpu"
) -> WeightedSum:
    """Build the reward that `spec` names, one name or a weighted mix.

    Args:
        spec: ``"clip"`` or ``"clip:1,symmetry:0.2"``, see `parse_reward_spec`.
        scorer: CLIP model of the ``clip`` part: a directory or a hub id; None = the embedded one.
        device: where that model lives; rewards without a model follow their pictures.

    Raises:
        UserError: bad specification, or the CLIP model cannot be loaded.
    """
    from shortft.rewards.combine import WeightedSum
    from shortft.rewards.spec import parse_reward_spec

    parts = parse_reward_spec(spec)
    return WeightedSum([(REWARDS[name](scorer, device), weight) for name, weight in parts])


def held_out_scorer(model: str, device: torch.device | str = "cpu") -> ClipReward | None:
    """The scorer that only ever measures; one ships for the embedded model, None for others."""
    from shortft.assets import EMBEDDED, asset
    from shortft.rewards.clip import ClipReward

    return ClipReward.load(asset("scorers", "held_out"), device) if model == EMBEDDED else None
