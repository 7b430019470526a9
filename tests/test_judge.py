"""Every way in which somebody's reward can fail is named, with the remedy."""

from __future__ import annotations

import signal
import time

import pytest
import torch
from torch import Tensor

from shortft.errors import UserError
from shortft.judge import judge, pull, time_limit
from shortft.rewards.combine import Conservative, WeightedSum


class Odd:
    """A reward that does what it is told."""

    name, report_name, report_higher_is_better = "odd", "odd", True

    def __init__(self, does):
        self.does = does

    def __call__(self, images: Tensor, prompts) -> Tensor:
        return self.does(images)

    report = __call__


IMAGES = torch.rand(3, 3, 4, 4, requires_grad=True)


@pytest.mark.parametrize(
    ("does", "message"),
    [
        (lambda x: 1 / 0, "--reward odd: raised ZeroDivisionError: division by zero"),
        (lambda x: x.mean(), r"--reward odd: returned \(\); return one score per picture"),
        (lambda x: x.mean((1, 2)), r"returned \(3, 4\)"),
        (lambda x: [1.0, 2.0, 3.0], "returned list"),
        (lambda x: x.detach().mean((1, 2, 3)), "carry no gradient"),
        (lambda x: time.sleep(5), "took longer than 0.1 s; raise --reward-seconds"),
    ],
)
def test_each_failure_is_named(does, message: str):
    with pytest.raises(UserError, match=message):
        judge(WeightedSum([(Odd(does), 1.0)]), IMAGES, ["a"] * 3, seconds=0.1)


def test_a_good_reward_passes_and_pictures_without_gradient_need_none():
    reward = WeightedSum([(Odd(lambda x: x.mean((1, 2, 3))), 1.0)])
    assert judge(reward, IMAGES, ["a"] * 3, seconds=1)["odd"].requires_grad
    assert judge(reward, IMAGES.detach(), ["a"] * 3, seconds=None)["odd"].shape == (3,)


def test_errors_that_are_told_already_and_memory_pass_through():
    def told(x: Tensor) -> Tensor:
        raise UserError("told")

    def full(x: Tensor) -> Tensor:
        raise MemoryError

    with pytest.raises(UserError, match="told"):
        judge(WeightedSum([(Odd(told), 1.0)]), IMAGES, ["a"] * 3, seconds=1)

    def full_cpu(x: Tensor) -> Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(MemoryError):
        judge(WeightedSum([(Odd(full), 1.0)]), IMAGES, ["a"] * 3, seconds=1)
    with pytest.raises(RuntimeError, match="allocate"):
        judge(WeightedSum([(Odd(full_cpu), 1.0)]), IMAGES, ["a"] * 3, seconds=1)


def test_a_backward_pass_that_fails_is_named():
    def torn(x: Tensor) -> Tensor:
        y = x.sigmoid()
        y[:, 0] += 0.1  # sigmoid's gradient needs what it returned
        return y.mean((1, 2, 3))

    reward = WeightedSum([(Odd(torn), 1.0)])
    loss = reward.combine(judge(reward, IMAGES, ["a"] * 3, seconds=1)).mean()
    with pytest.raises(UserError, match="--reward odd: its backward pass raised RuntimeError: one"):
        pull(loss, IMAGES, reward.name)


def test_only_the_pixels_get_gradient():
    weight = torch.ones((), requires_grad=True)
    gradient = pull((weight * IMAGES).sum(), IMAGES, "odd")
    torch.testing.assert_close(gradient, torch.ones_like(IMAGES))
    assert weight.grad is None
    assert IMAGES.grad is None


def test_a_reward_that_works_in_place_is_alone_with_its_pictures():
    def in_place(x: Tensor) -> Tensor:
        return x.sub_(0.5).mul_(2).mean((1, 2, 3))

    other = Odd(lambda x: x.mean((1, 2, 3)))
    other.name = "other"
    images, before = IMAGES.detach().clone(), IMAGES.detach().clone()
    ensemble = Conservative("both", [(Odd(in_place), 1.0), (other, 1.0)], 0.0)
    mix = WeightedSum([(Odd(in_place), 1.0), (ensemble, 1.0), (other, 1.0)])
    scores = judge(mix, images, ["a"] * 3, seconds=1)
    mean = before.mean((1, 2, 3))
    torch.testing.assert_close(scores["other"], mean)
    torch.testing.assert_close(scores["both"], (2 * mean - 1 + mean) / 2)
    torch.testing.assert_close(mix.report_of(other, images, ["a"] * 3), mean)
    assert torch.equal(images, before)


def test_somebody_elses_alarm_goes_on():
    signal.setitimer(signal.ITIMER_REAL, 60)
    try:
        with time_limit(5, "--reward x"):
            pass
        assert 50 < signal.getitimer(signal.ITIMER_REAL)[0] <= 60
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
