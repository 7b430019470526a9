"""Where reward models lie: on the hub, or where ``--reward-model`` says. Loads no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from shortft.errors import UserError
from shortft.paths import exists, is_dir, is_file

OPTION = "--reward-model"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SUFFIXES = {".pt", ".pth", ".bin", ".safetensors", ".json"}  # of files, never of hub ids
_PLACE = re.compile(r"(?P<source>.+?)(?:@(?P<revision>[^@#]+))?(?:#(?P<sha256>[^#]*))?")


@dataclass(frozen=True)
class Place:
    """Where one reward's model lies."""

    reward: str
    """The reward's name in `REWARDS`."""
    source: str
    """A directory, a file, or a hub id ``owner/name``."""
    revision: str = "main"
    """Branch, tag or commit on the hub; without meaning for local files."""
    sha256: str | None = None
    """What the weights file must have, 64 hexadecimal digits; None = not known."""

    def __str__(self) -> str:
        """How messages name it: what the user typed, or the reward that it stands for."""
        if self == HUB.get(self.reward):
            return f"--reward {self.reward}: {self.source}"
        name = "" if self.reward == "clip" else f"{self.reward}="
        return f"{OPTION} {name}{self.source}"

    @property
    def is_local(self) -> bool:
        return exists(self.source)

    @property
    def is_pinned(self) -> bool:
        """Whether nobody can exchange the weights: by checksum, or by a commit of the hub.

        A commit names every file's checksum, and the hub's cache keeps a file under that name.
        """
        return self.sha256 is not None or bool(_COMMIT.fullmatch(self.revision))

    def revision_of(self, source: str) -> str:
        """The revision of this place, or of a companion of its weights on the hub."""
        return self.revision if source == self.source else COMPANIONS.get(source, "main")


# Commits as public projects that use these models pin them, and the checksum that several of them
# name for the same file; see docs/rewards.md.
_HPS = "697403c78157020a1ae59d23f111aa58ced35b0a"
HUB = {
    place.reward: place
    for place in (
        Place(
            "pickscore", "yuvalkirstain/PickScore_v1", "a4e4367c6dfa7288a00c550414478f865b875800"
        ),
        Place("hpsv2", "xswu/HPSv2", _HPS),
        Place(
            "hpsv2.1",
            "xswu/HPSv2",
            _HPS,
            "c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837",
        ),
        Place("imagereward", "THUDM/ImageReward", "5736be03b2652728fb87788c9797b0570450ab72"),
        Place(
            "aesthetic",
            "trl-lib/ddpo-aesthetic-predictor",
            "cf4bd10345610935a80a5d3be9a3133c50f121e4",
        ),
    )
}
VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""PickScore's and HPSv2's tokenizer and preprocessing, where none lie beside the weights."""
CLIP_L = "openai/clip-vit-large-patch14"
"""The model whose features the aesthetic head was trained on, where none lies beside the head."""
BERT = "google-bert/bert-base-uncased"
"""ImageReward's tokenizer, where none lies beside the weights."""
COMPANIONS = {
    VIT_H: "1c2b8495b28150b8a4922ee1c8edee224c284c0c",
    CLIP_L: "32bd64288804d66eefd0ccbe215aa642df71cc41",
    BERT: "86b5e0934494bd15c9632b12f734a8a67f723594",
}
"""Commits of what is taken from the hub where it does not lie beside the weights."""
FILES = {
    "hpsv2": "HPS_v2_compressed.pt",
    "hpsv2.1": "HPS_v2.1_compressed.pt",
    "imagereward": "ImageReward.pt",
    "aesthetic": "aesthetic-model.pth",
}
"""Weights files that are pickles, as the hub names them; PickScore and CLIP are directories."""
MODELS = ("clip", *HUB)
"""Rewards that ``--reward-model`` can give a model."""


def parse_reward_models(text: str | None) -> dict[str, Place]:
    """``"pickscore=/models/pick,hpsv2=/models/HPS_v2.pt#<sha256>"`` -> places by reward.

    A value without a name is the model of ``clip``. A hub id may carry ``@revision``, a weights
    file its ``#sha256``.

    Raises:
        UserError: an unknown or repeated name, nothing there, or an impossible checksum.
    """
    if text is None:
        return {}
    if is_dir(text) or _HUB_ID.fullmatch(text):  # may hold any character
        return {"clip": _place("clip", text)}
    places: dict[str, Place] = {}
    for item in text.split(","):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            name, value = "clip", name
        if name not in MODELS:
            raise UserError(
                f"{OPTION} {item}: no reward {name!r} with a model; write NAME=PLACE with one of "
                f"{', '.join(MODELS)}"
            )
        if name in places:
            raise UserError(f"{OPTION} {text}: {name} stands twice; give each model once")
        places[name] = _place(name, value)
    return places


def reward_places(names: set[str], models: str | None) -> dict[str, Place]:
    """The place of every named reward that has a model; ``clip`` may be absent (embedded).

    Raises:
        UserError: see `parse_reward_models`.
    """
    places = {**HUB, **parse_reward_models(models)}
    return {name: place for name, place in places.items() if name in names}


def with_inherited(models: str | None, names: set[str], inherited: str | None) -> str | None:
    """Places of reward models with somebody else's for those of `names` that they leave out.

    What `names` do not need is not looked for.
    """
    if inherited is None:
        return models
    if is_dir(inherited) or "=" not in inherited:
        theirs = {"clip": inherited}
    else:
        pairs = (item.partition("=") for item in inherited.split(","))
        theirs = {name.strip(): place.strip() for name, _, place in pairs}
    needed = sorted(theirs.keys() & names - parse_reward_models(models).keys())
    if needed == ["clip"] and models is None:
        return theirs["clip"]
    return ",".join([*([models] if models else []), *(f"{n}={theirs[n]}" for n in needed)]) or None


def emoji_clip_warning(names: set[str], models: str | None) -> str | None:
    """For another model than the embedded one: where its scorer would judge the pictures."""
    if "clip" not in names - parse_reward_models(models).keys():
        return None
    return (
        "clip is the embedded scorer here, which knows nothing but emoji; --reward-model names "
        "another, such as openai/clip-vit-large-patch14"
    )


def check_models_are_used(names: set[str], models: str | None) -> None:
    """Tell of a model for ``clip`` beside other rewards, which was meant for one of these.

    Args:
        names: all rewards of a run, also those that only measure.

    Raises:
        UserError: with the option as it should be.
    """
    given = parse_reward_models(models)
    others = sorted(names & HUB.keys())
    if set(given) == {"clip"} and "clip" not in names and others:
        raise UserError(
            f"{OPTION} {models}: is a model for clip, which the reward does not hold; write "
            f"{OPTION} {others[0]}={str(models).removeprefix('clip=')}"
        )


def _place(name: str, text: str) -> Place:
    if not text:
        raise UserError(f"{OPTION} {name}=: no place given; give a directory or a hub id")
    if exists(text):  # then @ and # belong to the path
        place = Place(name, text)
    else:
        match = _PLACE.fullmatch(text)
        source, revision, sha256 = match.groups() if match else (text, None, None)
        place = Place(name, source, revision or "main", sha256)
    _check(place)
    return place


def _check(place: Place) -> None:
    file, path = FILES.get(place.reward), Path(place.source)
    if place.sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", place.sha256):
        raise UserError(f"{place}#{place.sha256}: not a SHA-256; give its 64 hexadecimal digits")
    if place.sha256 is not None and file is None:
        raise UserError(f"{place}#{place.sha256}: only a .pt file has a checksum; leave it away")
    if is_dir(path):
        if file is not None and not (path / file).is_file():
            raise UserError(f"{place}: holds no {file}; name the weights file itself")
    elif is_file(path):
        if file is None:
            raise UserError(f"{place}: is a file; give the model's directory")
    elif not _HUB_ID.fullmatch(place.source) or path.suffix in _SUFFIXES:
        wanted = "a directory" if file is None else f"{file}, its directory"
        raise UserError(f"{place}: no such model; give {wanted} or a hub id such as owner/name")
