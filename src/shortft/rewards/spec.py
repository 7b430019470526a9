"""What a user writes after ``--reward``. Loads no torch: configurations are checked with it."""

from __future__ import annotations

import difflib
import math

from shortft.errors import UserError
from shortft.rewards.registry import REWARDS

ANCHORS = frozenset({"clip"})
"""Rewards that tie a picture to its prompt, so that it cannot win by showing nothing."""


def parse_reward_spec(spec: str) -> list[tuple[str, float]]:
    """``"clip:1,symmetry:0.2"`` -> ``[("clip", 1.0), ("symmetry", 0.2)]``; no weight means 1.

    Raises:
        UserError: nothing named, an unknown or repeated name, or a weight that is not a
            positive number.
    """
    known = ", ".join(REWARDS)
    parts: list[tuple[str, float]] = []
    for item in spec.split(","):
        name, colon, weight_text = (text.strip() for text in item.partition(":"))
        if not name:
            raise UserError(
                f"--reward {spec!r}: a reward has no name; write e.g. clip or clip:1,symmetry:0.2 "
                f"(known: {known})"
            )
        if name not in REWARDS:
            nearest = difflib.get_close_matches(name.lower(), REWARDS, n=1)
            hint = f"did you mean {nearest[0]}? " if nearest else ""
            raise UserError(f"--reward {spec}: no reward named {name!r}; {hint}known: {known}")
        if name in dict(parts):
            raise UserError(f"--reward {spec}: {name} stands twice; name each reward once")
        parts.append((name, _weight(spec, name, weight_text) if colon else 1.0))
    return parts


def _weight(spec: str, name: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise UserError(
            f"--reward {spec}: weight {text!r} of {name} is not a positive number; "
            f"write e.g. {name}:0.5"
        )
    return weight


def anchor_warning(spec: str) -> str | None:
    """One line to show before *training* on a reward that blank pictures win, else None."""
    names = [name for name, _ in parse_reward_spec(spec)]
    if ANCHORS & set(names):
        return None
    return (
        f"--reward {spec}: nothing ties the pictures to their prompts, so they are likely to turn "
        f"blank or noisy; mix with clip, e.g. --reward clip:1,{spec}"
    )
