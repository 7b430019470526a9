"""The one loop that carries out every plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from shortft.plans import Net, Plan, Step
from shortft.schedule import Schedule, jump, jump_to_x0, x0_at


class Networks(Protocol):
    """What a chain needs from a model: the prediction of a step's network."""

    def predict(
        self, step: Step, latents: Tensor, timestep: float, cond: Any, *, recompute: bool = False
    ) -> Tensor:
        """Prediction with the shape of latents; guidance is the networks' business.

        Args:
            recompute: run again in the backward pass instead of keeping activations.
        """


def run_chain(
    plan: Plan,
    nets: Networks,
    latents: Tensor,
    cond: Any,
    schedule: Schedule,
    *,
    recompute: bool = False,
    rollout: Tensor | None = None,
    fresh_noise: Callable[[int], Tensor] | None = None,
    observe: Callable[[int, Tensor], None] | None = None,
    observe_leap: Callable[[Tensor], None] | None = None,
    observe_drift: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Carry latents along a plan.

    Args:
        latents: (B, …) at point 0, usually noise.
        cond: conditioning, handed to the networks as it is.
        recompute: run every call that carries gradient once more in the backward pass instead
            of keeping its activations; memory is then flat in the number of such calls.
        rollout: (N + 1, B, …) cached states by schedule point, for plans with pinned steps.
        fresh_noise: noise (B, …) of copy 0, 1, …, for plans that re-noise the chain's end.
        observe: called with each point and the latents that reach it, point 0 included.
        observe_leap: called with (B,) the mean distance by which each pinned call misses.
        observe_drift: called with (B,) the mean squared difference between the prediction of each
            call that trains and that of its network without LoRAs (the base, or the shortcut) from
            the same latents, differentiable in both. That network is called once more for each.

    Returns:
        (B, …) where the plan's reward looks: the end of the chain, or the last x0 prediction;
        ((1 + renoise)·B, …) with re-noised copies, copy by copy.

    Raises:
        ValueError: if the plan pins a step and no rollout is given, or re-noises without noise.
    """
    if plan.needs_rollout and rollout is None:
        raise ValueError("this plan pins steps to a cached rollout; pass rollout=")
    if plan.renoise and fresh_noise is None:
        raise ValueError("this plan re-noises the chain's end; pass fresh_noise=")

    def call(x: Tensor, step: Step, *, again: bool) -> Tensor:
        timestep = float(schedule.timesteps[step.start])
        return nets.predict(step, x, timestep, cond, recompute=again)

    def predict(x: Tensor, step: Step, builds_graph: bool) -> Tensor:
        seen = scale_grad(x, step.input_grad)
        if step.net == "cached":
            return torch.zeros_like(x)  # its value is not used, and the jump is affine in it
        if not builds_graph:
            with torch.no_grad():
                return call(seen, step, again=False)
        prediction = call(seen, step, again=recompute)
        if observe_drift and step.trains:
            net: Net = "shortcut" if step.net == "shortcut" else "base"
            frozen = replace(step, net=net, adapters=0, trains=False)
            untuned = call(seen, frozen, again=recompute)
            observe_drift((prediction - untuned).square().flatten(1).mean(1))
        return scale_grad(prediction, step.gain)

    previous = latents, latents, 0  # of the call before: its input, its prediction, its point
    if observe:
        observe(0, latents)
    for step, builds_graph in zip(plan.steps, plan.grad_mask, strict=True):
        prediction = predict(latents, step, builds_graph)
        if step is plan.steps[-1] and plan.reward_at == "x0":
            return x0_at(schedule, latents, prediction, step.start)
        if step.extrapolate:
            x0 = x0_at(schedule, latents, prediction, step.start)
            before = x0_at(schedule, *previous)
            better = x0 + step.extrapolate * (x0 - before)
            previous = latents, prediction, step.start
            latents = jump_to_x0(schedule, latents, better, step.start, step.stop)
        else:
            previous = latents, prediction, step.start
            latents = jump(schedule, latents, prediction, step.start, step.stop)
        if step.pin and rollout is not None:
            if observe_leap and step.net != "cached":
                missed = (latents - rollout[step.stop]).detach().abs()
                observe_leap(missed.flatten(1).mean(1))
            latents = rollout[step.stop] + (latents - latents.detach())
        if observe:
            observe(step.stop, latents)

    ends = [latents]
    for copy in range(plan.renoise):
        assert fresh_noise is not None
        last = plan.steps[-1]
        alpha, sigma = float(schedule.alpha[last.start]), float(schedule.sigma[last.start])
        noisy = alpha * latents.detach() + sigma * fresh_noise(copy)
        prediction = predict(noisy, last, plan.grad_mask[-1])
        ends.append(jump(schedule, noisy, prediction, last.start, last.stop))
    return torch.cat(ends) if len(ends) > 1 else latents


def scale_grad(x: Tensor, factor: float) -> Tensor:
    """x itself, with its gradient multiplied by a factor."""
    if factor == 1 or not x.requires_grad:
        return x
    return factor * x + (1 - factor) * x.detach() if factor else x.detach()
