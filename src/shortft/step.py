"""One training step, from prompts to the updated LoRAs: the page to read first."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shortft.chain import run_chain
from shortft.errors import Torn
from shortft.families.base import Conditioning, Family
from shortft.judge import judge, pull
from shortft.networks import ModelNetworks
from shortft.out_of_memory import ran_out
from shortft.plans import Plan
from shortft.rewards.combine import WeightedSum
from shortft.schedule import Schedule
from shortft.seeds import COPY, sample_seed


@dataclass(frozen=True)
class Batch:
    """Samples of one micro-batch; each depends on its own prompt and seed alone."""

    prompts: list[str]
    seeds: list[int]


@dataclass(frozen=True)
class Outcome:
    """What a step did: mean reward, its parts, and the gradient norm before clipping.

    `drift` is the mean squared difference from predictions without LoRAs, where there is an anchor.
    """

    reward: float
    parts: dict[str, float]
    grad_norm: float
    skipped: bool
    drift: float | None = None


def train_step(
    plan: Plan,
    batches: Sequence[Batch],
    family: Family,
    nets: ModelNetworks,
    schedule: Schedule,
    reward: WeightedSum,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    *,
    inference: Plan,
    max_grad_norm: float,
    recompute: bool,
    anchor: float = 0.0,
    reward_seconds: float | None = None,
    commit: Callable[[], None] = lambda: None,
) -> Outcome:
    """Maximise the mean reward of this process's batches by one optimizer update.

    Args:
        inference: the policy's true chain, run first for plans that need its states.
        anchor: weight of the penalty on the difference from predictions without LoRAs.
        reward_seconds: limit of one call of a reward.
        commit: called just before anything is changed.

    A reward or a gradient that is not finite, on any process, changes nothing on all of them;
    `Outcome.skipped` says so.

    Raises:
        Torn: if the optimizer fails halfway, so that some weights are changed and some are not.
    """
    optimizer.zero_grad(set_to_none=True)
    totals: dict[str, Tensor] = {}
    for batch in batches:
        cond = family.encode(batch.prompts)
        noise = family.noise(batch.seeds)
        rollout = None
        if plan.needs_rollout:
            rollout = states_of(inference, nets, noise, cond, schedule)
        leaps: list[Tensor] = []
        drifts: list[Tensor] = []
        latents = run_chain(
            plan,
            nets,
            noise,
            cond,
            schedule,
            recompute=recompute,
            rollout=rollout,
            fresh_noise=functools.partial(noise_of_copy, family, batch.seeds),
            observe_leap=leaps.append,
            observe_drift=drifts.append if anchor else None,
        )
        images = decode(family, latents, recompute=recompute)  # [0, 1], still differentiable
        prompts = batch.prompts * (1 + plan.renoise)
        # Backward in two parts: a reward's model is done before the chain's backward begins.
        pixels = images.detach().requires_grad_()
        with reward.at_work(pixels.device):
            parts = judge(reward, pixels, prompts, seconds=reward_seconds)
            scores = reward.combine(parts)  # higher is better
            loss = -(scores * leap_weight(leaps, plan.leap_tau)).mean()
            pulls: list[Tensor | None] = [pull(loss / len(batches), pixels, reward.name)]
        ends: list[Tensor] = [images]
        measured = {"reward": scores, **parts}
        if anchor:
            measured["drift"] = torch.stack(drifts)
            ends.append(anchor * measured["drift"].mean() / len(batches))
            pulls.append(None)
        torch.autograd.backward(ends, pulls)
        for name, part in measured.items():
            totals[name] = totals.get(name, 0) + part.detach().float().mean() / len(batches)

    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    average_gradients(trained, accelerator)
    grad_norm = nn.utils.clip_grad_norm_(trained, max_grad_norm)
    means = torch.stack(list(totals.values()))
    means = accelerator.reduce(means, reduction="mean")  # not finite if it is on one process
    finite = bool(grad_norm.isfinite()) and bool(means.isfinite().all())
    commit()
    if finite:
        change(optimizer)
    values = dict(zip(totals, means.tolist(), strict=True))
    drift = values.pop("drift") if anchor else None
    return Outcome(values.pop("reward"), values, float(grad_norm), not finite, drift)


def change(optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's step, which must never be repeated or saved where it failed halfway."""
    try:
        optimizer.step()
        # Folded layers go by autograd's counts of changes, past which bitsandbytes writes.
        for group in optimizer.param_groups:
            changed = [p for p in group["params"] if p.grad is not None]
            torch.autograd.graph.increment_version(changed)
    except (MemoryError, RuntimeError) as error:
        why = "out of memory" if ran_out(error) else f"it failed ({' '.join(str(error).split())})"
        raise Torn(
            f"optimizer: {why} while weights were being changed, so that this update is not kept; "
            "go on by --resume from the last checkpoint; if memory is short with --recompute, or "
            "with --optimizer adamw8bit --allow-change"
        ) from error


def decode(family: Family, latents: Tensor, *, recompute: bool) -> Tensor:
    """(B, 3, H, W) images in [0, 1] of latents (B, C, h, w).

    With recomputation one by one, each decoded once more in the backward pass: the memory of one
    picture.
    """
    if not recompute:
        return family.decode(latents)
    parts = [checkpoint(family.decode, one, use_reentrant=False) for one in latents.split(1)]
    return torch.cat(parts)


def states_of(
    inference: Plan, nets: ModelNetworks, noise: Tensor, cond: Conditioning, schedule: Schedule
) -> Tensor:
    """(N + 1, B, …) states of the policy's true chain, for plans that pin steps to them."""
    states: list[Tensor] = []
    with torch.no_grad():
        run_chain(
            inference,
            nets,
            noise,
            cond,
            schedule,
            observe=lambda _, latents: states.append(latents),
        )
    return torch.stack(states)


def noise_of_copy(family: Family, seeds: Sequence[int], copy: int) -> Tensor:
    """(B, …) noise for a re-noised copy of samples with these seeds."""
    return family.noise([sample_seed(seed, COPY, copy) for seed in seeds])


def leap_weight(leaps: Sequence[Tensor], tau: float | None) -> Tensor | float:
    """(B,) weights of samples by how closely their leaps hit (LeapAlign's trajectory similarity).

    Args:
        leaps: (B,) mean distances from the rollout, one per leap.
        tau: their floor; None weighs all samples alike.
    """
    if tau is None:
        return 1.0
    return 1 / torch.stack([leap.clamp(min=tau) for leap in leaps]).sum(0)


def average_gradients(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Average gradients over processes, in one message.

    The networks are several views on shared parameters, which DistributedDataParallel does not
    know; a plain all-reduce of the gradients gives the same update.
    """
    if accelerator.num_processes == 1:
        return
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([grad.flatten() for grad in grads])
    flat = accelerator.reduce(flat, reduction="mean")
    for parameter, part in zip(parameters, flat.split([g.numel() for g in grads]), strict=True):
        parameter.grad = part.view_as(parameter).clone()
