"""How other people's reward models are published to work, in plain PyTorch and PIL.

Written from their authors' code (hpsv2/img_score.py with open_clip, ImageReward.py with BLIP's
vit.py and med.py, trl's AestheticScorer) at tiny sizes under their own weight names, so that
neither the renaming of weights nor transformers' classes are taken on trust by the tests.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import BertTokenizer, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from test_rewards import TOKENIZER, to_uint8

MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1)
STD = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1)
SIDE, PATCH, TEXT, LENGTH = 32, 8, 128, 20
HEAD = (1024, 128, 64, 16, 1)


class Weights(dict):
    """Random weights under their authors' names."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def add(self, name: str, *shape: int, scale: float = 1.0, offset: float = 0.0) -> None:
        self[name] = offset + scale * torch.randn(shape, generator=self.generator)

    def linear(self, name: str, inputs: int, outputs: int) -> None:
        self.add(f"{name}.weight", outputs, inputs, scale=1.5 / math.sqrt(inputs))
        self.add(f"{name}.bias", outputs, scale=0.1)

    def norm(self, name: str, width: int) -> None:
        self.add(f"{name}.weight", width, scale=0.2, offset=1.0)
        self.add(f"{name}.bias", width, scale=0.2)


def linear(w, name, x):
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def norm(w, name, x, eps):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def attend(query, key, value, heads, mask=0.0):
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    scores = query @ key.mT / math.sqrt(query.shape[-1]) + mask
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


def head(w, prefix, x):
    for layer in (0, 2, 4, 6, 7):
        x = linear(w, f"{prefix}layers.{layer}", x)
    return x.squeeze(-1)


def head_weights(w, prefix, width):
    for layer, outputs in zip((0, 2, 4, 6, 7), HEAD, strict=True):
        w.linear(f"{prefix}layers.{layer}", width, outputs)
        width = outputs


def normalised(pictures: list[Image.Image]) -> torch.Tensor:
    """torchvision's ToTensor and Normalize with CLIP's numbers."""
    raw = [torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8) for p in pictures]
    shape = (pictures[0].height, pictures[0].width, 3)
    return torch.stack([(x.view(shape).permute(2, 0, 1) / 255 - MEAN) / STD for x in raw])


# open_clip and HPSv2 ------------------------------------------------------------------------------


def open_clip_weights(vocabulary: int) -> Weights:
    w = Weights()
    w.add("visual.class_embedding", 160)
    w.add("visual.positional_embedding", (SIDE // PATCH) ** 2 + 1, 160)
    w.add("visual.conv1.weight", 160, 3, PATCH, PATCH, scale=0.2)
    w.add("visual.proj", 160, 16)
    w.add("text_projection", TEXT, 16)
    w.add("token_embedding.weight", vocabulary, TEXT)
    w.add("positional_embedding", LENGTH, TEXT)
    for name, width in (("visual.ln_pre", 160), ("visual.ln_post", 160), ("ln_final", TEXT)):
        w.norm(name, width)
    w["logit_scale"] = torch.tensor(4.6)
    for tower, width in (("visual.transformer", 160), ("transformer", TEXT)):
        for layer in range(2):
            block = f"{tower}.resblocks.{layer}"
            w.norm(f"{block}.ln_1", width)
            w.norm(f"{block}.ln_2", width)
            w.linear(f"{block}.attn.in_proj", width, 3 * width)
            for kind in ("weight", "bias"):  # nn.MultiheadAttention's own names
                w[f"{block}.attn.in_proj_{kind}"] = w.pop(f"{block}.attn.in_proj.{kind}")
            w.linear(f"{block}.attn.out_proj", width, width)
            w.linear(f"{block}.mlp.c_fc", width, 4 * width)
            w.linear(f"{block}.mlp.c_proj", 4 * width, width)
    return w


def open_clip_blocks(w, tower, x, heads, mask=None):
    for layer in range(2):
        block = f"{tower}.resblocks.{layer}"
        y = norm(w, f"{block}.ln_1", x, 1e-5).transpose(0, 1)
        y, _ = F.multi_head_attention_forward(
            *(y, y, y, x.shape[-1], heads),
            *(w[f"{block}.attn.in_proj_weight"], w[f"{block}.attn.in_proj_bias"]),
            *(None, None, False, 0.0),
            *(w[f"{block}.attn.out_proj.weight"], w[f"{block}.attn.out_proj.bias"]),
            training=False,
            need_weights=False,
            attn_mask=mask,
        )
        x = x + y.transpose(0, 1)
        y = F.gelu(linear(w, f"{block}.mlp.c_fc", norm(w, f"{block}.ln_2", x, 1e-5)))
        x = x + linear(w, f"{block}.mlp.c_proj", y)
    return x


def published_hps(directory: Path, name: str, images, prompts) -> torch.Tensor:
    """hpsv2/img_score.py with open_clip's model.py and transform.py (ResizeMaxSize), times 100."""
    w = torch.load(directory / name, weights_only=True)["state_dict"]
    pictures = []
    for picture in map(Image.fromarray, to_uint8(images)):
        scale = SIDE / max(picture.size)
        if scale != 1.0:
            width, height = (round(length * scale) for length in picture.size)
            small = picture.resize((width, height), Image.Resampling.BICUBIC)
            picture = Image.new("RGB", (SIDE, SIDE))
            picture.paste(small, ((SIDE - width) // 2, (SIDE - height) // 2))
        pictures.append(picture)
    x = F.conv2d(normalised(pictures), w["visual.conv1.weight"], stride=PATCH)
    x = x.flatten(2).mT
    x = torch.cat([w["visual.class_embedding"].expand(len(x), 1, -1), x], 1)
    x = norm(w, "visual.ln_pre", x + w["visual.positional_embedding"], 1e-5)
    x = open_clip_blocks(w, "visual.transformer", x, 2)
    pictures_features = norm(w, "visual.ln_post", x[:, 0], 1e-5) @ w["visual.proj"]

    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    tokens = torch.zeros(len(prompts), LENGTH, dtype=torch.long)
    for row, prompt in zip(tokens, prompts, strict=True):
        ids = tokenizer(prompt).input_ids
        row[: len(ids)] = torch.tensor(ids)
    ends = (tokens == tokenizer.eos_token_id).int().argmax(-1)
    x = w["token_embedding.weight"][tokens] + w["positional_embedding"]
    causal = torch.full((LENGTH, LENGTH), -math.inf).triu(1)
    x = norm(w, "ln_final", open_clip_blocks(w, "transformer", x, 2, causal), 1e-5)
    text_features = x[torch.arange(len(x)), ends] @ w["text_projection"]
    return 100 * F.cosine_similarity(pictures_features, text_features)


# BLIP and ImageReward -----------------------------------------------------------------------------


def imagereward_weights(vocabulary: int) -> Weights:
    w = Weights()
    vision, text = "blip.visual_encoder", "blip.text_encoder"
    w.add(f"{vision}.cls_token", 1, 1, 128)
    w.add(f"{vision}.pos_embed", 1, (SIDE // PATCH) ** 2 + 1, 128)
    w.add(f"{vision}.patch_embed.proj.weight", 128, 3, PATCH, PATCH, scale=0.2)
    w.add(f"{vision}.patch_embed.proj.bias", 128)
    w.norm(f"{vision}.norm", 128)
    w.add(f"{text}.embeddings.word_embeddings.weight", vocabulary, 48)
    w.add(f"{text}.embeddings.position_embeddings.weight", 64, 48)
    w[f"{text}.embeddings.position_ids"] = torch.arange(64)[None]  # old checkpoints have it
    w.norm(f"{text}.embeddings.LayerNorm", 48)
    for layer in range(2):
        block = f"{vision}.blocks.{layer}"
        w.norm(f"{block}.norm1", 128)
        w.norm(f"{block}.norm2", 128)
        for part, sizes in {"attn.qkv": (128, 384), "attn.proj": (128, 128)}.items():
            w.linear(f"{block}.{part}", *sizes)
        w.linear(f"{block}.mlp.fc1", 128, 512)
        w.linear(f"{block}.mlp.fc2", 512, 128)
        block = f"{text}.encoder.layer.{layer}"
        for attention, width in (("attention", 48), ("crossattention", 128)):
            for part, inputs in (("query", 48), ("key", width), ("value", width)):
                w.linear(f"{block}.{attention}.self.{part}", inputs, 48)
            w.linear(f"{block}.{attention}.output.dense", 48, 48)
            w.norm(f"{block}.{attention}.output.LayerNorm", 48)
        w.linear(f"{block}.intermediate.dense", 48, 96)
        w.linear(f"{block}.output.dense", 96, 48)
        w.norm(f"{block}.output.LayerNorm", 48)
    w.linear("blip.vision_proj", 128, 16)  # in the file, not in the score
    head_weights(w, "mlp.", 48)
    return w


def published_imagereward(directory: Path, images, prompts) -> torch.Tensor:
    """ImageReward.py's `score` with BLIP's vit.py and med.py."""
    w = torch.load(directory / "ImageReward.pt", weights_only=True)
    pictures = []
    for picture in map(Image.fromarray, to_uint8(images)):
        short = min(picture.size)  # torchvision's Resize and CenterCrop
        width, height = (int(SIDE * length / short) for length in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - SIDE) / 2), round((height - SIDE) / 2)
        pictures.append(picture.crop((left, top, left + SIDE, top + SIDE)))
    vision = "blip.visual_encoder"
    x = F.conv2d(
        normalised(pictures),
        w[f"{vision}.patch_embed.proj.weight"],
        w[f"{vision}.patch_embed.proj.bias"],
        stride=PATCH,
    )
    x = torch.cat([w[f"{vision}.cls_token"].expand(len(x), 1, -1), x.flatten(2).mT], 1)
    x = x + w[f"{vision}.pos_embed"]
    for layer in range(2):
        block = f"{vision}.blocks.{layer}"
        y = linear(w, f"{block}.attn.qkv", norm(w, f"{block}.norm1", x, 1e-6))
        x = x + linear(w, f"{block}.attn.proj", attend(*y.chunk(3, -1), heads=2))
        y = F.gelu(linear(w, f"{block}.mlp.fc1", norm(w, f"{block}.norm2", x, 1e-6)))
        x = x + linear(w, f"{block}.mlp.fc2", y)
    patches = norm(w, f"{vision}.norm", x, 1e-6)

    tokens = BertTokenizer.from_pretrained(directory)(
        prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    mask = (1 - tokens.attention_mask[:, None, None, :]) * -10000.0
    text = "blip.text_encoder"
    x = w[f"{text}.embeddings.word_embeddings.weight"][tokens.input_ids]
    x = x + w[f"{text}.embeddings.position_embeddings.weight"][:35]
    x = norm(w, f"{text}.embeddings.LayerNorm", x, 1e-12)
    for layer in range(2):
        block = f"{text}.encoder.layer.{layer}"
        for attention, source, hidden in (
            ("attention", None, mask),
            ("crossattention", patches, 0),
        ):
            part = f"{block}.{attention}"
            source = x if source is None else source
            y = attend(
                linear(w, f"{part}.self.query", x),
                linear(w, f"{part}.self.key", source),
                linear(w, f"{part}.self.value", source),
                heads=4,
                mask=hidden,
            )
            y = linear(w, f"{part}.output.dense", y)
            x = norm(w, f"{part}.output.LayerNorm", x + y, 1e-12)
        y = F.gelu(linear(w, f"{block}.intermediate.dense", x))
        y = linear(w, f"{block}.output.dense", y)
        x = norm(w, f"{block}.output.LayerNorm", x + y, 1e-12)
    return (head(w, "mlp.", x[:, 0]) - 0.16717362830052426) / 1.0333394966054072


def published_aesthetic(directory: Path, images, prompts) -> torch.Tensor:
    """trl's AestheticScorer: processor, CLIPModel, unit length, head."""
    model = CLIPModel.from_pretrained(directory).eval()
    processor = CLIPImageProcessorPil.from_pretrained(directory)
    features = model.get_image_features(**processor(to_uint8(images), return_tensors="pt"))
    features = features.pooler_output
    w = torch.load(directory / "aesthetic-model.pth", weights_only=True)
    return head(w, "", features / features.norm(dim=-1, keepdim=True))
