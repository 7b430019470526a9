"""Rewards with other people's models: each score against the published way.

Models are tiny and random, saved in the layout and under the names of the files on the hub.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertTokenizer,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from published_rewards import (
    Weights,
    head_weights,
    imagereward_weights,
    open_clip_weights,
    published_aesthetic,
    published_hps,
    published_imagereward,
)
from shortft.rewards import make_reward
from shortft.rewards.clip import ClipReward
from shortft.rewards.places import HUB
from test_rewards import TOKENIZER, clip_dir, published_score, scenes, to_uint8  # noqa: F401

PROMPTS = ["red apple", "a panda face on a blue background", "car", "fish"]

PUBLISHED = {
    "pickscore": published_score,
    "hpsv2": lambda *a: published_hps(a[0], "HPS_v2_compressed.pt", *a[1:]),
    "hpsv2.1": lambda *a: published_hps(a[0], "HPS_v2.1_compressed.pt", *a[1:]),
    "imagereward": published_imagereward,
    "aesthetic": published_aesthetic,
}


@pytest.fixture(scope="module")
def folder(clip_dir: Path) -> Path:  # noqa: F811
    """Every model's file in one directory, with what belongs beside it."""
    tokenizer = CLIPTokenizer.from_pretrained(clip_dir)
    weights = open_clip_weights(len(tokenizer))
    torch.save({"state_dict": dict(weights), "epoch": 3}, clip_dir / "HPS_v2_compressed.pt")
    other = {name: weight.flip(0) if "c_fc" in name else weight for name, weight in weights.items()}
    torch.save({"state_dict": other}, clip_dir / "HPS_v2.1_compressed.pt")
    aesthetic = Weights()
    head_weights(aesthetic, "", 16)
    torch.save(dict(aesthetic), clip_dir / "aesthetic-model.pth")
    return clip_dir


@pytest.fixture(scope="module")
def blip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("imagereward")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{x}" for x in letters)]
    BertTokenizer(vocab={word: n for n, word in enumerate(words)}).save_pretrained(directory)
    torch.save(dict(imagereward_weights(len(words))), directory / "ImageReward.pt")
    med = {
        "architectures": ["BertModel"],
        "attention_probs_dropout_prob": 0.1,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 48,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 64,
        "model_type": "bert",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
        "add_type_embeddings": False,
        "vocab_size": len(words),
        "encoder_width": 128,
        "add_cross_attention": True,
    }
    (directory / "med_config.json").write_text(json.dumps(med))
    return directory


@pytest.fixture
def place(request: pytest.FixtureRequest, name: str) -> Path:
    return request.getfixturevalue("blip_folder" if name == "imagereward" else "folder")


def make(name: str, place: Path, dtype: torch.dtype = torch.float32):
    return make_reward(name, f"{name}={place}", dtype=dtype).parts[0][0]


# In units of the scores' spread. Without resizing only sums round differently; with it, PIL
# rounds to 8 bits (largest error seen: 0.025).
@pytest.mark.parametrize("size", [32, 64, 20, (48, 40), (41, 72)])
@pytest.mark.parametrize("name", HUB)
def test_score_is_the_published_one(name, place, size):
    images = scenes(4, size)
    with torch.no_grad():
        expected = PUBLISHED[name](place, images, PROMPTS)
    found = make(name, place).report(images, PROMPTS)
    spread = float(expected.std())
    assert spread > 1e-3
    tolerance = 1e-4 if size == 32 else 0.05
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=tolerance * spread)


@pytest.mark.parametrize("name", HUB)
def test_every_pixel_block_gets_gradient(name, place):
    images = scenes(3).requires_grad_()
    (gradient,) = torch.autograd.grad(make(name, place)(images, PROMPTS[:3]).sum(), images)
    assert gradient.isfinite().all()
    assert (gradient.unfold(2, 8, 8).unfold(3, 8, 8).abs().amax((1, 4, 5)) > 0).all()


@pytest.mark.parametrize("name", HUB)
def test_batch_and_number_format_do_not_matter(name, place):
    reward, images, prompts = make(name, place), scenes(8), PROMPTS * 2
    together = reward(images, prompts)
    assert (together.shape, together.dtype) == ((8,), torch.float32)
    alone = torch.cat([reward(images[i : i + 1], prompts[i : i + 1]) for i in range(8)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(reward(images, prompts), together)
    half = make(name, place, torch.bfloat16)(images.requires_grad_(), prompts)
    assert half.dtype == torch.float32
    assert (half - together).abs().max() < 0.15 * together.std()
    assert torch.autograd.grad(half.sum(), images)[0].isfinite().all()


def test_v2_and_v21_are_two_models(folder):
    images = scenes(4)
    scores = [make(name, folder)(images, PROMPTS) for name in ("hpsv2", "hpsv2.1")]
    assert (scores[0] - scores[1]).abs().max() > 0.01


def test_papers_mix(folder):
    images, where = scenes(4), ",".join(f"{name}={folder}" for name in HUB if name != "imagereward")
    mix = make_reward("paper-mix", where)
    parts = mix.components(images, PROMPTS)
    expected = 10 * parts["pickscore"] + 2 * parts["hpsv2"] + 0.05 * parts["aesthetic"]
    torch.testing.assert_close(mix(images, PROMPTS), expected)
    assert mix.name == "pickscore:10,hpsv2:2,aesthetic:0.05"


def save_siglip(directory: Path) -> tuple[SiglipModel, PreTrainedTokenizerFast, Any]:
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(TOKENIZER / "tokenizer.json"),
        model_max_length=16,
        pad_token="<|endoftext|>",
        model_input_names=["input_ids"],
    )
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "projection_size": 32}
    config = SiglipConfig(
        text_config={**small, **text, "num_hidden_layers": 2},
        vision_config={**small, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SiglipModel(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    processor = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    for part in (model, tokenizer, processor):
        part.save_pretrained(directory)
    return model, tokenizer, processor


@pytest.mark.parametrize("size", [32, (41, 72)])
def test_siglip_is_the_published_one(tmp_path, size):
    model, tokenizer, processor = save_siglip(tmp_path)
    images = scenes(4, size)
    pixels = processor(to_uint8(images), return_tensors="pt").pixel_values
    ids = tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=pixels).logits_per_image.diagonal()
        expected = (logits - model.logit_bias) / model.logit_scale.exp()
    scores = ClipReward.load(tmp_path)(images, PROMPTS)
    tolerance = 1e-4 if size == 32 else 0.05
    assert expected.std() > 1e-3
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=tolerance * float(expected.std()))


def test_siglip_has_gradient_everywhere_and_no_batch_or_number_format_matters(tmp_path):
    save_siglip(tmp_path)
    reward, images, prompts = ClipReward.load(tmp_path), scenes(8).requires_grad_(), PROMPTS * 2
    together = reward(images, prompts)
    alone = torch.cat([reward(images[i : i + 1], prompts[i : i + 1]) for i in range(8)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(together.sum(), images)
    assert gradient.isfinite().all()
    assert (gradient.unfold(2, 8, 8).unfold(3, 8, 8).abs().amax((1, 4, 5)) > 0).all()
    half = ClipReward.load(tmp_path, dtype=torch.bfloat16)(images, prompts)
    assert (half.dtype, bool((half - together).abs().max() < 0.15 * together.std())) == (
        torch.float32,
        True,
    )
    assert torch.autograd.grad(half.sum(), images)[0].isfinite().all()
