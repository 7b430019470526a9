"""What a picture of a plan needs to know, and how its points fall onto text rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class StepLike(Protocol):
    """One network call: from point `start` to point `stop` (see `shortft.plans.Step`)."""

    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...
    @property
    def net(self) -> str: ...
    @property
    def adapters(self) -> int: ...
    @property
    def trains(self) -> bool: ...
    @property
    def input_grad(self) -> float: ...
    @property
    def pin(self) -> bool: ...


class PlanLike(Protocol):
    """A chain (see `shortft.plans.Plan`)."""

    @property
    def steps(self) -> Sequence[StepLike]: ...
    @property
    def trainable(self) -> Sequence[int]: ...
    @property
    def reward_at(self) -> str: ...
    @property
    def grad_mask(self) -> Sequence[bool]: ...
    @property
    def calls(self) -> int: ...
    @property
    def grad_calls(self) -> int: ...


def stretches(
    segments: Sequence[Sequence[int]], points: int, width: int
) -> list[tuple[str, range]]:
    """(label, point indices) of each text row: the segments, cut where wider than `width`."""
    parts = [list(segment) for segment in segments if len(segment)] or [list(range(points))]
    rows = []
    for number, part in enumerate(parts, start=1):
        for low in range(part[0], part[-1] + 1, width):
            label = f"{number}" if low == part[0] and len(parts) > 1 else ""
            rows.append((label, range(low, min(low + width, part[-1] + 1))))
    return rows


def timestep_text(timestep: float) -> str:
    """981, or 0.25 for schedules that count from 1 to 0."""
    return f"{timestep:.0f}" if timestep == round(timestep) or timestep >= 1 else f"{timestep:.2f}"


def calls_text(plan: PlanLike) -> str:
    """18 network calls, 7 with gradient."""
    return f"{plan.calls} network calls, {plan.grad_calls} with gradient"
