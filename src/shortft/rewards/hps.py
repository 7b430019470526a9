"""HPSv2 and HPSv2.1 (Wu et al. 2023): open_clip's ViT-H-14, run by transformers' CLIPModel."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from shortft.errors import UserError
from shortft.rewards.clip import ClipReward, load_tokenizer
from shortft.rewards.files import TOKENIZER_FILES, beside, build, read_weights
from shortft.rewards.places import FILES, VIT_H, Place
from shortft.rewards.preprocess import ClipPreprocess

# open_clip's names -> transformers'. Within a block: attention, then the rest of its parts.
_NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_PROJECTIONS = {  # stored as (in, out), used as x @ weight
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
}
_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")
_VISION_HEAD, _TEXT_HEAD = 80, 64  # channels per attention head of ViT-H-14


def load_hps(place: Place, device: torch.device | str, dtype: torch.dtype) -> ClipReward:
    """The scorer in a file such as ``HPS_v2_compressed.pt``; v2 and v2.1 are not comparable.

    The score is the cosine without temperature; it is published times 100. The picture's longer
    side is resized to 224 and padded with black.

    Raises:
        UserError: the file cannot be had, is damaged, holds code, or is no ViT-H-14 of open_clip.
    """
    content, path = read_weights(place, FILES[place.reward])
    state = content.get("state_dict", content)
    tokenizer = load_tokenizer(place, beside(path, TOKENIZER_FILES, VIT_H))
    config = _config(state, place)
    config.text_config.eos_token_id = tokenizer.eos_token_id
    model = build(CLIPModel, config, from_open_clip(state), place, dtype).to(device)
    return ClipReward(
        model,
        tokenizer,
        ClipPreprocess.of_clip(config.vision_config.image_size, pad=True),
        name=place.reward,
        report_name=f"{place.reward.replace('hps', 'HPS')} (×100)",
        report_scale=100.0,
        dtype=dtype,
    )


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's weights under transformers' names; the joint q, k, v projection is split.

    Names that open_clip's CLIP does not have are dropped.
    """
    renamed: dict[str, Tensor] = {}
    for name, weight in state.items():
        if name in _NAMES:
            renamed[_NAMES[name]] = weight
        elif name in _PROJECTIONS:
            renamed[_PROJECTIONS[name]] = weight.T
        elif match := _BLOCK.fullmatch(name):
            tower = "vision_model" if match[1] else "text_model"
            block, part, kind = f"{tower}.encoder.layers.{match[2]}", match[3], match[4]
            if part == "attn.in_proj":
                for projection, third in zip("qkv", weight.chunk(3), strict=True):
                    renamed[f"{block}.self_attn.{projection}_proj.{kind}"] = third
            elif part in _PARTS:
                renamed[f"{block}.{_PARTS[part]}.{kind}"] = weight
    return renamed


def _config(state: Mapping[str, Tensor], place: Place) -> CLIPConfig:
    """Sizes as the weights have them; widths per head are those of ViT-H-14."""
    try:
        width, _, patch, _ = state["visual.conv1.weight"].shape
        positions = len(state["visual.positional_embedding"])
        vocabulary, text_width = state["token_embedding.weight"].shape
        length = len(state["positional_embedding"])
        projection = state["text_projection"].shape[1]
        vision_mlp = len(state["visual.transformer.resblocks.0.mlp.c_fc.weight"])
        text_mlp = len(state["transformer.resblocks.0.mlp.c_fc.weight"])
    except (KeyError, ValueError, AttributeError, IndexError, TypeError) as error:
        raise UserError(
            f"{place}: not open_clip's ViT-H-14 ({error}); give {FILES[place.reward]}"
        ) from None
    if width % _VISION_HEAD or text_width % _TEXT_HEAD:
        raise UserError(
            f"{place}: of widths {width} and {text_width}, not open_clip's ViT-H-14; give "
            f"{FILES[place.reward]}"
        )
    return CLIPConfig(
        vision_config={
            "hidden_size": width,
            "intermediate_size": vision_mlp,
            "num_hidden_layers": _blocks(state, "visual.transformer."),
            "num_attention_heads": width // _VISION_HEAD,
            "image_size": math.isqrt(positions - 1) * patch,
            "patch_size": patch,
            "hidden_act": "gelu",
        },
        text_config={
            "hidden_size": text_width,
            "intermediate_size": text_mlp,
            "num_hidden_layers": _blocks(state, "transformer."),
            "num_attention_heads": text_width // _TEXT_HEAD,
            "vocab_size": vocabulary,
            "max_position_embeddings": length,
            "hidden_act": "gelu",
        },
        projection_dim=projection,
    )


def _blocks(state: Mapping[str, Tensor], tower: str) -> int:
    start = f"{tower}resblocks."
    return 1 + max(
        int(name[len(start) :].split(".")[0]) for name in state if name.startswith(start)
    )
