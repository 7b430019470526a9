"""Base against tuned: the same noise, and every picture against its own prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from shortft import evaluate as evaluation
from shortft.evaluate import evaluate
from shortft.rewards import make_reward
from shortft.rewards.base import Reward
from test_adapter import make_adapter
from test_step import OWN, by_prompt
from tiny import tiny_family

PROMPTS = ["red apple", "rocket", "panda face"]


def test_an_adapter_without_strength_is_the_base_and_scores_are_of_their_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Pictures are made and scored four at a time, so that a batch ends inside a prompt."""
    make_adapter(tmp_path)
    monkeypatch.setattr(evaluation, "scored_at_once", lambda images: 4)
    options = {"seeds": 2, "num_steps": 4, "batch_size": 4}
    family, reward = tiny_family(), make_reward(OWN, visits=True)
    entered = []

    @contextmanager
    def at_work(device: torch.device) -> Iterator[None]:
        entered.append(device)
        yield
        assert entered.pop() == device

    def score(part: Reward, *args: object) -> torch.Tensor:
        assert entered == [family.device]  # what visits is there while it scores
        return part(*args)

    monkeypatch.setattr(reward, "at_work", at_work)
    monkeypatch.setattr(reward, "score", score)
    figures, pictures = evaluate(family, tmp_path, reward, PROMPTS, strength=0.0, **options)
    assert torch.equal(pictures.after, pictures.before)
    assert len({picture.numpy().tobytes() for picture in pictures.before}) == 6
    assert pictures.prompts == [prompt for prompt in PROMPTS for _ in range(2)]
    expected = by_prompt(pictures.before, pictures.prompts)
    torch.testing.assert_close(pictures.scores_before, expected)
    torch.testing.assert_close(pictures.scores_after, expected)
    told = figures["reward"]
    assert told["before"] == told["after"] == pytest.approx(float(expected.mean()), rel=1e-4)
    assert told["change_interval"] == (0, 0)
