"""One update of a run against the same update written out: gradient, clipping, optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shortft.config import Config
from shortft.families.base import Conditioning
from shortft.plans import Step
from shortft.seeds import sample_seed
from shortft.step import Batch
from shortft.trainer import Trainer
from tiny import randomise_loras

N = 4
TIMES = [751, 501, 251, 1]
POWER = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2, 0)
SIGNAL = [math.sqrt(POWER[t]) for t in (*TIMES, 0)]
NOISE = [math.sqrt(1 - POWER[t]) for t in (*TIMES, 0)]
COPY = 5
SEED = 2  # both of leapalign's leaps are longer than a step

Predict = Callable[[Tensor, int], Tensor]


def by_prompt(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A reward that looks elsewhere in the picture for each prompt."""
    size = images[0].numel()
    weights = torch.stack([torch.linspace(0, 9 * len(p), size).cos() for p in prompts])
    return (images.flatten(1) * weights.to(images)).sum(1) * 1e4


OWN = f"{Path(__file__)}:{by_prompt.__name__}"


def move(x: Tensor, eps: Tensor, i: int, j: int) -> Tensor:
    """DDIM from point i to point j."""
    return SIGNAL[j] * (x - NOISE[i] * eps) / SIGNAL[i] + NOISE[j] * eps


def leapalign(trainer: Trainer, predict: Predict, batch: Batch) -> tuple[Tensor, Tensor]:
    """Where the reward looks, and the weights of the samples, with alpha 0.5 and tau 1e-4."""
    k, j = [step.start for step in trainer.plan(0, 1).steps if step.trains]
    states = [trainer.family.noise(batch.seeds)]
    with torch.no_grad():
        for i in range(N):
            states.append(move(states[i], predict(states[i], i), i, i + 1))
    leap = move(states[k], predict(states[k], k), k, j)
    x = states[j] + (leap - leap.detach())
    end = move(x, predict(0.5 * x + 0.5 * x.detach(), j), j, N)
    misses = [(leap - states[j]).abs(), (end - states[N]).abs()]
    weights = 1 / sum(miss.detach().mean(dim=(1, 2, 3)).clamp(min=1e-4) for miss in misses)
    assert weights.unique().numel() == len(weights)
    return states[N] + (end - end.detach()), weights


def draft_lv(trainer: Trainer, predict: Predict, batch: Batch) -> tuple[Tensor, Tensor]:
    """The same with two copies of the chain's end, noised anew."""
    x, last = trainer.family.noise(batch.seeds), N - 1
    with torch.no_grad():
        for i in range(last):
            x = move(x, predict(x, i), i, i + 1)
    ends = [move(x, predict(x, last), last, N)]
    for copy in range(2):
        fresh = trainer.family.noise([sample_seed(seed, COPY, copy) for seed in batch.seeds])
        x = SIGNAL[last] * ends[0].detach() + NOISE[last] * fresh
        ends.append(move(x, predict(x, last), last, N))
    return torch.cat(ends), torch.ones(len(batch.seeds) * 3)


CASES = [
    (leapalign, {"alpha": 0.5, "tau": 1e-4}, {"weight_decay": 0.5}),
    (draft_lv, {}, {"weight_decay": 0.0, "guidance_grad": "positive"}),
]


@pytest.mark.parametrize(("method", "options", "change"), CASES, ids=["leapalign", "draft_lv"])
def test_an_update_is_the_one_that_is_written_out(settings, method, options, change):
    """With a batch in two parts, and a reward that depends on the prompt."""
    settings |= {"method": method.__name__, "method_options": options, **change, "reward": OWN}
    settings |= {"num_steps": N, "accumulation": 2, "max_grad_norm": 0.01, "seed": SEED}
    trainer = Trainer(Config(**settings))
    randomise_loras(trainer.nets)
    parameters = list(trainer.nets.parameters_of(1).values())
    trainer.nets.train_only([1])
    module = trainer.nets.module(Step(0, 1, "policy", 1, trains=True))

    def gradient_of(batch: Batch) -> tuple[list[Tensor], Tensor]:
        cond: Conditioning = trainer.family.encode(batch.prompts)

        def predict(x: Tensor, i: int) -> Tensor:
            """Guidance 2, its gradient through both branches or one."""
            positive = module(x, TIMES[i], cond.positive, return_dict=False)[0]
            negative = module(x, TIMES[i], cond.negative, return_dict=False)[0]
            if change.get("guidance_grad") == "positive":
                negative = negative.detach()
            return negative + 2 * (positive - negative)

        latents, weights = method(trainer, predict, batch)
        prompts = [batch.prompts[i % len(batch.prompts)] for i in range(len(latents))]
        scores = by_prompt(trainer.family.decode(latents), prompts)
        gradient = torch.autograd.grad(-(weights * scores).mean(), parameters)
        return list(gradient), scores.detach().mean()

    parts = [gradient_of(batch) for batch in trainer.batches(0)]
    assert len(parts) == 2
    assert len({prompt for batch in trainer.batches(0) for prompt in batch.prompts}) > 1
    expected = [(a + b) / 2 for a, b in zip(*(gradient for gradient, _ in parts), strict=True)]
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in expected))
    before = [parameter.detach().clone() for parameter in parameters]
    _, outcome = trainer.update()
    assert outcome.reward == pytest.approx(float(parts[0][1] + parts[1][1]) / 2, rel=1e-4)
    assert outcome.grad_norm == pytest.approx(norm, rel=1e-3)
    assert norm > 0.02
    assert {g["weight_decay"] for g in trainer.optimizer.param_groups} == {change["weight_decay"]}
    for parameter, old, gradient in zip(parameters, before, expected, strict=True):
        clipped = parameter.grad
        torch.testing.assert_close(clipped, gradient * 0.01 / norm, rtol=1e-2, atol=1e-6)
        # AdamW's first step is as long as the learning rate in every number.
        first = 1e-2 * clipped / (clipped.abs() + 1e-8)
        now = old * (1 - 1e-2 * change["weight_decay"]) - first
        torch.testing.assert_close(parameter.detach(), now, rtol=1e-4, atol=1e-6)
