"""PickScore (Kirstain et al. 2023): a CLIPModel tuned on people's choices."""

from __future__ import annotations

from pathlib import Path

import torch

from shortft.rewards.clip import ClipReward, load_clip_model, load_tokenizer
from shortft.rewards.files import TOKENIZER_FILES, beside
from shortft.rewards.places import VIT_H, Place


def load_pickscore(place: Place, device: torch.device | str, dtype: torch.dtype) -> ClipReward:
    """The scorer in `place`; its score is the cosine, published as exp(logit_scale) · cosine.

    A local directory holds the model, and may hold tokenizer and preprocessing beside it.

    Raises:
        UserError: the model cannot be found or read, or is of another kind.
    """
    config = Path(place.source) / "config.json"
    processor = beside(config, ("preprocessor_config.json",), VIT_H)
    model, preprocess = load_clip_model(place, device, dtype, processor)
    return ClipReward(
        model,
        load_tokenizer(place, beside(config, TOKENIZER_FILES, VIT_H)),
        preprocess,
        name="pickscore",
        report_name="PickScore",
        report_scale=model.logit_scale.detach().float().exp().item(),
        dtype=dtype,
    )
