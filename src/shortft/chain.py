"""The one loop that carries out every plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from shortft.plans import Plan, Step
from shortft.schedule import Schedule, jump, x0_at


class Networks(Protocol):
    """What a chain needs from a model: the prediction of a step's network."""

    def predict(self, step: Step, latents: Tensor, timestep: float, cond: Any) -> Tensor:
        """Prediction with the shape of latents; guidance is the networks' business."""


def run_chain(
    plan: Plan,
    nets: Networks,
    latents: Tensor,
    cond: Any,
    schedule: Schedule,
    *,
    recompute: bool = False,
    rollout: Tensor | None = None,
    observe: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Carry latents along a plan.

    Args:
        latents: (B, …) at point 0, usually noise.
        cond: conditioning, handed to the networks as it is.
        recompute: run every call that carries gradient once more in the backward pass instead
            of keeping its activations; memory is then flat in the number of such calls.
        rollout: (N + 1, B, …) cached states by schedule point, for plans with pinned steps.
        observe: called with each point and the latents that reach it, point 0 included.

    Returns:
        (B, …) where the plan's reward looks: the end of the chain, or the last x0 prediction.

    Raises:
        ValueError: if the plan pins a step and no rollout is given.
    """
    if plan.needs_rollout and rollout is None:
        raise ValueError("this plan pins steps to a cached rollout; pass rollout=")

    if observe:
        observe(0, latents)
    for step, builds_graph in zip(plan.steps, plan.grad_mask, strict=True):
        timestep = float(schedule.timesteps[step.start])

        def call(x: Tensor, step: Step = step, timestep: float = timestep) -> Tensor:
            return nets.predict(step, x, timestep, cond)

        seen = scale_grad(latents, step.input_grad)
        if not builds_graph:
            with torch.no_grad():
                prediction = call(seen)
        elif recompute:
            prediction = checkpoint(call, seen, use_reentrant=False, preserve_rng_state=False)
        else:
            prediction = call(seen)

        if step is plan.steps[-1] and plan.reward_at == "x0":
            return x0_at(schedule, latents, prediction, step.start)
        latents = jump(schedule, latents, prediction, step.start, step.stop)
        if step.pin and rollout is not None:
            latents = rollout[step.stop] + (latents - latents.detach())
        if observe:
            observe(step.stop, latents)
    return latents


def scale_grad(x: Tensor, factor: float) -> Tensor:
    """x itself, with its gradient multiplied by a factor."""
    if factor == 1 or not x.requires_grad:
        return x
    return factor * x + (1 - factor) * x.detach() if factor else x.detach()
