"""Plans: every method is data, a list of network calls that `chain.run_chain` carries out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from shortft.schedule import Schedule, segments

Net = Literal["base", "shortcut", "policy", "cached"]
Placement = Literal["stacked", "shared", "segments", "everywhere", "few_step"]


@dataclass(frozen=True)
class Step:
    """One network call and the jump that follows it.

    Attributes:
        start: schedule point at which the network is called.
        stop: schedule point to which its prediction leads; larger than start.
        net: which network is called. "cached" calls none: it takes the rollout's value at `stop`,
            and gradient passes along the straight path only.
        adapters: how many stacked reward LoRAs are active: on the base ("policy"), or on the
            shortcut.
        trains: whether the LoRA parameters receive gradient from this call.
        input_grad: how much gradient passes through the network's input: 1 all, 0 detached.
            The straight path around the network always carries it.
        pin: after the jump take the cached rollout's value, keep the gradient.
        gain: factor on the gradient that the network's prediction receives; its value stays.
        extrapolate: weight e of a multistep correction, x0 + e·(x0 - x0 of the call before):
            1/(2r) makes the jump DPM-Solver++(2M)'s, r the ratio of the two jumps' log-SNR.
    """

    start: int
    stop: int
    net: Net
    adapters: int = 0
    trains: bool = False
    input_grad: float = 1.0
    pin: bool = False
    gain: float = 1.0
    extrapolate: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"a step goes forward, got {self.start} → {self.stop}")
        if (self.net == "policy" and not self.adapters) or (
            self.net in ("base", "cached") and self.adapters
        ):
            raise ValueError(f"the policy has adapters, base and cached have none, got {self}")
        if self.trains and not self.adapters:
            raise ValueError(f"only adapters train, got {self}")
        if self.net == "cached" and not self.pin:
            raise ValueError(f"a cached step takes the rollout's value: pin it, got {self}")


@dataclass(frozen=True)
class Plan:
    """A chain of steps.

    Attributes:
        steps: connected steps; the first starts at point 0.
        trainable: numbers (from 1) of the LoRAs that this plan trains.
        reward_at: where the reward looks: the end of the chain, or the x0 prediction of the
            last step.
        renoise: the last step is run on this many re-noised copies of the chain's end too, and
            the reward looks at all ends (DRaFT-LV).
        leap_tau: weigh each sample by 1 / sum(max(tau, mean |leap - rollout|)) over the pinned
            calls (LeapAlign's trajectory similarity); None weighs all alike.
    """

    steps: tuple[Step, ...]
    trainable: tuple[int, ...] = ()
    reward_at: Literal["end", "x0"] = "end"
    renoise: int = 0
    leap_tau: float | None = None

    def __post_init__(self) -> None:
        if not self.steps or self.steps[0].start != 0:
            raise ValueError("a plan starts at point 0")
        if self.steps[0].extrapolate:
            raise ValueError("the first step has no call before it to extrapolate from")
        for before, after in zip(self.steps, self.steps[1:], strict=False):
            if before.stop != after.start:
                raise ValueError(f"a plan is connected, got {before} followed by {after}")

    @cached_property
    def grad_mask(self) -> tuple[bool, ...]:
        """For each step: does its network call build a graph?"""
        pairs = zip(self.steps, self.input_mask, strict=True)
        return tuple(step.trains or through_input for step, through_input in pairs)

    @cached_property
    def input_mask(self) -> tuple[bool, ...]:
        """For each step: does gradient pass through its network call to earlier ones?"""
        mask, carried = [], False
        for step in self.steps:
            mask.append(carried and step.input_grad != 0 and step.net != "cached")
            carried = carried or step.trains
        return tuple(mask)

    @property
    def calls(self) -> int:
        """Network calls per sample (guidance counted once; a rollout comes on top)."""
        return sum(step.net != "cached" for step in self.steps) + self.renoise

    @property
    def grad_calls(self) -> int:
        """Network calls per sample that gradient flows through."""
        return sum(self.grad_mask) + self.renoise * self.grad_mask[-1]

    @property
    def needs_rollout(self) -> bool:
        """Whether the states of the whole inference chain are needed first, without gradient."""
        return any(step.pin for step in self.steps)


def adapters_at(
    parts: Sequence[Sequence[int]], placement: Placement = "stacked"
) -> tuple[int, ...]:
    """How many stacked LoRAs are active at each point of the segments at inference.

    stacked: ShortFT's; at the last timestep of segment i LoRAs 1…i, in the first segment LoRA 1
    at every timestep, elsewhere none. shared: one LoRA at the same places (the paper's ablation
    "w/o T-LoRA"). segments: LoRAs 1…i at every timestep of segment i. everywhere: one LoRA at
    every timestep, as in ordinary fine-tuning. few_step: one LoRA at every timestep of the
    few-step model.

    Returns:
        N counts, one per timestep.
    """
    if placement in ("everywhere", "few_step"):
        return (1,) * sum(map(len, parts))
    counts = [0] * sum(map(len, parts))
    for number, part in enumerate(parts, start=1):
        active = 1 if placement == "shared" else number
        for index in part if number == 1 or placement == "segments" else part[-1:]:
            counts[index] = active
    return tuple(counts)


def parts_for(placement: Placement, k: int) -> int:
    """Segments that a chain must have at inference: one where a LoRA acts everywhere, else k."""
    return 1 if placement == "everywhere" else k


def inference_plan(schedule: Schedule, k: int, placement: Placement = "stacked") -> Plan:
    """The true chain with the LoRAs switched on at their timesteps, without gradient.

    For "few_step" the few-step model's own: one jump per segment, with its LoRA at each.
    """
    parts = segments(schedule, k)
    if placement == "few_step":
        starts = [part[0] for part in parts]
        stops = [*starts[1:], schedule.num_steps]
        pairs = zip(starts, stops, strict=True)
        return Plan(tuple(Step(i, j, "shortcut", adapters=1) for i, j in pairs))
    counts = adapters_at(parts, placement)
    return Plan(
        tuple(
            Step(i, i + 1, "policy" if count else "base", adapters=count)
            for i, count in enumerate(counts)
        )
    )


def base_plan(schedule: Schedule) -> Plan:
    """The frozen model's own chain."""
    return Plan(tuple(Step(i, i + 1, "base") for i in range(schedule.num_steps)))


def stage_bounds(shares: Sequence[float] | None, stages: int) -> list[float]:
    """Shares of the budget at which each stage ends; equal ones where none are given."""
    if shares is None or stages == 1:
        shares = (1 / stages,) * stages
    total, bounds = 0.0, []
    for share in shares:
        total += share
        bounds.append(round(total / sum(shares), 9))  # 0.1 + 0.2 is no more than 0.3
    return bounds
