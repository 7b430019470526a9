"""The anchor to the base: its value by hand, its gradient, and what it does to a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shortft.chain import run_chain
from shortft.config import Config
from shortft.families.base import Guidance
from shortft.methods.shortft import shortft_plan
from shortft.plans import Plan
from shortft.train import train
from shortft.trainer import Trainer
from test_chain import FixedPrefix, K, Rig


def drifts_of(rig: Rig, plan: Plan, nets=None, **options) -> Tensor:
    """(calls that train, B)."""
    drifts: list[Tensor] = []
    options["observe_drift"] = drifts.append
    run_chain(plan, nets or rig.nets, rig.noise, rig.cond, rig.schedule, **options)
    return torch.stack(drifts)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path, Guidance(3.0))


def test_it_is_the_difference_of_predictions_from_the_same_latents(rig: Rig):
    plan = shortft_plan(rig.schedule, K, 2)
    states: dict[int, Tensor] = {}
    observed = drifts_of(rig, plan, observe=lambda point, x: states.update({point: x}))
    trained = [step for step in plan.steps if step.trains]
    assert len(observed) == len(trained) == 3
    for step, drift in zip(trained, observed, strict=True):
        x, timestep = states[step.start], float(rig.schedule.timesteps[step.start])
        base = replace(step, net="base", adapters=0, trains=False)
        policy, frozen = (rig.nets.predict(s, x, timestep, rig.cond) for s in (step, base))
        torch.testing.assert_close(drift, ((policy - frozen) ** 2).mean(dim=(1, 2, 3)))
        assert float(drift.min()) > 0


@pytest.mark.parametrize("method", ["jumps", "shortft", "tune_shortcut", "thinned"])
def test_new_loras_have_not_drifted_whatever_network_they_are_on(settings, method: str):
    shortcut = "plain" if method != "thinned" else "none"  # unguided: not the base's prediction
    config = Config(**{**settings, "method": method, "shortcut": shortcut, "anchor": 1.0})
    first, second = (Trainer(config).update()[1], Trainer(config))
    assert first.drift == 0
    second.update()
    assert second.update()[1].drift > 0


@pytest.mark.parametrize("stage", [1, 4])
def test_its_gradient_equals_finite_differences(rig: Rig, stage: int):
    plan = shortft_plan(rig.schedule, K, stage)
    rig.nets.train_only(plan.trainable)
    parameters = [p for n in plan.trainable for p in rig.nets.parameters_of(n).values()]
    plain, again = (
        torch.autograd.grad(drifts_of(rig, plan, recompute=r).sum(), parameters)
        for r in (False, True)
    )
    for a, b in zip(plain, again, strict=True):  # branches in one batch, or one after the other
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    nets = FixedPrefix(rig, plan)
    drifts_of(rig, plan, nets)
    generator, h = torch.Generator().manual_seed(stage), 1e-5
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    slope = sum((g * d).sum() for g, d in zip(plain, direction, strict=True))
    values = []
    for sign in (1, -2):
        for parameter, d in zip(parameters, direction, strict=True):
            parameter.data.add_(d, alpha=sign * h)
        with torch.no_grad():
            values.append(drifts_of(rig, plan, nets).sum())
    torch.testing.assert_close(slope, (values[0] - values[1]) / (2 * h), rtol=1e-5, atol=1e-7)


def test_the_step_adds_it_to_the_loss_however_the_batch_is_split(settings):
    """The gradient norm before clipping, over two updates, is that of reward and anchor."""
    found = {}
    for anchor, splits in ((0.0, 1), (100.0, 1), (100.0, 4)):
        config = {**settings, "anchor": anchor, "accumulation": splits}
        trainer = Trainer(Config(**config))
        found[anchor, splits] = [trainer.update()[1] for _ in range(2)]
    plain, whole, split = found.values()
    assert plain[0].drift is None
    assert whole[0].drift == 0  # LoRAs start at the identity
    assert whole[0].grad_norm == pytest.approx(plain[0].grad_norm, rel=1e-4)
    assert whole[1].drift > 0
    assert whole[1].grad_norm != pytest.approx(plain[1].grad_norm, rel=1e-2)
    for a, b in zip(whole, split, strict=True):
        assert (b.drift, b.grad_norm) == pytest.approx((a.drift, a.grad_norm), rel=1e-3)


def test_a_heavier_anchor_keeps_the_policy_nearer_to_the_base(settings, tmp_path: Path):
    last = []
    for weight in (1e-6, 1e4):
        out = tmp_path / str(weight)
        train(Config(**{**settings, "anchor": weight, "sample_every": 0, "output_dir": out}))
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert all("drift" in row and "drift" not in row["parts"] for row in rows)
        last.append(rows[1]["drift"])
        last.append(rows[-1]["drift"])
    assert last[3] < last[1] / 2
