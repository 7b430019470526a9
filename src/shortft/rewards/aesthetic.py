"""LAION's aesthetic predictor v2: a small head on CLIP-L's image features, about 1 to 10."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPModel, SiglipModel

from shortft.errors import UserError
from shortft.rewards.clip import image_features, load_clip_model
from shortft.rewards.files import beside, read_weights
from shortft.rewards.places import CLIP_L, FILES, Place
from shortft.rewards.preprocess import ClipPreprocess


class Aesthetic:
    """How much people like to look at a picture, whatever its prompt; anchor it.

    Score and report are the predictor's own number, about 1 to 10, from unit-length features
    (Schuhmann 2022, ``sac+logos+ava1-l14-linearMSE``).
    """

    name = "aesthetic"
    report_name = "LAION aesthetic"
    report_higher_is_better = True

    def __init__(
        self, model: CLIPModel | SiglipModel, preprocess: ClipPreprocess, head: nn.Sequential
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.preprocess = preprocess
        self.head = head

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str] = ()) -> Tensor:
        """Scores (B,), differentiable in the pixels; the prompts do not matter."""
        features = image_features(self.model, self.preprocess, images_BCHW)
        with torch.autocast(features.device.type, enabled=False):
            scores: Tensor = self.head(features)
        return scores.squeeze(-1)

    @torch.no_grad()
    def report(self, images_BCHW: Tensor, prompts: Sequence[str] = ()) -> Tensor:
        """The same (B,), without gradient."""
        return self(images_BCHW)


def load_aesthetic(place: Place, device: torch.device | str, dtype: torch.dtype) -> Aesthetic:
    """The head in a file such as ``aesthetic-model.pth``; CLIP-L beside it or from the hub.

    Raises:
        UserError: a file cannot be had, is damaged, holds code, or is of another architecture.
    """
    state, path = read_weights(place, FILES[place.reward])
    source = beside(path, ("config.json",), CLIP_L)
    clip = replace(place, source=source, revision=place.revision_of(source))
    model, preprocess = load_clip_model(clip, device, dtype)
    head = score_head(state, model.config.projection_dim, place)
    return Aesthetic(model, preprocess, head.to(device))


def score_head(state: Mapping[str, Any], features: int, place: Place) -> nn.Sequential:
    """The five linear layers, without activations, that LAION and ImageReward share; float32.

    Args:
        state: weights named ``layers.0.weight`` and so on; others are left alone.
        features: width of the input.
        place: what a message names.
    """
    head = nn.Sequential(
        nn.Linear(features, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )
    try:
        head.load_state_dict({name: state[f"layers.{name}"] for name in head.state_dict()})
    except KeyError as error:
        raise UserError(
            f"{place}: weight {error.args[0]} is missing; give {FILES[place.reward]}"
        ) from None
    except (RuntimeError, AttributeError):
        raise UserError(
            f"{place}: its layers are not {features}-1024-128-64-16-1; give "
            f"{FILES[place.reward]} and the CLIP that it was trained on"
        ) from None
    return head.float().eval().requires_grad_(False)
