"""The guard trips on a reward that is hacked, and on nothing else."""

from __future__ import annotations

import json

import pytest
import torch

from shortft.config import Config
from shortft.errors import UserError
from shortft.guard import Guard, Look
from shortft.train import train
from shortft.trainer import Trainer
from test_train import weights


def looks(*scores: tuple[float, float | None]) -> list[tuple[bool, bool]]:
    guard = Guard(0.1)
    found = [guard.see(Look(i, reward, held_out)) for i, (reward, held_out) in enumerate(scores)]
    return [(best, alarm is not None) for best, alarm in found]


def test_it_trips_when_the_held_out_scorer_falls_while_the_reward_rises():
    assert looks((1.0, 0.5), (2.0, 0.46), (3.0, 0.44)) == [
        (True, False),
        (True, False),
        (False, True),
    ]


def test_it_is_silent_when_both_fall_both_rise_or_nothing_is_held_out():
    assert looks((1.0, 0.5), (0.5, 0.1)) == [(True, False), (False, False)]
    assert looks((1.0, 0.5), (2.0, 0.6)) == [(True, False), (True, False)]
    assert looks((1.0, None), (2.0, None)) == [(True, False), (True, False)]


def test_negative_scores_may_lose_a_share_of_their_size():
    assert looks((1.0, -0.5), (2.0, -0.54), (2.5, -0.56)) == [
        (True, False),
        (True, False),
        (False, True),
    ]


def test_the_best_is_chosen_by_the_criterion_within_the_limit():
    for by, expected in (("reward", 2), ("held_out", 1)):
        guard = Guard(0.1, by)
        for i, (reward, held_out) in enumerate([(1.0, 0.5), (2.0, 0.6), (3.0, 0.46), (9.0, 0.1)]):
            guard.see(Look(i, reward, held_out))
        assert guard.best is not None
        assert guard.best.update == expected


def test_held_out_as_criterion_needs_a_scorer(settings):
    with pytest.raises(UserError, match=r"--best-by held_out: .* name one by --held-out"):
        Trainer(Config(**settings, best_by="held_out"))


class Falling:
    """A held-out scorer that likes each later evaluation less."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def __call__(self, images: torch.Tensor, prompts: object) -> torch.Tensor:
        return torch.full((len(images),), self.values.pop(0))


def test_a_hacked_run_stops_and_goes_back_to_the_best(settings, monkeypatch):
    config = Config(**{**settings, "sample_every": 2, "guard": "stop"})
    rewards = iter([0.0, 1.0, 2.0, 3.0, 4.0])

    def rising(self, images, prompts):
        return torch.full((len(images),), next(rewards))

    original = Trainer.__init__

    def prepared(self, given):
        original(self, given)
        self.held_out = Falling(1.0, 0.95, 0.92, 0.5)

    monkeypatch.setattr(Trainer, "__init__", prepared)
    monkeypatch.setattr("shortft.rewards.combine.WeightedSum.__call__", rising)
    train(config)
    log = [json.loads(line) for line in (config.output_dir / "metrics.jsonl").open()]
    evaluations = [row for row in log if "eval_reward" in row]
    assert [row["update"] for row in evaluations] == [0, 2, 4, 6]
    assert "being hacked" in evaluations[-1]["guard"]
    assert "eval_contrast" in evaluations[-1]
    assert [row.get("best") for row in evaluations] == [True, True, True, None]
    kept, best = weights(config.output_dir / "adapter"), weights(config.output_dir / "best")
    assert all(torch.equal(kept[name], best[name]) for name in best)
    assert [row["update"] for row in log if "reward" in row][-1] == 6


def test_a_run_that_is_hacked_at_once_goes_back_to_the_start(settings, monkeypatch):
    config = Config(**{**settings, "sample_every": 2, "guard": "stop", "guard_drop": 0.1})
    rewards, original = iter([0.0, 1.0]), Trainer.__init__

    def prepared(self, given):
        original(self, given)
        self.held_out = Falling(1.0, 0.5)

    monkeypatch.setattr(Trainer, "__init__", prepared)
    monkeypatch.setattr(
        "shortft.rewards.combine.WeightedSum.__call__",
        lambda self, images, prompts: torch.full((len(images),), next(rewards)),
    )
    adapter = train(config)
    assert all(not value.any() for name, value in weights(adapter).items() if "lora_B" in name)


def test_warn_goes_on(settings, monkeypatch):
    config = Config(**{**settings, "sample_every": 4, "guard": "warn", "held_out": "symmetry"})
    original = Trainer.__init__

    def prepared(self, given):
        original(self, given)
        self.held_out = Falling(1.0, 0.5, 0.4)

    monkeypatch.setattr(Trainer, "__init__", prepared)
    train(config)
    log = [json.loads(line) for line in (config.output_dir / "metrics.jsonl").open()]
    assert [row["update"] for row in log if "reward" in row][-1] == 8
