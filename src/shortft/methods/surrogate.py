"""Methods that sample without gradient and backpropagate through a surrogate of the chain.

The rollout of the policy is cached; few of its calls are run again with gradient, and every
value is the rollout's own (straight-through), so that the reward sees the true picture.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from shortft.plans import Plan, Step
from shortft.schedule import Schedule


def cached(start: int, stop: int) -> list[Step]:
    """The rollout's own steps: no calls, gradient along the straight path."""
    return [Step(i, i + 1, "cached", pin=True) for i in range(start, stop)]


def again(start: int, stop: int, *, input_grad: float = 0.0, gain: float = 1.0) -> Step:
    """A call that is run again with gradient."""
    return Step(start, stop, "policy", 1, trains=True, input_grad=input_grad, pin=True, gain=gain)


def two_points(schedule: Schedule, draw: torch.Generator) -> tuple[int, int]:
    """Two different points of the chain, each pair equally likely; the earlier first."""
    n = schedule.num_steps
    if n < 2:
        raise ValueError("this method needs a chain of at least 2 steps")
    early, late = sorted(torch.randperm(n, generator=draw)[:2].tolist())
    return early, late


def late_biased(low: int, high: int, count: int, bias: float, draw: torch.Generator) -> list[int]:
    """`count` different points of [low, high), with weights (place + 1)^bias, in order."""
    size = high - low
    if count < 1:
        return []
    if count >= size:
        return list(range(low, high))
    weights = torch.arange(1, size + 1, dtype=torch.float64) ** bias
    return sorted((low + torch.multinomial(weights, count, generator=draw)).tolist())


def leapalign(schedule: Schedule, draw: torch.Generator, *, alpha: float, tau: float) -> Plan:
    """LeapAlign: x_k leaps to x_j and x_j to the end (arXiv 2604.15311)."""
    k, j = two_points(schedule, draw)
    n = schedule.num_steps
    steps = [*cached(0, k), again(k, j), again(j, n, input_grad=alpha)]
    return Plan(tuple(steps), (1,), leap_tau=tau)


def run_again(low: int, high: int, chosen: Collection[int], first: float = 0.0) -> list[Step]:
    """Steps low…high - 1, the chosen ones run again; `first`: gradient into the first's input."""
    steps: list[Step] = []
    for i in range(low, high):
        inside = first if i == low else 0.0
        steps += [again(i, i + 1, input_grad=inside)] if i in chosen else cached(i, i + 1)
    return steps


def flowbp_sparse(
    schedule: Schedule, draw: torch.Generator, *, active: int, late_bias: float
) -> Plan:
    """FlowBP-Sparse: few steps of the Euler sum with gradient (arXiv 2606.11075)."""
    n = schedule.num_steps
    return Plan(tuple(run_again(0, n, late_biased(0, n, active, late_bias, draw))), (1,))


def flowbp_bridge(
    schedule: Schedule, draw: torch.Generator, *, active: int, alpha: float, late_bias: float
) -> Plan:
    """FlowBP-Bridge: as sparse on both sides of a middle point j, and a nested path through it.

    The call at j always is active; the others are split by the lengths of the two sides.
    """
    n = schedule.num_steps
    _, j = two_points(schedule, draw)
    count = min(active, n)
    before = min(max(round(count * j / n), 1), j)
    after = min(max(count - before, 1), n - j)
    before = min(count - after, j)
    early = late_biased(0, j, before, late_bias, draw)
    late = [j, *late_biased(j + 1, n, after - 1, late_bias, draw)]
    return Plan((*run_again(0, j, early), *run_again(j, n, late, first=alpha)), (1,))


def flowbp_lagrange(
    schedule: Schedule,
    draw: torch.Generator,
    *,
    order: int,
    active: int,
    support_gain: float,
    alpha: float,
) -> Plan:
    """FlowBP-Lagrange: LeapAlign's leaps, each by quadrature over several predictions.

    A leap a → b integrates the polynomial through the predictions at `order` points of it; those
    at the first `active` points carry gradient, with the quadrature's weights. The authors also
    weigh samples by the leaps' misses, which quadrature brings below their floor of 0.1: all
    weights are alike, and are left out here.
    """
    k, j = two_points(schedule, draw)
    steps = cached(0, k)
    for start, stop, first in ((k, j, 0.0), (j, schedule.num_steps, alpha)):
        points = supports(start, stop, order)
        along = coordinate(schedule)
        weights = quadrature(along[points], float(along[start]), float(along[stop]))
        ends = [*points[1:], stop]
        for place, (here, there) in enumerate(zip(points, ends, strict=True)):
            if place >= active:
                steps += cached(here, there)
                continue
            gain = float(weights[place] / (along[there] - along[here]))
            if place:
                gain *= support_gain
            steps.append(again(here, there, input_grad=0.0 if place else first, gain=gain))
    return Plan(tuple(steps), (1,))


def supports(start: int, stop: int, order: int) -> list[int]:
    """Up to `order` points of [start, stop), evenly spread, `start` among them."""
    places = torch.linspace(start, stop - 1, min(order, stop - start), dtype=torch.float64)
    return sorted({start, *places.round().long().tolist()})


def coordinate(schedule: Schedule) -> Tensor:
    """(N + 1,) the variable in which a prediction is a velocity of the straight path.

    sigma for flow matching, where latents move by d sigma · v; sigma/alpha for DDIM, where
    latents/alpha move by d(sigma/alpha) · eps.
    """
    if schedule.prediction_type == "flow":
        return schedule.sigma
    return schedule.sigma / schedule.alpha


def quadrature(points: Tensor, start: float, stop: float) -> Tensor:
    """(n,) weights of the integral from start to stop of the polynomial through n points."""
    degree = torch.arange(len(points), dtype=torch.float64)
    # The weights integrate every monomial exactly; about the middle and in units of the
    # interval, for conditioning.
    middle, unit = (start + stop) / 2, (stop - start) / 2
    scaled = (points.double() - middle) / unit
    moments = (1 - (-1.0) ** (degree + 1)) / (degree + 1)
    return unit * torch.linalg.solve(scaled[None, :] ** degree[:, None], moments)
