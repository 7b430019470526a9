"""Rewards against other people's code: transformers' processor, PIL's JPEG files, finite
differences."""

import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTextModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import shortft
from shortft.errors import UserError
from shortft.rewards import REWARDS, anchor_warning, make_reward, parse_reward_spec
from shortft.rewards.clip import ClipReward
from shortft.rewards.combine import Conservative
from shortft.rewards.compressibility import Compressibility
from shortft.rewards.places import HUB
from shortft.rewards.preprocess import ClipPreprocess
from shortft.rewards.spec import scorers
from shortft.rewards.symmetry import Symmetry

TOKENIZER = Path(shortft.__file__).parent / "assets" / "emoji" / "tokenizer"
PROMPTS = ["red apple", "a panda face on a blue background", "car", "red apple"]


def scenes(count: int, size: int | tuple[int, int] = 64, seed: int = 0) -> torch.Tensor:
    """Coloured discs on white with soft edges and some noise, exact in 8 bits."""
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    images = torch.ones(count, 3, height, width)
    for image in images:
        for _ in range(4):
            cx, cy, radius, *colour = torch.rand(6, generator=generator).tolist()
            edge = ((radius * 0.3 + 0.1 - ((x - cx) ** 2 + (y - cy) ** 2).sqrt()) * 20).sigmoid()
            image += edge * (torch.tensor(colour).view(3, 1, 1) - image)
        image += 0.02 * torch.randn(image.shape, generator=generator)
    return (images.clamp(0, 1) * 255).round() / 255


def to_uint8(images: torch.Tensor) -> list:
    return list((images * 255).round().byte().permute(0, 2, 3, 1).numpy())


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])


@pytest.fixture(scope="module")
def clip_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIPModel with everything beside it, as PickScore's directory has."""
    directory = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(
            CLIPConfig(
                text_config={
                    **small,
                    "num_hidden_layers": 2,
                    "vocab_size": len(tokenizer),
                    "max_position_embeddings": 20,
                    "bos_token_id": tokenizer.bos_token_id,
                    "eos_token_id": tokenizer.eos_token_id,
                    "pad_token_id": tokenizer.pad_token_id,
                },
                vision_config={**small, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8},
                projection_dim=16,
                initializer_factor=3.0,  # else random features all point the same way
            )
        )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def clip(clip_dir: Path) -> ClipReward:
    return ClipReward.load(clip_dir)


def published_score(directory: Path, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """The way every model card shows: processor with PIL, then the model's own logits."""
    processor = CLIPProcessor(
        image_processor=CLIPImageProcessorPil.from_pretrained(directory),
        tokenizer=CLIPTokenizer.from_pretrained(directory),
    )
    model = CLIPModel.from_pretrained(directory).eval()
    inputs = processor(
        text=prompts, images=to_uint8(images), return_tensors="pt", padding=True, truncation=True
    )
    with torch.no_grad():
        return model(**inputs).logits_per_image.diagonal()


@pytest.mark.parametrize(
    ("size", "tolerance"), [(32, 1e-4), (64, 0.02), (20, 0.02), ((48, 40), 0.02), ((40, 71), 0.02)]
)
def test_clip_score_is_the_published_one(clip_dir, size, tolerance):
    images = scenes(4, size)
    expected = published_score(clip_dir, images, PROMPTS)
    clip = ClipReward.load(clip_dir)
    scores = clip.model.logit_scale.exp() * clip(images, PROMPTS)
    assert expected.std() > 0.2  # logits: the tolerance is small beside what they tell apart
    torch.testing.assert_close(scores, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", [64, 20, (48, 40), (41, 72)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"size": {"height": 24, "width": 32}, "crop_size": {"height": 40, "width": 31}},
        {"do_resize": False, "crop_size": {"height": 32, "width": 45}, "resample": 2},
        {"do_center_crop": False, "do_normalize": False, "resample": 2},
    ],
)
def test_preprocessing_matches_pil(size, options):
    config = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, **options}
    images = scenes(3, size)
    expected = CLIPImageProcessorPil(**config)(to_uint8(images), return_tensors="pt").pixel_values
    pixels = ClipPreprocess.from_config(config)(images)
    assert pixels.shape == expected.shape
    # two roundings to 8 bits, over the standard deviation by which pixels are divided
    torch.testing.assert_close(pixels, expected, rtol=0, atol=2 / 255 / 0.26)
    assert (pixels - expected).abs().mean() < 0.006


def test_preprocessing_reads_old_configurations():
    old = ClipPreprocess.from_config({"size": 32, "crop_size": 32})
    new = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    assert old == ClipPreprocess.from_config(new)
    assert ClipPreprocess.from_config({}).resize == 224
    for bad in ({"resample": 0}, {"size": {"longest_edge": 224}}):
        with pytest.raises(ValueError, match="not supported"):
            ClipPreprocess.from_config(bad)


def test_clip_is_frozen_float32_and_ignores_autocast(clip):
    images = scenes(2)
    expected = clip(images, PROMPTS[:2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        clip._text_features.clear()
        scores = clip(images, PROMPTS[:2])
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in clip.model.parameters())
    assert not clip.model.training


def test_clip_encodes_each_prompt_once(clip, monkeypatch):
    clip._text_features.clear()
    encoded: list[int] = []
    encode = clip.model.get_text_features

    def counting(**tokens):
        encoded.append(len(tokens["input_ids"]))
        return encode(**tokens)

    monkeypatch.setattr(clip.model, "get_text_features", counting)
    first = clip.embed_texts(PROMPTS)
    torch.testing.assert_close(clip.embed_texts(PROMPTS), first, rtol=0, atol=0)
    assert encoded == [1, 1, 1]  # alone, so that a feature does not depend on the others
    for prompt, row in zip(PROMPTS, first, strict=True):
        clip._text_features.clear()
        assert torch.equal(clip.embed_texts([prompt])[0], row)
    monkeypatch.setattr("shortft.rewards.clip._CACHED_PROMPTS", 3)
    torch.testing.assert_close(clip.embed_texts([*PROMPTS, "fish"])[:4], first)
    assert len(clip._text_features) == 4  # the batch at hand; everything older is dropped


def test_clip_report_is_the_cosine(clip):
    images, prompts = scenes(4), PROMPTS
    torch.testing.assert_close(clip.report(images, prompts), clip(images, prompts))
    with pytest.raises(ValueError, match="4 pictures but 1 prompts"):
        clip(images, ["one"])


def test_clip_loading_mistakes_are_user_errors(clip_dir, tmp_path):
    with pytest.raises(UserError, match="no such model"):
        ClipReward.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="cannot be loaded"):
        ClipReward.load(tmp_path)
    CLIPTextModel(CLIPConfig.from_pretrained(clip_dir).text_config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a clip_text_model model; give a CLIPModel"):
        ClipReward.load(tmp_path)


# Rewards with other people's models have their own tests in test_reward_models.py.
NAMES = [name for name in REWARDS if name not in HUB]


def build(name: str, clip: ClipReward | None):
    return clip if name == "clip" else make_reward(name).parts[0][0]


@pytest.mark.parametrize("name", NAMES)
def test_every_pixel_block_gets_gradient(name, clip):
    images = scenes(3).requires_grad_()
    (gradient,) = torch.autograd.grad(build(name, clip)(images, PROMPTS[:3]).sum(), images)
    assert gradient.isfinite().all()
    assert (gradient.unfold(2, 8, 8).unfold(3, 8, 8).abs().amax((1, 4, 5)) > 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_gradient_of_a_blank_picture_is_finite(name, value, clip):
    images = torch.full((1, 3, 64, 64), value, requires_grad=True)
    (gradient,) = torch.autograd.grad(build(name, clip)(images, ["car"]).sum(), images)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_batch_does_not_matter(name, clip):
    reward, images, prompts = build(name, clip), scenes(8), PROMPTS * 2
    together = reward(images, prompts)
    assert together.shape == (8,)
    assert together.dtype == torch.float32
    alone = torch.cat([reward(images[i : i + 1], prompts[i : i + 1]) for i in range(8)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert reward.report(images, prompts).shape == (8,)


@pytest.mark.parametrize("name", NAMES)
def test_number_format_does_not_matter(name, clip):
    """Half-precision pictures are scored in full, and autocast around a reward changes nothing."""
    reward, images, prompts = build(name, clip), scenes(8), PROMPTS * 2
    whole = reward(images, prompts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(reward(images, prompts), whole)
    rounded = images.bfloat16().requires_grad_()
    half = reward(rounded, prompts)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, reward(rounded.detach().float(), prompts))
    assert (half - whole).abs().max() < 0.15 * whole.std()
    (gradient,) = torch.autograd.grad(half.sum(), rounded)
    assert gradient.dtype == torch.bfloat16
    assert gradient.isfinite().all()


def test_clip_in_half_precision_scores_alike(clip_dir, clip):
    reward = make_reward("clip", str(clip_dir), dtype=torch.bfloat16).parts[0][0]
    images, prompts = scenes(8).requires_grad_(), PROMPTS * 2
    half, whole = reward(images, prompts), clip(images, prompts)
    assert half.dtype == torch.float32
    assert 0 < (half - whole).abs().max() < 0.15 * whole.std()
    assert torch.autograd.grad(half.sum(), images)[0].isfinite().all()


@pytest.mark.parametrize("reward", [Symmetry(), Compressibility(), Compressibility(75)])
@pytest.mark.parametrize("shape", [(32, 32), (24, 40)])
def test_gradient_against_finite_differences(reward, shape):
    images = scenes(2, shape).double()
    images += 1e-3 * torch.rand(images.shape, generator=torch.Generator().manual_seed(1))
    images.requires_grad_()  # no two pixels are equal now, where |x - flip(x)| has its kink
    (gradient,) = torch.autograd.grad(reward(images).sum(), images)
    generator, step = torch.Generator().manual_seed(2), 1e-7
    for _ in range(5):
        direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        up, down = (reward(images.detach() + s * step * direction).sum() for s in (1, -1))
        torch.testing.assert_close(
            (up - down) / (2 * step), (gradient * direction).sum(), rtol=1e-5, atol=1e-7
        )


def test_symmetry_values():
    half = torch.zeros(1, 3, 8, 8)
    half[..., :4] = 1.0
    both = torch.cat([half, half.flip(-2), torch.rand(1, 3, 8, 1).expand(1, 3, 8, 8)])
    torch.testing.assert_close(Symmetry()(both), torch.tensor([-1.0, -1.0, 0.0]))
    torch.testing.assert_close(Symmetry().report(both), torch.tensor([1.0, 1.0, 0.0]))


def test_jpeg_tables_are_those_that_pil_writes(tmp_path):
    from PIL import Image

    for quality in (1, 30, 50, 75, 95, 100):
        Image.new("RGB", (16, 16)).save(tmp_path / "a.jpg", quality=quality)
        luma, chroma = Image.open(tmp_path / "a.jpg").quantization.values()
        reward = Compressibility(quality)
        assert reward._luma_table.flatten().tolist() == luma
        assert reward._chroma_table.flatten().tolist() == chroma
    with pytest.raises(ValueError, match="JPEG quality 0"):
        Compressibility(0)


def test_jpeg_coefficients_are_kornias():
    from kornia.color import rgb_to_ycbcr
    from kornia.enhance import jpeg

    images, reward = scenes(2, (32, 48)).double(), Compressibility(95)
    ycbcr = 255 * rgb_to_ycbcr(images)
    expected = jpeg._dct_8x8(jpeg._patchify_8x8(ycbcr[:, 0])) / reward._luma_table
    torch.testing.assert_close(reward.coefficients(images)[0].flatten(1, 2), expected)


@pytest.mark.parametrize("quality", [75, 95])
def test_jpeg_estimate_follows_the_true_file_size(quality):
    reward = Compressibility(quality)
    clean = scenes(24)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(3))
    blurred = torch.nn.functional.avg_pool2d(clean, 5, stride=1, padding=2, count_include_pad=False)
    images = torch.cat([clean, blurred, (clean + 0.05 * noise).clamp(0, 1), clean / 2, 1 - clean])
    estimate, kilobytes = -reward(images), reward.report(images)
    assert rank_correlation(estimate, kilobytes) > 0.97
    # the unit too: bits per pixel of a 64 x 64 picture, plus a header of about 0.63 kB
    expected = estimate * 64 * 64 / 8 / 1000 + 0.63
    assert ((expected - kilobytes).abs() / kilobytes).mean() < 0.12


def test_jpeg_files_shrink_when_the_reward_rises():
    reward, before = Compressibility(), scenes(4)
    images = before.clone()
    for _ in range(20):
        images.requires_grad_()
        (gradient,) = torch.autograd.grad(reward(images).sum(), images)
        norm = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        images = (images.detach() + 0.1 * gradient / norm).clamp(0, 1)
    assert (reward(images) > reward(before)).all()
    assert (reward.report(images) < 0.95 * reward.report(before)).all()
    assert (images - before).square().mean().sqrt() < 0.02  # still the same pictures


def test_incompressibility_is_the_negative():
    images = scenes(2)
    more, less = build("incompressibility", None), Compressibility()
    torch.testing.assert_close(more(images, []), -less(images))
    torch.testing.assert_close(more.report(images, []), less.report(images))
    assert more.report_higher_is_better
    assert not less.report_higher_is_better


def test_specification():
    assert parse_reward_spec("clip") == [("clip", 1.0)]
    assert parse_reward_spec(" clip : 1, symmetry:2e-1 ") == [("clip", 1.0), ("symmetry", 0.2)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "a reward has no name"),
        ("clip,,symmetry", "a reward has no name"),
        (":2", "a reward has no name"),
        ("simetry", r"did you mean symmetry\? known: clip, symmetry, compressibility"),
        ("zzz", "no reward named 'zzz'; known: clip"),
        ("clip:1,symmetry:x", "weight 'x' of symmetry is not a positive number"),
        ("clip:", "weight '' of clip"),
        ("clip:0", "weight '0'"),
        ("clip:-1", "weight '-1'"),
        ("clip:nan", "weight 'nan'"),
        ("clip:1:2", "weight '1:2'"),
        ("clip,symmetry,clip:2", "clip stands twice"),
        ("clip+clip~1", "clip stands twice"),
        ("clip+symmetry~", "'' after ~ is not a number of at least 0; write e.g. clip"),
        ("clip+symmetry~-1", "'-1' after ~"),
        ("clip+simetry~1", r"did you mean symmetry"),
        ("clip+symmetry:0~1", "weight '0' of symmetry"),
        ("clip+symmetry~1:x", "weight 'x' of the ensemble"),
        ("clip+symmetry", "no reward named 'clip.symmetry'"),
    ],
)
def test_bad_specifications_are_user_errors(spec, message):
    with pytest.raises(UserError, match=message) as caught:
        make_reward(spec)
    assert str(caught.value).startswith("--reward ")
    assert "\n" not in str(caught.value)


def test_rewards_that_need_an_anchor_say_so():
    assert anchor_warning("clip:1,symmetry:0.2") is None
    for spec in ("symmetry", "compressibility:2,symmetry"):
        assert f"--reward clip:1,{spec}" in (anchor_warning(spec) or "")


def test_mix(clip_dir):
    images, prompts = scenes(3).requires_grad_(), PROMPTS[:3]
    mix = make_reward("clip:2,symmetry:0.5", models=clip_dir)
    parts = mix.components(images, prompts)
    assert list(parts) == ["clip", "symmetry"]
    scores = mix(images, prompts)
    torch.testing.assert_close(scores, 2 * parts["clip"] + 0.5 * parts["symmetry"])
    torch.testing.assert_close(mix.combine(parts), scores)
    assert scores.requires_grad
    assert (mix.name, mix.report_name) == ("clip:2,symmetry:0.5", "clip:2,symmetry:0.5")
    assert mix.report_higher_is_better
    told = mix.report_of(mix.parts[1][0], images, prompts)
    torch.testing.assert_close(told, Symmetry().report(images))


def test_single_reward_reports_in_its_own_unit():
    reward, images = make_reward("compressibility"), scenes(2)
    assert reward.name == "compressibility"
    assert reward.report_name == "JPEG size (kB, quality 95)"
    assert not reward.report_higher_is_better
    told = reward.report_of(reward.parts[0][0], images, ["", ""])
    torch.testing.assert_close(told, Compressibility().report(images))


def test_naming_rewards_loads_no_torch():
    code = (
        "import sys; from shortft.rewards import parse_reward_spec; parse_reward_spec('paper-mix');"
        "sys.exit('torch' in sys.modules)"
    )
    path = str(Path(shortft.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path})


ENSEMBLE = "symmetry:3+compressibility+incompressibility:0.5~0.7"


def test_an_ensemble_is_the_mean_less_the_spread():
    images = scenes(3).requires_grad_()
    reward = make_reward(f"{ENSEMBLE}:2,symmetry:10")
    assert list(reward.components(images, [])) == [ENSEMBLE, "symmetry"]
    rows = [
        [3 * a, b, 0.5 * c]
        for a, b, c in zip(
            *(make_reward(n)(images, []).tolist() for n in ("symmetry", "compressibility")),
            make_reward("incompressibility")(images, []).tolist(),
            strict=True,
        )
    ]
    for row, score in zip(rows, reward.components(images, [])[ENSEMBLE].tolist(), strict=True):
        assert score == pytest.approx(statistics.mean(row) - 0.7 * statistics.pstdev(row), rel=1e-5)
    assert reward.name == f"{ENSEMBLE}:2,symmetry:10"
    assert parse_reward_spec(reward.name) == [(ENSEMBLE, 2.0), ("symmetry", 10.0)]
    assert not reward.report_of(reward.parts[0][0], images, []).requires_grad


def test_an_ensembles_gradient_equals_finite_differences_and_is_finite_where_all_agree():
    reward, x = make_reward(ENSEMBLE), scenes(1).double().requires_grad_()
    (slope,) = torch.autograd.grad(reward(x, []).sum(), x)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double()
    h = 1e-6
    up, down = (reward(x.detach() + sign * h * direction, []).sum() for sign in (1, -1))
    torch.testing.assert_close(
        (slope * direction).sum(), (up - down) / (2 * h), rtol=1e-4, atol=1e-6
    )

    def same(images: torch.Tensor, prompts: object) -> torch.Tensor:
        return images.mean((1, 2, 3))

    agreed = Conservative("same+same~2", [(same, 1.0), (same, 1.0)], 2.0)
    (slope,) = torch.autograd.grad(agreed(x, []).sum(), x)
    torch.testing.assert_close(slope, torch.full_like(x, 1 / x[0].numel()))


def test_scorers_of_ensembles_are_known():
    assert scorers("clip+pickscore:2~1:3,symmetry") == {"clip", "pickscore", "symmetry"}
    assert anchor_warning("clip+symmetry~1") is None
    assert anchor_warning("symmetry+compressibility~1") is not None
