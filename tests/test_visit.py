"""Reward models that visit the chain's device: only while they score, wherever they are held."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from shortft.config import Config
from shortft.rewards.combine import Conservative, WeightedSum
from shortft.rewards.visit import models_in, visiting
from shortft.trainer import Trainer
from shortft.watch import figures
from test_train import weights_of


class Scorer:
    """A reward with a network, and a second one deeper inside."""

    report_name, report_higher_is_better = "brightness", True

    def __init__(self, name: str) -> None:
        self.name = name
        self.model = nn.Linear(3, 1)
        self.model.register_buffer("shift", torch.ones(1))
        self.tools = SimpleNamespace(heads={0: nn.Linear(1, 1), 1: self.model}, owner=self)
        self.seen: list[str] = []

    def __call__(self, images: Tensor, prompts: object) -> Tensor:
        self.seen.append(next(self.model.parameters()).device.type)
        return images.mean((1, 2, 3))

    def report(self, images: Tensor, prompts: object) -> Tensor:
        return self(images, prompts).detach()


def test_every_network_is_found_once():
    one, two, three = Scorer("a"), Scorer("b"), Scorer("c")
    mixed = WeightedSum([(one, 1.0), (Conservative("b+c", [(two, 1.0), (three, 2.0)], 0.5), 1.0)])
    found = models_in(mixed)
    assert len(found) == len(set(map(id, found))) == 6
    wanted = [m for s in (one, two, three) for m in (s.model, s.tools.heads[0])]
    assert set(map(id, found)) == set(map(id, wanted))


def test_models_come_back_to_the_very_weights_they_left():
    scorer = Scorer("a")
    reward = WeightedSum([(scorer, 1.0)], "cpu", visits=True)
    tensors = [t for m in models_in(reward) for t in (*m.parameters(), *m.buffers())]
    before = [tensor.data_ptr() for tensor in tensors]
    with contextlib.suppress(ZeroDivisionError), visiting(reward, "cpu"):
        for tensor in tensors:  # as if they had been copied to another device
            tensor.data = tensor.data.clone()
        _ = 1 / 0
    assert [tensor.data_ptr() for tensor in tensors] == before
    assert reward.device is None  # pictures stay where they are
    assert WeightedSum([(scorer, 1.0)], "cpu").device == "cpu"


def test_away_from_work_nothing_moves(monkeypatch: pytest.MonkeyPatch):
    visits: list[str] = []

    class Noted:
        def __init__(self, reward: object, device: object) -> None:
            visits.append(str(device))

        def __enter__(self) -> None:
            visits.append("in")

        def __exit__(self, *_: object) -> None:
            visits.append("out")

    monkeypatch.setattr("shortft.rewards.combine.visiting", Noted)
    with WeightedSum([(Scorer("a"), 1.0)]).at_work("cuda"):
        assert visits == []
    with WeightedSum([(Scorer("a"), 1.0)], visits=True).at_work("cuda"):
        assert visits == ["cuda", "in"]
    assert visits[-1] == "out"


@pytest.mark.skipif(torch.cuda.is_available(), reason="its visits go nowhere")
def test_an_update_scores_and_takes_the_gradient_within_the_visit(settings, monkeypatch):
    """And is the same as one whose reward stays; on this machine there is one device."""
    plain = Trainer(Config(**{**settings, "reward": "clip"}))
    away = Trainer(Config(**{**settings, "reward": "clip", "reward_device": "offload"}))
    assert away.reward.visits
    assert not plain.reward.visits
    at_work, judged = [False], []

    class Visit:
        def __init__(self, reward: object, device: object) -> None: ...

        def __enter__(self) -> None:
            at_work[0] = True

        def __exit__(self, *_: object) -> None:
            at_work[0] = False

    model = away.reward.parts[0][0].model
    model.register_forward_hook(lambda *_: judged.append(("forward", at_work[0])))
    monkeypatch.setattr("shortft.rewards.combine.visiting", Visit)
    original = type(model).get_image_features

    def watched(self, *args, **kwargs):
        judged.append(("forward", at_work[0]))
        found = original(self, *args, **kwargs)
        features = found.pooler_output
        if features.requires_grad:
            features.register_hook(lambda _: judged.append(("backward", at_work[0])))
        return found

    monkeypatch.setattr(type(model), "get_image_features", watched)
    away.update()
    assert {what for what, _ in judged} == {"forward", "backward"}
    assert all(inside for _, inside in judged)
    judged.clear()
    figures(away)  # scores the reward, and compares pictures by the same CLIP
    assert judged == [("forward", True)] * 2
    monkeypatch.undo()
    plain.update()
    one, two = weights_of(plain), weights_of(away)
    assert all(torch.equal(one[name], two[name]) for name in one)
