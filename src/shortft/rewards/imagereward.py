"""ImageReward (Xu et al. 2023): BLIP-large reads picture and prompt together, a head scores."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig, PreTrainedTokenizerBase
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from shortft.errors import UserError
from shortft.rewards.aesthetic import score_head
from shortft.rewards.files import (
    TOKENIZER_FILES,
    beside,
    build,
    cannot_load,
    find_file,
    read_weights,
)
from shortft.rewards.places import BERT, FILES, Place
from shortft.rewards.preprocess import ClipPreprocess

TEXT_TOKENS = 35
_MEAN, _STD = 0.16717362830052426, 1.0333394966054072  # of the raw score, from ImageReward.py
_VISION_HEAD = 64  # channels per attention head of ViT-L

# timm's names in a BLIP checkpoint -> transformers'.
_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}
_PARTS = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_VISION, _TEXT = "blip.visual_encoder.", "blip.text_encoder."


class ImageReward:
    """ImageReward's normalised score: mean 0 and spread 1 over its authors' data, about -2 to 2.

    The head always runs in float32, BLIP in the format that it was loaded in.
    """

    name = "imagereward"
    report_name = "ImageReward"
    report_higher_is_better = True

    def __init__(
        self,
        vision: BlipVisionModel,
        text: BlipTextModel,
        head: nn.Sequential,
        tokenizer: PreTrainedTokenizerBase,
        preprocess: ClipPreprocess,
    ) -> None:
        self.vision = vision.eval().requires_grad_(False)
        self.text = text.eval().requires_grad_(False)
        self.head = head
        self.tokenizer = tokenizer
        self.preprocess = preprocess

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,), differentiable in the pixels."""
        if len(prompts) != len(images_BCHW):
            raise ValueError(f"{len(images_BCHW)} pictures but {len(prompts)} prompts")
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=TEXT_TOKENS,
            return_tensors="pt",
        ).to(images_BCHW.device)
        with torch.autocast(images_BCHW.device.type, enabled=False):
            pixels = self.preprocess(images_BCHW).to(self.vision.dtype)
            patches = self.vision(pixel_values=pixels).last_hidden_state
            states = self.text(
                input_ids=tokens.input_ids,
                attention_mask=tokens.attention_mask,
                encoder_hidden_states=patches,
            ).last_hidden_state
            scores: Tensor = self.head(states[:, 0].float())
        return (scores.squeeze(-1) - _MEAN) / _STD

    @torch.no_grad()
    def report(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """The same (B,), without gradient."""
        return self(images_BCHW, prompts)


def load_imagereward(place: Place, device: torch.device | str, dtype: torch.dtype) -> ImageReward:
    """The scorer in ``ImageReward.pt``, with ``med_config.json`` beside it.

    Raises:
        UserError: a file cannot be had, is damaged, holds code, or is of another architecture.
    """
    state, path = read_weights(place, FILES[place.reward])
    vision_config = _vision_config(state, place)
    text_config = _text_config(place, path, vision_config.hidden_size)
    vision = build(BlipVisionModel, vision_config, vision_from_blip(state), place, dtype)
    # The names of the text half are the same; its unused buffer of positions is not asked for.
    text_state = {name.removeprefix(_TEXT): state[name] for name in state if name.startswith(_TEXT)}
    text = build(BlipTextModel, text_config, text_state, place, dtype, add_pooling_layer=False)
    head_state = {name.removeprefix("mlp."): state[name] for name in state}
    head = score_head(head_state, text_config.hidden_size, place)
    try:
        source = beside(path, TOKENIZER_FILES, BERT)
        tokenizer = BertTokenizer.from_pretrained(source, revision=place.revision_of(source))
    except Exception as error:
        raise cannot_load(place, error) from error
    preprocess = ClipPreprocess.of_clip(vision_config.image_size, round_crop=True)
    return ImageReward(vision.to(device), text.to(device), head.to(device), tokenizer, preprocess)


def vision_from_blip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The picture half's weights under transformers' names."""
    renamed: dict[str, Tensor] = {}
    for full_name, weight in state.items():
        name = full_name.removeprefix(_VISION)
        if name == full_name:
            continue
        if name in _NAMES:
            renamed[_NAMES[name]] = weight
        elif (match := re.fullmatch(r"blocks\.(\d+)\.(.+)\.(\w+)", name)) and match[2] in _PARTS:
            renamed[f"encoder.layers.{match[1]}.{_PARTS[match[2]]}.{match[3]}"] = weight
    return renamed


def _vision_config(state: Mapping[str, Any], place: Place) -> BlipVisionConfig:
    """Sizes as the weights have them, 64 channels per head as in BLIP-base and BLIP-large."""
    try:
        width, _, patch, _ = state[f"{_VISION}patch_embed.proj.weight"].shape
        positions = state[f"{_VISION}pos_embed"].shape[1]
        mlp = len(state[f"{_VISION}blocks.0.mlp.fc1.weight"])
    except (KeyError, ValueError, AttributeError, IndexError, TypeError) as error:
        raise UserError(
            f"{place}: not ImageReward's BLIP ({error}); give {FILES[place.reward]}"
        ) from None
    blocks = {name.split(".")[3] for name in state if name.startswith(f"{_VISION}blocks.")}
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=len(blocks),
        num_attention_heads=width // _VISION_HEAD,
        image_size=math.isqrt(positions - 1) * patch,
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )


def _text_config(place: Place, weights: Path, vision_width: int) -> BlipTextConfig:
    """BLIP's BERT as ``med_config.json`` describes it."""
    path = weights.parent / "med_config.json"
    if not path.is_file():
        if place.is_local:
            raise UserError(f"{place}: no med_config.json beside {weights.name}; put it there")
        path = find_file(place, "med_config.json")
    try:
        med = json.loads(path.read_text(encoding="utf-8"))
        return BlipTextConfig(
            vocab_size=med["vocab_size"],
            hidden_size=med["hidden_size"],
            encoder_hidden_size=vision_width,
            intermediate_size=med["intermediate_size"],
            num_hidden_layers=med["num_hidden_layers"],
            num_attention_heads=med["num_attention_heads"],
            max_position_embeddings=med["max_position_embeddings"],
            hidden_act=med["hidden_act"],
            layer_norm_eps=med["layer_norm_eps"],
            pad_token_id=med["pad_token_id"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{place}: {path.name} is not BLIP's ({error!r}); fetch it again") from None
