"""Metrics against brute force and against cases whose answer is known."""

import itertools

import pytest
import torch

from shortft.metrics import (
    bootstrap_interval,
    collapse_warnings,
    diversity,
    picture_statistics,
)


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def means(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(2).mean(-1) - 0.4  # a tiny embedder: (B, 3)


def test_diversity_is_the_mean_over_pairs_of_each_prompt():
    images, prompts = pictures(7), ["b", "a", "b", "b", "a", "b", "a"]
    features = means(images)
    expected = []
    for prompt in ("b", "a"):
        rows = [row for row, name in enumerate(prompts) if name == prompt]
        pairs = [
            1 - torch.cosine_similarity(features[i], features[j], dim=0)
            for i, j in itertools.combinations(rows, 2)
        ]
        expected.append(torch.stack(pairs).mean())
    found = diversity(images, means, prompts)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-6)


def test_equal_pictures_have_no_diversity():
    same = pictures(1).expand(4, -1, -1, -1)
    torch.testing.assert_close(diversity(same, means), torch.zeros(1), rtol=0, atol=1e-6)


def test_diversity_needs_two_pictures_of_each_prompt():
    with pytest.raises(ValueError, match="two or more pictures of 'b'"):
        diversity(pictures(3), means, ["a", "a", "b"])
    with pytest.raises(ValueError, match="3 pictures but 2 prompts"):
        diversity(pictures(3), means, ["a", "a"])


def test_statistics_of_known_pictures():
    half = torch.zeros(3, 8, 8)
    half[:, :, 4:] = 1
    red = torch.tensor([1.0, 0, 0]).view(3, 1, 1).expand(3, 8, 8)
    found = picture_statistics(torch.stack([half, torch.ones(3, 8, 8), red]))
    torch.testing.assert_close(found.luminance, torch.tensor([0.5, 1.0, 0.299]))
    torch.testing.assert_close(found.contrast, torch.tensor([0.5, 0, 0]), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.roughness, torch.tensor([1 / 14, 0, 0]))
    torch.testing.assert_close(found.black, torch.tensor([0.5, 0, 0]))
    torch.testing.assert_close(found.white, torch.tensor([0.5, 1, 0]))
    torch.testing.assert_close(found.blank, torch.tensor([0.0, 1, 1]))


def test_collapse_is_noticed():
    soft = torch.nn.functional.interpolate(pictures(4), scale_factor=8, mode="bicubic").clamp(0, 1)
    assert collapse_warnings(soft, soft) == []
    assert collapse_warnings(soft, (soft * 1.05).clamp(0, 1)) == []
    blank = " ".join(collapse_warnings(soft, torch.ones_like(soft)))
    assert "blank pictures went from 0.00 to 1.00" in blank
    assert "contrast" in blank
    assert "brightness" in blank
    noise = torch.rand(soft.shape, generator=torch.Generator().manual_seed(1))
    assert "roughness" in " ".join(collapse_warnings(soft, noise))
    assert "brightness" in " ".join(collapse_warnings(soft, soft * 0.1))


def test_bootstrap_interval_is_the_normal_one_for_many_values():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)) + 3
    mean, low, high = bootstrap_interval(values, torch.Generator().manual_seed(1))
    half = 1.96 * float(values.std()) / 20
    assert mean == pytest.approx(float(values.double().mean()))
    assert low == pytest.approx(mean - half, abs=0.1 * half)
    assert high == pytest.approx(mean + half, abs=0.1 * half)
    narrow = bootstrap_interval(values, torch.Generator().manual_seed(1), level=0.5)
    assert low < narrow.low < mean < narrow.high < high


def test_bootstrap_draws_only_from_its_generator():
    values, state = torch.arange(5.0), torch.random.get_rng_state()
    first = bootstrap_interval(values, torch.Generator().manual_seed(1))
    assert bootstrap_interval(values, torch.Generator().manual_seed(1)) == first
    assert torch.equal(torch.random.get_rng_state(), state)


def test_bootstrap_refuses_what_has_no_mean():
    for values in (torch.empty(0), torch.tensor([1.0, float("nan")])):
        with pytest.raises(ValueError, match="finite values"):
            bootstrap_interval(values, torch.Generator())
    assert bootstrap_interval(torch.tensor([2.0]), torch.Generator()) == (2.0, 2.0, 2.0)
