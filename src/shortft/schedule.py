"""Noise schedules as pure tensors, and the one formula that moves along them.

A `Schedule` is the list of points that a sampler visits: N timesteps at which the network is
called, and the end of the chain as point N. With x0 and eps the clean latents and the noise,
every point i satisfies ``latents = alpha[i] * x0 + sigma[i] * eps``; `jump` goes from any point
to any later one. It equals DDIM with eta 0 for epsilon- and v-prediction and the Euler step for
flow matching (where alpha = 1 - sigma).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "flow"]
Coefficient = float | Tensor
Cut = Literal["time", "steps", "span"]


@dataclass(frozen=True)
class Schedule:
    """The points of a sampling chain.

    Attributes:
        timesteps: (N,) float64, descending; what the network is told at points 0 … N-1.
        alpha: (N + 1,) float64, signal coefficient of each point; the last is the chain's end.
        sigma: (N + 1,) float64, noise coefficient of each point.
        prediction_type: what the network predicts.
        train_timesteps: T; the network was trained on timesteps in [0, T).
        shift: by how much flow matching's sigmas are shifted, see `flow_schedule`; 1 = not.
        cut_by: how the chain is cut into segments, see `cut`.
    """

    timesteps: Tensor
    alpha: Tensor
    sigma: Tensor
    prediction_type: PredictionType
    train_timesteps: int = 1000
    shift: float = 1.0
    cut_by: Cut = "time"

    def __post_init__(self) -> None:
        n = len(self.timesteps)
        if n == 0:
            raise ValueError("a schedule needs at least one timestep")
        if self.alpha.shape != (n + 1,) or self.sigma.shape != (n + 1,):
            raise ValueError(
                f"alpha and sigma need {n + 1} entries (one per timestep and the end), got "
                f"{tuple(self.alpha.shape)} and {tuple(self.sigma.shape)}"
            )
        if n > 1 and bool((self.timesteps.diff() >= 0).any()):
            raise ValueError("timesteps must descend")

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)


def alphas_cumprod(
    num_train_timesteps: int = 1000,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    beta_schedule: str = "scaled_linear",
) -> Tensor:
    """(T,) float64 cumulative signal power alpha², as in DDPM and Stable Diffusion.

    Raises:
        ValueError: for a beta schedule other than linear or scaled_linear.
    """
    if beta_schedule == "scaled_linear":
        root = torch.linspace(
            beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64
        )
        betas = root**2
    elif beta_schedule == "linear":
        betas = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)
    else:
        raise ValueError(f"beta_schedule {beta_schedule!r} is unknown; use scaled_linear or linear")
    return torch.cumprod(1 - betas, dim=0)


def ddim_schedule(
    power: Tensor,
    num_steps: int,
    *,
    spacing: str = "leading",
    steps_offset: int = 1,
    set_alpha_to_one: bool = False,
    prediction_type: PredictionType = "epsilon",
) -> Schedule:
    """DDIM's points on a variance-preserving schedule (Song et al. 2021, eta 0).

    Args:
        power: (T,) alpha² of every training timestep, see `alphas_cumprod`.
        num_steps: N, between 1 and T.
        spacing: "leading" (SD1.5), "trailing" (few-step models) or "linspace", as in diffusers.
        steps_offset: added to every timestep in leading spacing.
        set_alpha_to_one: whether the chain ends at alpha = 1 or at the first training alpha.

    Raises:
        ValueError: for a step count or spacing that does not exist.
    """
    total = len(power)
    if not 1 <= num_steps <= total:
        raise ValueError(f"num_steps must lie in [1, {total}], got {num_steps}")
    if spacing == "leading":
        steps = torch.arange(num_steps).flip(0) * (total // num_steps)
        steps += min(steps_offset, total - 1 - int(steps[0]))  # all T steps leave no room for it
    elif spacing == "trailing":
        ratio = total / num_steps
        steps = torch.tensor([round(total - i * ratio) - 1 for i in range(num_steps)])
    elif spacing == "linspace":
        steps = torch.linspace(0, total - 1, num_steps, dtype=torch.float64).round().long().flip(0)
    else:
        raise ValueError(f"spacing {spacing!r} is unknown; use leading, trailing or linspace")
    end = torch.ones(1, dtype=torch.float64) if set_alpha_to_one else power[:1].double()
    visited = torch.cat([power[steps].double(), end])
    return Schedule(
        timesteps=steps.double(),
        alpha=visited.sqrt(),
        sigma=(1 - visited).clamp(min=0).sqrt(),
        prediction_type=prediction_type,
        train_timesteps=total,
    )


def flow_schedule(
    num_steps: int,
    *,
    shift: float = 1.0,
    smallest: float | None = None,
    train_timesteps: int = 1000,
) -> Schedule:
    """Flow matching's points for Euler steps: alpha = 1 - sigma (SD3, FLUX).

    Args:
        num_steps: N ≥ 1.
        shift: resolution shift of SD3 §5.3.2: sigma ↦ shift·sigma / (1 + (shift - 1)·sigma).
        smallest: sigma of the last timestep before the shift; by default the smallest training
            sigma, itself shifted, as in diffusers' FlowMatchEulerDiscreteScheduler.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    if smallest is None:
        smallest = 1 / train_timesteps
        smallest = shift * smallest / (1 + (shift - 1) * smallest)
    sigma = torch.linspace(1.0, smallest, num_steps, dtype=torch.float64)
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    points = torch.cat([sigma, torch.zeros(1, dtype=torch.float64)])
    return Schedule(
        sigma * train_timesteps, 1 - points, points, "flow", train_timesteps, shift, "steps"
    )


def flow_schedule_from_config(
    config: Mapping[str, Any],
    num_steps: int,
    *,
    tokens: int | None = None,
    mu: float | None = None,
    smallest: float | None = None,
) -> Schedule:
    """The schedule of a FlowMatchEulerDiscreteScheduler config.

    Args:
        tokens: image tokens of one sample. Where the config asks for a dynamic shift, mu lies on
            the line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift).
        mu: of a dynamic shift, where the model has another rule for it.
        smallest: as in `flow_schedule`.

    Raises:
        ValueError: for another scheduler or an option that is not supported.
    """
    if "FlowMatchEuler" not in str(config.get("_class_name", "")):
        raise ValueError(f"the scheduler {config.get('_class_name')} is not supported")
    options = ("karras_sigmas", "exponential_sigmas", "beta_sigmas")
    for option in (*(f"use_{o}" for o in options), "shift_terminal", "invert_sigmas"):
        if config.get(option):
            raise ValueError(f"the scheduler's {option} is not supported")
    total = int(config["num_train_timesteps"])
    shift = float(config.get("shift", 1.0))
    if config.get("use_dynamic_shifting"):
        if mu is None:
            mu = _mu(config, tokens)
        shift = math.exp(mu) if config.get("time_shift_type") != "linear" else mu
        smallest = 1 / total if smallest is None else smallest
    return flow_schedule(num_steps, shift=shift, smallest=smallest, train_timesteps=total)


def _mu(config: Mapping[str, Any], tokens: int | None) -> float:
    if tokens is None:
        raise ValueError("the scheduler's use_dynamic_shifting is not supported for this model")
    low, high = int(config["base_image_seq_len"]), int(config["max_image_seq_len"])
    first, last = float(config["base_shift"]), float(config["max_shift"])
    return first + (last - first) * (tokens - low) / (high - low)


def schedule_from_config(config: Mapping[str, Any], num_steps: int) -> Schedule:
    """The schedule of a diffusers scheduler config (DDIM, PNDM, DDPM, Euler… or flow Euler).

    Stable Diffusion repositories ship different scheduler classes with the same noise schedule;
    the chain here is always DDIM on it, which is what their training-free solvers approximate.

    Raises:
        ValueError: for a scheduler or an option that is not supported.
        KeyError: for one without betas.
    """
    if "FlowMatch" in str(config.get("_class_name", "")):
        return flow_schedule_from_config(config, num_steps)
    if config.get("rescale_betas_zero_snr") or config.get("trained_betas") is not None:
        raise ValueError("schedulers with rescaled or custom betas are not supported yet")
    prediction: PredictionType = config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(f"the scheduler's prediction_type {prediction!r} is not supported")
    return ddim_schedule(
        alphas_cumprod(
            int(config["num_train_timesteps"]),
            float(config["beta_start"]),
            float(config["beta_end"]),
            str(config["beta_schedule"]),
        ),
        num_steps,
        spacing=str(config.get("timestep_spacing", "leading")),
        steps_offset=int(config.get("steps_offset", 0)),
        set_alpha_to_one=bool(config.get("set_alpha_to_one", False)),
        prediction_type=prediction,
    )


def to_x0_eps(
    latents: Tensor,
    prediction: Tensor,
    alpha: Coefficient,
    sigma: Coefficient,
    prediction_type: PredictionType,
) -> tuple[Tensor, Tensor]:
    """The clean latents and the noise that a prediction at (alpha, sigma) stands for."""
    if prediction_type == "epsilon":
        return (latents - sigma * prediction) / alpha, prediction
    if prediction_type == "v_prediction":
        return alpha * latents - sigma * prediction, alpha * prediction + sigma * latents
    if prediction_type == "flow":
        return latents - sigma * prediction, latents + alpha * prediction
    raise ValueError(f"prediction_type {prediction_type!r} is unknown")


def x0_at(schedule: Schedule, latents: Tensor, prediction: Tensor, i: int) -> Tensor:
    """The clean latents predicted at point i."""
    alpha, sigma = float(schedule.alpha[i]), float(schedule.sigma[i])
    return to_x0_eps(latents, prediction, alpha, sigma, schedule.prediction_type)[0]


def jump(schedule: Schedule, latents: Tensor, prediction: Tensor, i: int, j: int) -> Tensor:
    """Move latents from point i to point j along the straight line of one prediction."""
    alpha, sigma = float(schedule.alpha[i]), float(schedule.sigma[i])
    x0, eps = to_x0_eps(latents, prediction, alpha, sigma, schedule.prediction_type)
    return float(schedule.alpha[j]) * x0 + float(schedule.sigma[j]) * eps


def jump_to_x0(schedule: Schedule, latents: Tensor, x0: Tensor, i: int, j: int) -> Tensor:
    """`jump` towards given clean latents, with the noise that they leave over."""
    alpha, sigma = float(schedule.alpha[i]), float(schedule.sigma[i])
    eps = (latents - alpha * x0) / sigma
    return float(schedule.alpha[j]) * x0 + float(schedule.sigma[j]) * eps


def cut(
    timesteps: Sequence[float], k: int, by: Cut, total: int = 1000
) -> tuple[tuple[int, ...], ...]:
    """Cut the chain into k parts, each of which starts where a sampler of k steps calls its model.

    Args:
        by: "time": parts of equal training time (ShortFT §3; Hyper-SD §3.1); part i holds the
            timesteps in [T(k-i)/k, T(k-i+1)/k).
            "steps": parts of equal numbers of steps. So FLUX's sampler does it, whose steps are
            equal before a shift.
            "span": the parts' first timesteps span the chain from its first to its last, so that
            the last part is that timestep alone. So diffusers' sampler of SD3 does it.
        total: T.

    Returns:
        k tuples of point indices.

    Raises:
        ValueError: if a part would hold no timestep.
    """
    if k < 1:
        raise ValueError(f"segments must be at least 1, got {k}")
    parts: list[list[int]] = [[] for _ in range(k)]
    for index, timestep in enumerate(timesteps):
        if by == "steps":
            parts[index * k // len(timesteps)].append(index)
        elif by == "span":
            parts[index * (k - 1) // max(1, len(timesteps) - 1)].append(index)
        else:
            # T itself belongs to the first part; fractions on an edge must not depend on the
            # last bit.
            parts[k - 1 - min(int(round(timestep, 3) * k / total), k - 1)].append(index)
    if not all(parts):
        raise ValueError(
            f"{k} segments over {len(timesteps)} steps leave a segment without a timestep; "
            "use fewer segments or more steps"
        )
    return tuple(tuple(part) for part in parts)


def segments(schedule: Schedule, k: int) -> tuple[tuple[int, ...], ...]:
    """`cut` of a schedule's own timesteps."""
    return cut(schedule.timesteps.tolist(), k, schedule.cut_by, schedule.train_timesteps)
