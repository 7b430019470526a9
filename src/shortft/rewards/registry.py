"""Rewards by name. Each factory imports its own file, so that naming a reward costs nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from shortft.rewards.base import Reward
from shortft.rewards.places import HUB, Place, reward_places

if TYPE_CHECKING:
    import torch

    from shortft.rewards.combine import WeightedSum

RewardFactory = Callable[["Place | None", "torch.device | str", "torch.dtype"], Reward]
"""(where its model lies, None where there is none; device; number format of models) -> Reward"""


def _clip(place: Place | None, device: torch.device | str, dtype: torch.dtype) -> Reward:
    from shortft.rewards.clip import ClipReward

    return ClipReward.load(place, device, dtype)


def _symmetry(place: Place | None, device: torch.device | str, dtype: torch.dtype) -> Reward:
    from shortft.rewards.symmetry import Symmetry

    return Symmetry()


def _compressibility(place: Place | None, device: torch.device | str, dtype: torch.dtype) -> Reward:
    from shortft.rewards.compressibility import Compressibility

    return Compressibility()


def _incompressibility(
    place: Place | None, device: torch.device | str, dtype: torch.dtype
) -> Reward:
    from shortft.rewards.compressibility import Compressibility

    return Compressibility(larger=True)


def _pickscore(place: Place | None, device: torch.device | str, dtype: torch.dtype) -> Reward:
    from shortft.rewards.pickscore import load_pickscore

    return load_pickscore(place or HUB["pickscore"], device, dtype)


def _hpsv2(place: Place | None, device: torch.device | str, dtype: torch.dtype) -> Reward:
    from shortft.rewards.hps import load_hps

    return load_hps(place or HUB["hpsv2"], device, dtype)


def _hpsv21(place: Place | None, device: torch.device | str, dtype: torch.dtype) -> Reward:
    from shortft.rewards.hps import load_hps

    return load_hps(place or HUB["hpsv2.1"], device, dtype)


def _imagereward(place: Place | None, device: torch.device | str, dtype: torch.dtype) -> Reward:
    from shortft.rewards.imagereward import load_imagereward

    return load_imagereward(place or HUB["imagereward"], device, dtype)


def _aesthetic(place: Place | None, device: torch.device | str, dtype: torch.dtype) -> Reward:
    from shortft.rewards.aesthetic import load_aesthetic

    return load_aesthetic(place or HUB["aesthetic"], device, dtype)


REWARDS: dict[str, RewardFactory] = {
    "clip": _clip,
    "symmetry": _symmetry,
    "compressibility": _compressibility,
    "incompressibility": _incompressibility,
    "pickscore": _pickscore,
    "hpsv2": _hpsv2,
    "hpsv2.1": _hpsv21,
    "imagereward": _imagereward,
    "aesthetic": _aesthetic,
}


def make_reward(
    spec: str,
    models: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    visits: bool = False,
) -> WeightedSum:
    """Build the reward that `spec` names, one name or a weighted mix.

    Args:
        spec: ``"clip"`` or ``"clip:1,symmetry:0.2"``, see `parse_reward_spec`.
        models: where models lie, see `parse_reward_models`; None = the embedded one for ``clip``,
            the hub for the others.
        device: where models live and pictures are scored.
        dtype: number format of models, None = float32; scores are float32 always.
        visits: models live on `device` and score on the pictures' (`WeightedSum.at_work`).

    Raises:
        UserError: bad specification, or a model cannot be loaded.
    """
    import torch

    from shortft.rewards.combine import Conservative, WeightedSum
    from shortft.rewards.own import load_own
    from shortft.rewards.spec import parse_ensemble, parse_reward_spec, scorers

    places = reward_places(scorers(spec), None if models is None else str(models))
    number_format = dtype or torch.float32

    def make(name: str) -> Reward:
        ensemble = parse_ensemble(name)
        if ensemble:
            members, caution = ensemble
            return Conservative(name, [(make(part), w) for part, w in members], caution)
        if name in REWARDS:
            return REWARDS[name](places.get(name), device, number_format)
        return load_own(name, device, number_format)

    parts = [(make(name), weight) for name, weight in parse_reward_spec(spec)]
    return WeightedSum(parts, device, visits=visits)


def ships(spec: str) -> bool:
    """Whether all that a reward is made of comes with shortft."""
    from shortft.errors import UserError
    from shortft.rewards.spec import scorers

    try:
        return scorers(spec) <= REWARDS.keys()
    except UserError:  # a file that is not here, or no reward at all
        return False


def held_out_scorer(model: str, device: torch.device | str = "cpu") -> WeightedSum | None:
    """The scorer that only ever measures; one ships for the embedded model, None for others."""
    from shortft.assets import EMBEDDED, asset
    from shortft.rewards.clip import ClipReward
    from shortft.rewards.combine import WeightedSum

    if model != EMBEDDED:
        return None
    scorer = ClipReward.load(asset("scorers", "held_out"), device)
    scorer.name = "held-out CLIP"
    return WeightedSum([(scorer, 1.0)])
