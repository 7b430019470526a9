"""What a user writes after ``--reward``. Loads no torch: configurations are checked with it."""

from __future__ import annotations

import difflib
import math
import re

from shortft.errors import UserError
from shortft.rewards.own import check_file, installed, is_file_spec
from shortft.rewards.registry import REWARDS

ANCHORS = frozenset({"clip", "pickscore", "hpsv2", "hpsv2.1", "imagereward"})
"""Rewards that tie a picture to its prompt, so that it cannot win by showing nothing."""

MIXES = {
    "paper-mix": "pickscore:10,hpsv2:2,aesthetic:0.05",
    "symmetry-hpsv2": "symmetry:10,hpsv2:1",
    "compressibility-hpsv2": "compressibility:10,hpsv2:1",
}
"""Named recipes; docs/rewards.md says where they come from."""

_ITEM = re.compile(r"(?P<name>.*?\.py\s*:\s*\w+|[^:]*)(?P<weight>:.*)?")
_ENSEMBLE = re.compile(r"(?P<members>.+\+.+)~(?P<caution>[^:~]*)(?P<weight>:.*)?")


def parse_reward_spec(spec: str) -> list[tuple[str, float]]:
    """``"clip:1,symmetry:0.2"`` -> ``[("clip", 1.0), ("symmetry", 0.2)]``; no weight means 1.

    A name is one of `REWARDS`, a recipe of `MIXES` (its parts take its place, times its weight),
    a user's ``file.py:name``, an entry point of the group ``shortft.rewards``, or an ensemble
    ``clip+pickscore:1.2~0.5``, see `parse_ensemble`.

    Raises:
        UserError: nothing named, an unknown or repeated name, a file without that name, or a
            weight that is not a positive number.
    """
    parts: list[tuple[str, float]] = []
    for item in spec.split(","):
        if group := _ENSEMBLE.fullmatch(item.strip()):
            weight = _weight(spec, "the ensemble", group["weight"][1:]) if group["weight"] else 1.0
            name = item.strip().removesuffix(group["weight"] or "")
            parse_ensemble(name)
            parts.append((name, weight))
            continue
        match = _ITEM.fullmatch(item.strip())
        name = re.sub(r"\s*:\s*", ":", match["name"].strip()) if match else ""
        colon, weight_text = bool(match and match["weight"]), match["weight"] if match else None
        weight = _weight(spec, name, (weight_text or "")[1:].strip()) if colon and name else 1.0
        for part, factor in _named(spec, name):
            if part in dict(parts):
                raise UserError(f"--reward {spec}: {part} stands twice; name each reward once")
            parts.append((part, factor * weight))
    return parts


def parse_ensemble(name: str) -> tuple[list[tuple[str, float]], float] | None:
    """``"clip+pickscore:1.2~0.5"`` -> its scorers with weights, and the weight of their spread.

    None for the name of a single reward.

    Raises:
        UserError: fewer than two scorers, or a weight of the spread that is not a number >= 0.
    """
    group = _ENSEMBLE.fullmatch(name)
    if group is None:
        return None
    members = parse_reward_spec(group["members"].replace("+", ","))
    try:
        caution = float(group["caution"])
    except ValueError:
        caution = math.nan
    if not (math.isfinite(caution) and caution >= 0):
        raise UserError(
            f"--reward {name}: {group['caution']!r} after ~ is not a number of at least 0; write "
            "e.g. clip+pickscore~0.5"
        )
    return members, caution


def scorers(spec: str) -> set[str]:
    """The names of all single rewards in a specification."""
    names: set[str] = set()
    for name, _ in parse_reward_spec(spec):
        ensemble = parse_ensemble(name)
        names |= {member for member, _ in ensemble[0]} if ensemble else {name}
    return names


def _named(spec: str, name: str) -> list[tuple[str, float]]:
    """The parts that a name stands for."""
    known = ", ".join([*REWARDS, *MIXES, "path/to/file.py:name"])
    if not name:
        raise UserError(
            f"--reward {spec!r}: a reward has no name; write e.g. clip or clip:1,symmetry:0.2 "
            f"(known: {known})"
        )
    if name in MIXES:
        return parse_reward_spec(MIXES[name])
    if is_file_spec(name):
        check_file(name)
    elif name.endswith(".py"):
        raise UserError(f"--reward {spec}: name the function in it, such as {name}:my_reward")
    elif name not in REWARDS and installed(name) is None:
        nearest = difflib.get_close_matches(name.lower(), [*REWARDS, *MIXES], n=1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise UserError(f"--reward {spec}: no reward named {name!r}; {hint}known: {known}")
    return [(name, 1.0)]


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
    """One line to show before *training* on a reward that blank pictures win, else None.

    Nothing is said of a user's own reward, which may well be an anchor.
    """
    names = scorers(spec)
    if any(name in ANCHORS or name not in REWARDS for name in names):
        return None
    return (
        f"--reward {spec}: nothing ties the pictures to their prompts, so they are likely to turn "
        f"blank or noisy; mix with clip, e.g. --reward clip:1,{spec}"
    )
