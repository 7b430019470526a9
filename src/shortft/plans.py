"""Plans: every method is data, a list of network calls that `chain.run_chain` carries out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from shortft.schedule import Schedule, segments

Net = Literal["base", "shortcut", "policy"]


@dataclass(frozen=True)
class Step:
    """One network call and the jump that follows it.

    Attributes:
        start: schedule point at which the network is called.
        stop: schedule point to which its prediction leads; larger than start.
        net: which network is called.
        adapters: how many stacked reward LoRAs are active; for "policy" only.
        trains: whether the LoRA parameters receive gradient from this call.
        input_grad: how much gradient passes through the network's input: 1 all, 0 detached.
            The straight path around the network always carries it.
        pin: after the jump take the cached rollout's value, keep the gradient.
    """

    start: int
    stop: int
    net: Net
    adapters: int = 0
    trains: bool = False
    input_grad: float = 1.0
    pin: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"a step goes forward, got {self.start} → {self.stop}")
        if (self.net == "policy") != (self.adapters > 0):
            raise ValueError(f"the policy and only it has adapters, got {self}")
        if self.trains and self.net != "policy":
            raise ValueError(f"only the policy trains, got {self}")


@dataclass(frozen=True)
class Plan:
    """A chain of steps.

    Attributes:
        steps: connected steps; the first starts at point 0.
        trainable: numbers (from 1) of the LoRAs that this plan trains.
        reward_at: where the reward looks: the end of the chain, or the x0 prediction of the
            last step.
    """

    steps: tuple[Step, ...]
    trainable: tuple[int, ...] = ()
    reward_at: Literal["end", "x0"] = "end"

    def __post_init__(self) -> None:
        if not self.steps or self.steps[0].start != 0:
            raise ValueError("a plan starts at point 0")
        for before, after in zip(self.steps, self.steps[1:], strict=False):
            if before.stop != after.start:
                raise ValueError(f"a plan is connected, got {before} followed by {after}")

    @cached_property
    def grad_mask(self) -> tuple[bool, ...]:
        """For each step: does its network call build a graph?"""
        mask, carried = [], False
        for step in self.steps:
            mask.append(step.trains or (carried and step.input_grad != 0))
            carried = carried or step.trains
        return tuple(mask)

    @property
    def calls(self) -> int:
        """Network calls per sample (guidance counted once)."""
        return len(self.steps)

    @property
    def grad_calls(self) -> int:
        """Network calls per sample that gradient flows through."""
        return sum(self.grad_mask)

    @property
    def needs_rollout(self) -> bool:
        return any(step.pin for step in self.steps)


def adapters_at(parts: Sequence[Sequence[int]], *, timestep_lora: bool = True) -> tuple[int, ...]:
    """How many stacked LoRAs are active at each point of the segments at inference.

    ShortFT: at the last timestep of segment i LoRAs 1…i, in the first segment LoRA 1 at every
    timestep, elsewhere none. Without timestep LoRAs (the paper's ablation "w/o T-LoRA") one
    shared LoRA acts at the same places.

    Returns:
        N counts, one per timestep.
    """
    counts = [0] * sum(map(len, parts))
    for number, part in enumerate(parts, start=1):
        active = number if timestep_lora else 1
        for index in part if number == 1 else part[-1:]:
            counts[index] = active
    return tuple(counts)


def inference_plan(schedule: Schedule, k: int, *, timestep_lora: bool = True) -> Plan:
    """The true chain with the LoRAs switched on at their timesteps, without gradient."""
    counts = adapters_at(segments(schedule, k), timestep_lora=timestep_lora)
    return Plan(
        tuple(
            Step(i, i + 1, "policy" if count else "base", adapters=count)
            for i, count in enumerate(counts)
        )
    )


def base_plan(schedule: Schedule) -> Plan:
    """The frozen model's own chain."""
    return Plan(tuple(Step(i, i + 1, "base") for i in range(schedule.num_steps)))


def shortft_plan(
    schedule: Schedule,
    k: int,
    stage: int,
    *,
    timestep_lora: bool = True,
    shortcut: bool = True,
    pin: bool = False,
) -> Plan:
    """ShortFT's chain of one stage (arXiv 2507.22604 §3.2–3.4).

    Segments 1…stage run the original chain, later segments one shortcut call and the LoRA step.
    Gradient starts at the LoRA step of segment `stage` and is complete from there on:
    2(k - stage) + 1 calls carry it.

    Args:
        k: number of segments.
        stage: 1…k; stage k is exactly the chain of inference.
        timestep_lora: one LoRA per segment, or one shared LoRA (number 1).
        shortcut: run the jumps by the shortcut network, or by the base (a plain DDIM jump).
        pin: give the jumps the values of the true base chain (straight-through).

    Raises:
        ValueError: for a stage outside 1…k.
    """
    if not 1 <= stage <= k:
        raise ValueError(f"stage must lie in 1…{k}, got {stage}")
    parts = segments(schedule, k)
    counts = adapters_at(parts, timestep_lora=timestep_lora)
    jumper: Net = "shortcut" if shortcut else "base"
    steps: list[Step] = []
    for number, part in enumerate(parts, start=1):
        *walk, last = part
        if number <= stage:
            for i in walk:
                steps.append(Step(i, i + 1, "policy" if counts[i] else "base", counts[i]))
        elif walk:
            steps.append(Step(walk[0], last, jumper, pin=pin))
        steps.append(Step(last, last + 1, "policy", counts[last], trains=number >= stage))
    trainable = tuple(range(stage, k + 1)) if timestep_lora else (1,)
    return Plan(tuple(steps), trainable)


METHODS: dict[str, Callable[..., Plan]] = {"shortft": shortft_plan}
