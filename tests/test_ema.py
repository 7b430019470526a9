"""The moving average of the weights: its formula, what uses it, and exact resuming."""

from __future__ import annotations

import signal

import pytest
import torch
from torch import nn

from shortft.checkpoint import load_latest
from shortft.config import Config
from shortft.ema import Average
from shortft.errors import Stopped
from shortft.kept import restore, write_adapter
from shortft.train import train
from shortft.trainer import Trainer
from test_train import weights, weights_of


def test_the_average_by_hand():
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    average = Average({1: {"w": weight}}, 0.9)
    expected = weight.detach().clone()
    for count, value in enumerate((3.0, 5.0, 7.0), start=1):
        weight.data.fill_(value)
        average.update(count)
        keep = min(0.9, (1 + count) / (10 + count))
        expected = keep * expected + (1 - keep) * value
    torch.testing.assert_close(average.weights[1]["w"], expected)
    with average.in_place():
        torch.testing.assert_close(weight.data, expected)
    assert weight.tolist() == [7.0, 7.0]


def test_without_decay_nothing_is_kept():
    assert Average({1: {"w": nn.Parameter(torch.ones(2))}}, 0).state() == {}


def test_adapter_and_pictures_are_the_averages_and_training_is_not(settings):
    plain, averaged = Trainer(Config(**settings)), Trainer(Config(**{**settings, "ema": 0.9}))
    for trainer in (plain, averaged):
        for _ in range(3):
            trainer.update()
    one, two = weights_of(plain), weights_of(averaged)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(plain.pictures()[1], averaged.pictures()[1])
    saved, own = weights(write_adapter(averaged)), averaged.average.weights
    assert len(own) == averaged.nets.loras
    for number, average in own.items():
        of_one = [saved[key] for key in saved if key.startswith(f"lora_{number}/")]
        for value in average.values():
            assert any(torch.equal(value.cpu(), written) for written in of_one)
    assert weights_of(averaged).keys() == two.keys()
    assert all(torch.equal(two[name], value) for name, value in weights_of(averaged).items())


def test_stopped_while_the_average_is_in_use_the_run_ends_as_the_uninterrupted_one(
    settings, tmp_path, monkeypatch: pytest.MonkeyPatch
):
    whole, parts = (
        Config(**{**settings, "ema": 0.9, "output_dir": tmp_path / name})
        for name in ("whole", "parts")
    )
    train(whole)
    fill, calls = Average._fill, [0]

    def cut_short(self, values):
        """A signal's exception may leave the weights half way between the two."""
        calls[0] += 1
        if calls[0] == 4:  # putting back after the second pictures
            next(iter(self.loras[1].values())).data.zero_()
            raise Stopped(signal.SIGTERM)
        fill(self, values)

    with monkeypatch.context() as patch:
        patch.setattr(Average, "_fill", cut_short)
        with pytest.raises(Stopped):
            train(parts)
    train(parts, resume=True)
    for place in ("adapter", "checkpoints/update-000008"):
        files = sorted((whole.output_dir / place).glob("*.safetensors"))
        assert len(files) in (4, 16)  # LoRAs; and their moments, averages, best
        for file in files:
            assert file.read_bytes() == (parts.output_dir / place / file.name).read_bytes()


def test_an_average_may_be_asked_for_later(settings):
    config = Config(**{**settings, "updates": 2})
    train(config)
    later = config.model_copy(update={"ema": 0.5, "updates": 3})
    saved, _ = load_latest(config.output_dir / "checkpoints")
    trainer = Trainer(later)
    restore(trainer, saved, allow_change=True)
    for number, average in trainer.average.weights.items():  # from the weights as they are then
        assert any(value.any() for name, value in average.items() if "lora_B" in name)
        for name, parameter in trainer.nets.parameters_of(number).items():
            assert torch.equal(average[name], parameter)
    train(later, resume=True, allow_change=True)
    assert list(config.output_dir.glob("checkpoints/update-000003/ema_*.safetensors"))
