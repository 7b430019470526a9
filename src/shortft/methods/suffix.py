"""Methods that run the true chain, or some of its points, with gradient from some step on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection

import torch

from shortft.plans import Plan, Step
from shortft.schedule import Schedule


def chain(stop: int, trains: Collection[int], *, input_grad: float = 1.0, **plan: object) -> Plan:
    """The policy's own chain up to point `stop`, with gradient to the LoRA at some steps."""
    steps = tuple(
        Step(i, i + 1, "policy", 1, trains=i in trains, input_grad=input_grad) for i in range(stop)
    )
    return Plan(steps, (1,), **plan)  # type: ignore[arg-type]


def share_of(n: int, share: float) -> int:
    """A share of n steps, at least one."""
    return max(1, min(n, round(share * n)))


def integer(draw: torch.Generator, low: int, high: int) -> int:
    """Uniform on low…high, both included."""
    return int(torch.randint(low, high + 1, (1,), generator=draw))


def full(schedule: Schedule, draw: torch.Generator) -> Plan:
    """Gradient through every step."""
    return draft_k(schedule, draw, k=schedule.num_steps)


def thinned(
    schedule: Schedule, draw: torch.Generator, *, calls: int, late: float, even: bool
) -> Plan:
    """A random thinning of the chain, with gradient through all of it (ours).

    From point 0 over `calls` - 1 points, one drawn from each of as many parts of those that are
    left, to the end. So the chain is short, and every timestep is met in training. The parts are
    equal, or with `late` above 1 shorter towards the end: part i ends at the share
    1 - (1 - i / parts)^late of the chain. With `even` the points lie at the same relative place
    in all parts.
    """
    n = schedule.num_steps
    if calls > n:
        raise ValueError(
            f"calls = {calls}, but the chain has {n} steps; give at most --method-options calls={n}"
        )
    edges = [1]
    for i in range(1, calls):
        share = 1 - (1 - i / (calls - 1)) ** late
        edge = 1 + math.floor((n - 1) * share + 1e-9)
        # Every part has a point at least, and leaves one for each part after it.
        edges.append(max(edges[-1] + 1, min(edge, n - (calls - 1 - i))))
    if even:
        place = float(torch.rand(1, generator=draw))
        drawn = [low + int(place * (high - low)) for low, high in itertools.pairwise(edges)]
    else:
        drawn = [integer(draw, low, high - 1) for low, high in itertools.pairwise(edges)]
    pairs = itertools.pairwise([0, *drawn, n])
    return Plan(tuple(Step(i, j, "policy", 1, trains=True) for i, j in pairs), (1,))


def draft_k(schedule: Schedule, draw: torch.Generator, *, k: int) -> Plan:
    """DRaFT-K: gradient through the last K steps (arXiv 2309.17400 §4.1)."""
    n = schedule.num_steps
    if k > n:
        raise ValueError(f"k = {k} steps with gradient, but the chain has {n}")
    return chain(n, range(n - k, n))


def draft_lv(schedule: Schedule, draw: torch.Generator, *, copies: int) -> Plan:
    """DRaFT-LV: the last step, and again on re-noised copies of x0 (§4.2)."""
    n = schedule.num_steps
    return chain(n, (n - 1,), renoise=copies)


def alignprop(
    schedule: Schedule, draw: torch.Generator, *, shortest: float, longest: float
) -> Plan:
    """AlignProp: a suffix of random length, the same for the whole update (arXiv 2310.03739)."""
    if shortest > longest:
        raise ValueError(f"shortest = {shortest} lies above longest = {longest}")
    n = schedule.num_steps
    length = integer(draw, share_of(n, shortest), share_of(n, longest))
    return chain(n, range(n - length, n))


def refl(schedule: Schedule, draw: torch.Generator, *, last: float) -> Plan:
    """ReFL: one late step with gradient, the reward on its x0 prediction (arXiv 2304.05977)."""
    n = schedule.num_steps
    at = integer(draw, n - share_of(n, last), n - 1)
    return chain(at + 1, (at,), reward_at="x0")


def drtune(
    schedule: Schedule, draw: torch.Generator, *, train_steps: int, early_stop: float
) -> Plan:
    """DRTune: detached inputs, equally spaced steps train, early stop (arXiv 2405.00760)."""
    n = schedule.num_steps
    at = integer(draw, n - share_of(n, early_stop), n - 1)
    length = at + 1
    count = min(train_steps, length)
    stride = length // count
    first = integer(draw, 0, length - 1 - (count - 1) * stride)
    trained = [first + i * stride for i in range(count)]
    return chain(length, trained, input_grad=0.0, reward_at="x0")
