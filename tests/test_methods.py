"""Every method's gradient against its definition written out as a plain loop, in float64."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from shortft.chain import run_chain
from shortft.methods import METHODS, make_plan, placement_of, read_options
from shortft.plans import Plan, Step, inference_plan
from shortft.schedule import alphas_cumprod, ddim_schedule, flow_schedule, segments
from shortft.step import leap_weight

N, K = 12, 4
SHAPE = (2, 2, 4, 4)
HIDDEN = 12
Kind = Literal["epsilon", "flow"]
KINDS: list[Kind] = ["epsilon", "flow"]
Choices = dict[str, Any]


class Toy:
    """A smooth network with LoRAs on a schedule of 12 points, and a reward that is not linear.

    It is what `run_chain` asks for (`predict`), and the definitions below call `f` directly.
    """

    def __init__(self, kind: Kind, loras: int = 1, steps: int = N) -> None:
        generator = torch.Generator().manual_seed(7)

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

        self.kind = kind
        self.schedule = (
            ddim_schedule(alphas_cumprod(), steps)
            if kind == "epsilon"
            else flow_schedule(steps, shift=2.0)
        )
        self.alpha = self.schedule.alpha.tolist()
        self.sigma = self.schedule.sigma.tolist()
        self.time = self.schedule.timesteps.tolist()
        size = math.prod(SHAPE[1:])
        self.frozen = {
            name: (random(HIDDEN, size, scale=0.25), random(size, HIDDEN, scale=0.3))
            for name in ("base", "shortcut")
        }
        self.clock = random(HIDDEN)
        self.theta = [
            (
                random(2, size, scale=0.2).requires_grad_(),
                random(HIDDEN, 2, scale=0.3).requires_grad_(),
                random(HIDDEN, scale=0.2).requires_grad_(),
            )
            for _ in range(loras)
        ]
        self.noise = random(*SHAPE)
        self.cond = random(SHAPE[0], HIDDEN, scale=0.5)
        self.fresh = [random(*SHAPE) for _ in range(4)]
        self.pixel_weights = random(*SHAPE)
        self.packed = 0  # tensors kept for the backward pass, where someone counts them
        self.made: list[tuple[Step, bool, int]] = []

    def f(self, name: str, x: Tensor, i: int, loras: int = 1, trains: bool = True) -> Tensor:
        """The network `name` at point i; the policy is the base with LoRAs 1 … loras, "tuned" the
        shortcut with them.
        """
        return self._network(name, x, self.time[i], self.cond, loras, trains)

    def _network(
        self, name: str, x: Tensor, time: float, cond: Tensor, loras: int, trains: bool
    ) -> Tensor:
        first, second = self.frozen["shortcut" if name in ("shortcut", "tuned") else "base"]
        flat = x.flatten(1)
        hidden = flat @ first.T + self.clock * time / 1000 + cond
        if name in ("policy", "tuned"):
            for parameters in self.theta[:loras]:
                down, up, shift = (p if trains else p.detach() for p in parameters)
                hidden = hidden + flat @ down.T @ up.T + shift
        return (torch.tanh(hidden) @ second.T + 0.2 * torch.sin(flat)).view_as(x)

    def predict(
        self, step: Step, latents: Tensor, timestep: float, cond: Any, *, recompute: bool = False
    ) -> Tensor:
        if recompute:
            call = partial(self.predict, step, timestep=timestep, cond=cond)
            again: Tensor = checkpoint(call, latents, use_reentrant=False)
            return again
        before = self.packed
        name = "tuned" if step.net == "shortcut" and step.adapters else step.net
        out = self._network(name, latents, timestep, cond, step.adapters, step.trains)
        self.made.append((step, out.requires_grad, self.packed - before))
        return out

    def jump(self, x: Tensor, v: Tensor, i: int, j: int) -> Tensor:
        """From point i to point j with one prediction: Euler, or DDIM."""
        if self.kind == "flow":
            return x + (self.sigma[j] - self.sigma[i]) * v
        return self.alpha[j] * self.x0(x, v, i) + self.sigma[j] * v

    def x0(self, x: Tensor, v: Tensor, i: int) -> Tensor:
        if self.kind == "flow":
            return x - self.sigma[i] * v
        return (x - self.sigma[i] * v) / self.alpha[i]

    def scores(self, x: Tensor) -> Tensor:
        """(B,) the reward of each sample."""
        return (self.pixel_weights * (torch.tanh(0.3 * x) + 0.02 * x**2)).flatten(1).sum(1)

    def rollout(self) -> list[Tensor]:
        """The true chain, LoRA 1 at every timestep, without gradient."""
        states = [self.noise]
        with torch.no_grad():
            for i in range(N):
                x = states[-1]
                states.append(self.jump(x, self.f("policy", x, i), i, i + 1))
        return states

    def gradients(self, loss: Tensor) -> list[Tensor]:
        trained = [p for parameters in self.theta for p in parameters if p.requires_grad]
        return list(torch.autograd.grad(loss, trained, retain_graph=True))


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    return x + (value - x).detach()


def nested(x: Tensor, alpha: float) -> Tensor:
    return alpha * x + (1 - alpha) * x.detach()


# The definitions. Each returns where the reward looks, and the loss.

Result = tuple[Tensor, Tensor]


def draft_k(toy: Toy, *, k: int) -> Result:
    x = toy.noise
    for i in range(N):
        if i == N - k:
            x = x.detach()
        x = toy.jump(x, toy.f("policy", x, i), i, i + 1)
    return x, toy.scores(x).sum()


def full(toy: Toy) -> Result:
    x = toy.noise
    for i in range(N):
        x = toy.jump(x, toy.f("policy", x, i), i, i + 1)
    return x, toy.scores(x).sum()


def alignprop(toy: Toy, *, length: int) -> Result:
    x = toy.noise
    for i in range(N):
        if i == N - length:
            x = x.detach()
        x = toy.jump(x, toy.f("policy", x, i), i, i + 1)
    return x, toy.scores(x).sum()


def draft_lv(toy: Toy, *, copies: int) -> Result:
    last = N - 1
    x = toy.noise
    for i in range(last):
        x = toy.jump(x, toy.f("policy", x, i), i, i + 1)
    x = x.detach()
    ends = [toy.jump(x, toy.f("policy", x, last), last, N)]
    for copy in range(copies):
        noisy = toy.alpha[last] * ends[0].detach() + toy.sigma[last] * toy.fresh[copy]
        ends.append(toy.jump(noisy, toy.f("policy", noisy, last), last, N))
    return torch.cat(ends), torch.stack([toy.scores(end).sum() for end in ends]).mean()


def refl(toy: Toy, *, stop: int) -> Result:
    x = toy.noise
    for i in range(stop):
        x = toy.jump(x, toy.f("policy", x, i), i, i + 1).detach()
    x0 = toy.x0(x, toy.f("policy", x, stop), stop)
    return x0, toy.scores(x0).sum()


def drtune(toy: Toy, *, stop: int, training: Sequence[int]) -> Result:
    x = toy.noise
    for i in range(stop + 1):
        v = toy.f("policy", x.detach(), i)
        if i not in training:
            v = v.detach()
        if i < stop:
            x = toy.jump(x, v, i, i + 1)
    x0 = toy.x0(x, v, stop)
    return x0, toy.scores(x0).sum()


def leapalign(toy: Toy, *, k: int, j: int, alpha: float, tau: float) -> Result:
    rollout = toy.rollout()
    xj_hat = toy.jump(rollout[k], toy.f("policy", rollout[k], k), k, j)
    xj = straight_through(xj_hat, rollout[j])
    x0_hat = toy.jump(xj, toy.f("policy", nested(xj, alpha), j), j, N)
    x0 = straight_through(x0_hat, rollout[N])
    weights = []
    for sample in range(SHAPE[0]):
        d_j = (xj_hat[sample] - rollout[j][sample]).abs().mean().item()
        d_0 = (x0_hat[sample] - rollout[N][sample]).abs().mean().item()
        weights.append(1 / (max(d_j, tau) + max(d_0, tau)))
    scores = toy.scores(x0)
    return x0, sum(w * scores[sample] for sample, w in enumerate(weights))


def flowbp_sparse(toy: Toy, *, active: Sequence[int]) -> Result:
    rollout = toy.rollout()
    x = rollout[0]
    for i in range(N):
        v = toy.f("policy", rollout[i], i)
        x = toy.jump(x, v if i in active else v.detach(), i, i + 1)
    x = straight_through(x, rollout[N])
    return x, toy.scores(x).sum()


def flowbp_bridge(toy: Toy, *, j: int, active: Sequence[int], alpha: float) -> Result:
    rollout = toy.rollout()
    x = rollout[0]
    for i in range(N):
        if i == j:
            x = straight_through(x, rollout[j])
        v = toy.f("policy", nested(x, alpha) if i == j else rollout[i], i)
        x = toy.jump(x, v if i in active else v.detach(), i, i + 1)
    x = straight_through(x, rollout[N])
    return x, toy.scores(x).sum()


def quadrature(nodes: Sequence[float], start: float, stop: float) -> list[float]:
    """Integrals of the nodes' Lagrange basis polynomials, each multiplied out."""
    weights = []
    for i, node in enumerate(nodes):
        basis = np.polynomial.Polynomial([1.0])
        for m, other in enumerate(nodes):
            if m != i:
                basis = basis * np.polynomial.Polynomial([-other, 1.0]) / (node - other)
        integral = basis.integ()
        weights.append(float(integral(stop) - integral(start)))
    return weights


def supports_of(a: int, b: int, order: int) -> list[int]:
    return [int(i) for i in np.rint(np.linspace(a, b - 1, min(order, b - a)))]


def flowbp_lagrange(
    toy: Toy, *, k: int, j: int, order: int, active: int, support_gain: float, alpha: float
) -> Result:
    rollout = toy.rollout()
    scale = toy.alpha if toy.kind == "epsilon" else [1.0] * (N + 1)
    c = [sigma / s for sigma, s in zip(toy.sigma, scale, strict=True)]

    def leap(x: Tensor, seen: Tensor, a: int, b: int) -> Tensor:
        supports = supports_of(a, b, order)
        y = x / scale[a]
        weights = quadrature([c[i] for i in supports], c[a], c[b])
        for position, (i, w) in enumerate(zip(supports, weights, strict=True)):
            if position == 0:
                v = toy.f("policy", seen, a)
            else:
                v = toy.f("policy", rollout[i], i)
                gain = support_gain if position < active else 0.0
                v = gain * v + (1 - gain) * v.detach()
            y = y + w * v
        return scale[b] * y

    xj = straight_through(leap(rollout[k], rollout[k], k, j), rollout[j])
    x0 = straight_through(leap(xj, nested(xj, alpha), j, N), rollout[N])
    return x0, toy.scores(x0).sum()


def thinned(toy: Toy, *, points: Sequence[int]) -> Result:
    """The policy's chain on some of its points alone, the jumps long."""
    x = toy.noise
    for i, j in itertools.pairwise([*points, N]):
        x = toy.jump(x, toy.f("policy", x, i), i, j)
    return x, toy.scores(x).sum()


def jumps(toy: Toy, *, nets: Sequence[str], pin: bool) -> Result:
    """From each segment's start to the next one's in one call, one LoRA at all of them."""
    rollout = toy.rollout()
    first_of = {"epsilon": [0, 2, 5, 9, N], "flow": [0, 3, 6, 9, N]}[toy.kind]
    x = toy.noise
    for net, (i, j) in zip(nets, itertools.pairwise(first_of), strict=True):
        x = toy.jump(x, toy.f(net, x, i), i, j)
        x = straight_through(x, rollout[j]) if pin else x
    return x, toy.scores(x).sum()


def tune_shortcut(toy: Toy) -> Result:
    """The few-step model with LoRAs of its own: from each segment's start to the next one's."""
    first_of = {"epsilon": [0, 2, 5, 9, N], "flow": [0, 3, 6, 9, N]}[toy.kind]
    x = toy.noise
    for i, j in itertools.pairwise(first_of):
        x = toy.jump(x, toy.f("tuned", x, i), i, j)
    return x, toy.scores(x).sum()


DEFINITIONS: dict[str, Callable[..., Result]] = {
    f.__name__: f
    for f in (
        draft_k,
        draft_lv,
        alignprop,
        drtune,
        refl,
        leapalign,
        flowbp_sparse,
        flowbp_bridge,
        flowbp_lagrange,
        full,
        thinned,
        jumps,
        tune_shortcut,
    )
}


def trained(plan: Plan) -> list[int]:
    return [step.start for step in plan.steps if step.trains]


def bridged(plan: Plan, alpha: float) -> int:
    """Where the nested path enters: the one training step after the first with this strength."""
    first = trained(plan)[0]
    found = [
        step.start
        for step in plan.steps
        if step.trains and step.start > first and step.input_grad == alpha
    ]
    assert len(found) == 1
    return found[0]


def choices_of(method: str, plan: Plan, options: Choices) -> Choices:
    """The random choices that a plan made, and the options, as the definitions take them."""
    train = trained(plan)
    if method in ("draft_k", "draft_lv"):
        return dict(options)
    if method in ("full", "tune_shortcut"):
        return {}
    if method == "jumps":
        early = "policy" if options["jump"] == "ddim" else "tuned"
        late = "tuned" if options["jump"] == "shortcut" else "policy"
        return {"nets": (early, early, late, late), "pin": options["pin"]}
    if method == "thinned":
        return {"points": train}
    if method == "alignprop":
        return {"length": N - train[0]}
    if method == "refl":
        return {"stop": train[0]}
    if method == "drtune":
        return {"stop": plan.steps[-1].start, "training": train}
    if method == "leapalign":
        return {"k": train[0], "j": train[1], **options}
    if method == "flowbp_sparse":
        return {"active": train}
    alpha = options["alpha"]
    if method == "flowbp_bridge":
        return {"j": bridged(plan, alpha), "active": train, "alpha": alpha}
    return {"k": train[0], "j": bridged(plan, alpha), **options}


def run_plan(toy: Toy, plan: Plan, rollout: Sequence[Tensor] = (), **more: Any) -> Result:
    """Ours: where the reward looks, and the loss."""
    leaps: list[Tensor] = []
    value = run_chain(
        plan,
        toy,
        toy.noise,
        toy.cond,
        toy.schedule,
        rollout=torch.stack(list(rollout)) if rollout else None,
        fresh_noise=toy.fresh.__getitem__,
        observe_leap=leaps.append,
        **more,
    )
    ends = value.chunk(1 + plan.renoise)
    scores = torch.stack([toy.scores(end) for end in ends]).mean(0)
    return value, (scores * leap_weight(leaps, plan.leap_tau)).sum()


def assert_same(toy: Toy, ours: Result, expected: Result) -> None:
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours[1], expected[1], rtol=1e-10, atol=1e-10)
    for got, wanted in zip(toy.gradients(ours[1]), toy.gradients(expected[1]), strict=True):
        assert wanted.norm() > 1e-6
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-10)


CASES: list[tuple[str, Choices]] = [
    ("draft_k", {}),
    ("draft_k", {"k": 4}),
    ("draft_k", {"k": N}),
    ("draft_lv", {}),
    ("draft_lv", {"copies": 3}),
    ("full", {}),
    ("tune_shortcut", {}),
    ("jumps", {}),
    ("jumps", {"pin": True}),
    ("jumps", {"jump": "ddim"}),
    ("jumps", {"jump": "ddim", "pin": True}),
    ("jumps", {"jump": "shortcut"}),
    ("jumps", {"jump": "shortcut", "pin": True}),
    ("thinned", {}),
    ("thinned", {"calls": 1}),
    ("thinned", {"calls": N}),
    ("thinned", {"even": True}),
    ("thinned", {"late": 2.5}),
    ("alignprop", {}),
    ("alignprop", {"shortest": 0.5, "longest": 1.0}),
    ("refl", {}),
    ("refl", {"last": 1.0}),
    ("drtune", {}),
    ("drtune", {"train_steps": 2, "early_stop": 0.8}),
    ("drtune", {"train_steps": 1, "early_stop": 0.1}),
    ("leapalign", {}),
    ("leapalign", {"alpha": 0.7, "tau": 0.8}),
    ("leapalign", {"alpha": 0.0}),
    ("leapalign", {"alpha": 1.0}),
    ("flowbp_sparse", {}),
    ("flowbp_sparse", {"active": 1, "late_bias": 0.0}),
    ("flowbp_sparse", {"active": N}),
    ("flowbp_bridge", {}),
    ("flowbp_bridge", {"active": 2, "alpha": 0.8, "late_bias": 0.0}),
    ("flowbp_bridge", {"active": 7, "late_bias": 0.0}),
    ("flowbp_lagrange", {}),
    ("flowbp_lagrange", {"order": 1, "active": 1, "alpha": 0.6}),
    ("flowbp_lagrange", {"order": 4, "active": 3, "support_gain": 0.7, "alpha": 0.4}),
    ("flowbp_lagrange", {"order": 5, "active": 1}),
    ("flowbp_lagrange", {"order": 3, "active": 3, "support_gain": 1.0, "alpha": 0.9}),
]
NAMES = [" ".join([m, *(f"{k}={v}" for k, v in o.items())]) for m, o in CASES]


def plans(method: str, given: Choices, toy: Toy, count: int, seed: int = 0) -> list[Plan]:
    """The plans of `count` updates in a row."""
    draw, options = torch.Generator().manual_seed(seed), read_options(method, given)
    return [make_plan(method, toy.schedule, K, 1, draw, options) for _ in range(count)]


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("draft_k", {"k": N + 1}),
        ("thinned", {"calls": N + 1}),
        ("alignprop", {"shortest": 0.6, "longest": 0.4}),
    ],
)
def test_options_that_do_not_fit_the_chain(method: str, given: Choices):
    with pytest.raises(ValueError, match=r"chain has 12|above longest"):
        plans(method, given, Toy("flow"), 1)


def test_every_method_has_a_definition():
    assert {method for method, _ in CASES} == set(DEFINITIONS) == set(METHODS) - {"shortft"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("method", "given"), CASES, ids=NAMES)
def test_gradient_equals_the_definition(method: str, given: Choices, kind: Kind):
    toy = Toy(kind)
    rollout = toy.rollout()
    for number, plan in enumerate(plans(method, given, toy, 6)):
        assert plan.trainable == (1,)
        choices = choices_of(method, plan, read_options(method, given))
        expected = DEFINITIONS[method](toy, **choices)
        pinned = rollout if plan.needs_rollout else ()
        assert_same(toy, run_plan(toy, plan, pinned), expected)
        if number == 0:
            assert_same(toy, run_plan(toy, plan, pinned, recompute=True), expected)


# ShortFT: LoRAs at their segments' last timesteps, jumps over the others.


def log_snr(toy: Toy, i: int) -> float:
    return math.log(toy.alpha[i] / toy.sigma[i])


def middle_of(toy: Toy, start: int, stop: int) -> int:
    """The point inside a segment nearest to half-way in log(alpha / sigma)."""
    half = (log_snr(toy, start) + log_snr(toy, stop)) / 2
    return min(range(start + 1, stop), key=lambda m: abs(log_snr(toy, m) - half))


def true_chain(toy: Toy, parts: Sequence[Sequence[int]], loras: str = "last") -> list[Tensor]:
    """LoRA 1 in all of segment 1, LoRAs 1 … i at the last timestep of segment i, or at all."""
    states = [toy.noise]
    with torch.no_grad():
        for number, part in enumerate(parts, start=1):
            for i in part:
                policy = number == 1 or i == part[-1] or loras == "segment"
                x = states[-1]
                v = toy.f("policy" if policy else "base", x, i, loras=number)
                states.append(toy.jump(x, v, i, i + 1))
    return states


def shortft(
    toy: Toy,
    parts: Sequence[Sequence[int]],
    stage: int,
    jump: str = "shortcut",
    pin: bool = False,
    first_by_shortcut: bool = False,
    loras: str = "last",
    tail: int = 1,
) -> Result:
    rollout = true_chain(toy, parts, loras)

    def keep(x: Tensor, i: int) -> Tensor:
        return straight_through(x, rollout[i]) if pin else x

    def over(x: Tensor, start: int, stop: int) -> Tensor:
        """Over a segment: from its first timestep to its last."""
        v = toy.f("shortcut" if jump == "shortcut" else "base", x, start)
        if jump in ("shortcut", "ddim") or stop == start + 1:
            return keep(toy.jump(x, v, start, stop), stop)
        m = middle_of(toy, start, stop)
        xm = toy.jump(x, v, start, m)
        vm = toy.f("base", xm, m)
        if jump == "ddim_2":
            return keep(toy.jump(xm, vm, m, stop), stop)
        h, h_stop = log_snr(toy, m) - log_snr(toy, start), log_snr(toy, stop) - log_snr(toy, m)
        x0_start, x0_m = toy.x0(x, v, start), toy.x0(xm, vm, m)
        d = x0_m + (x0_m - x0_start) / (2 * h / h_stop)
        moved = toy.sigma[stop] / toy.sigma[m] * xm - toy.alpha[stop] * math.expm1(-h_stop) * d
        return keep(moved, stop)

    x = toy.noise
    for number, part in enumerate(parts, start=1):
        last = part[-1]
        jumps = number > stage or (first_by_shortcut and stage == 1)
        if loras == "segment" and jumps:
            v = toy.f("tuned" if jump == "shortcut" else "policy", x, part[0], loras=number)
            x = keep(toy.jump(x, v, part[0], last + 1), last + 1)
            continue

        def walk(
            x: Tensor, points: Sequence[int], number: int = number, last: int = last
        ) -> Tensor:
            for i in points:
                policy = number == 1 or loras == "segment" or i == last
                net = "policy" if policy else "base"
                v = toy.f(net, x, i, loras=number, trains=number >= stage)
                x = toy.jump(x, v, i, i + 1)
            return x

        begin = part[-tail:][0] if number == stage and not jumps else last
        if pin and number <= stage:
            x = rollout[begin]
        elif jumps:
            x = over(x, part[0], last) if len(part) > 1 else x
        else:
            x = walk(x, range(part[0], begin))
        if number == stage:
            x = x.detach()
        x = walk(x, range(begin, last + 1))
    return x, toy.scores(x).sum()


def shortft_toy(stage: int, kind: Kind = "epsilon") -> Toy:
    """With four LoRAs, of which those from the stage on are trained."""
    toy = Toy(kind, loras=K)
    for number, parameters in enumerate(toy.theta, start=1):
        for parameter in parameters:
            parameter.requires_grad_(number >= stage)
    return toy


SHORTFT: list[Choices] = [
    {"jump": jump, **dict.fromkeys(switches, True)}
    for jump in ("shortcut", "ddim", "ddim_2", "dpm_2")
    for switches in ((), ("pin",), ("first_by_shortcut",), ("pin", "first_by_shortcut"))
]
SHORTFT += [
    {"jump": "shortcut", "tail": 2},
    {"jump": "shortcut", "tail": 9, "pin": True},
    {"jump": "shortcut", "loras": "segment"},
    {"jump": "shortcut", "loras": "segment", "tail": 2, "pin": True},
    {"jump": "shortcut", "loras": "segment", "first_by_shortcut": True},
    {"jump": "ddim", "loras": "segment", "tail": 2},
]


def named(given: Choices) -> str:
    return " ".join(f"{name}={value}" for name, value in given.items())


def defined(kind: Kind, stage: int, given: Choices) -> bool:
    """Flow's chain starts from pure noise, whose log-SNR has no half-way."""
    first = stage == 1 and "first_by_shortcut" in given
    return kind == "epsilon" or not first or given["jump"] in ("shortcut", "ddim")


SHORTFT_CASES = [
    pytest.param(kind, stage, given, id=f"{kind} {stage} {named(given)}")
    for kind in KINDS
    for stage in (1, 2)
    for given in SHORTFT
    if defined(kind, stage, given)
]


@pytest.mark.parametrize(("kind", "stage", "given"), SHORTFT_CASES)
def test_shortft_equals_the_definition(kind: Kind, stage: int, given: Choices):
    toy = shortft_toy(stage, kind)
    options = read_options("shortft", given)
    plan = make_plan("shortft", toy.schedule, K, stage, torch.Generator(), options)
    assert plan.trainable == tuple(range(stage, K + 1))
    parts = segments(toy.schedule, K)
    assert [len(part) for part in parts] == ([2, 3, 4, 3] if kind == "epsilon" else [3, 3, 3, 3])
    assert plan.needs_rollout == bool(given.get("pin"))
    expected = shortft(toy, parts, stage, **given)
    rollout = rollout_of(toy, inference_of(toy, options)) if plan.needs_rollout else []
    assert_same(toy, run_plan(toy, plan, rollout), expected)
    if plan.needs_rollout:
        torch.testing.assert_close(expected[0], rollout[N], rtol=0, atol=1e-12)


def inference_of(toy: Toy, options: Choices) -> Plan:
    return inference_plan(toy.schedule, K, placement_of("shortft", options))


def rollout_of(toy: Toy, plan: Plan) -> list[Tensor]:
    states: list[Tensor] = []
    with torch.no_grad():
        run_chain(
            plan,
            toy,
            toy.noise,
            toy.cond,
            toy.schedule,
            observe=lambda _, x: states.append(x),
        )
    return states


def test_the_inference_chain_is_the_definitions():
    toy = shortft_toy(1)
    ours = torch.stack(rollout_of(toy, inference_plan(toy.schedule, K)))
    expected = torch.stack(true_chain(toy, segments(toy.schedule, K)))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    ours = torch.stack(rollout_of(toy, inference_plan(toy.schedule, K, "segments")))
    expected = torch.stack(true_chain(toy, segments(toy.schedule, K), "segment"))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    everywhere = torch.stack(rollout_of(toy, inference_plan(toy.schedule, K, "everywhere")))
    torch.testing.assert_close(everywhere, torch.stack(toy.rollout()), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dpm_2_jumps_as_diffusers_solver():
    """Segment 1 of a chain of 20 steps, whose jump starts from the noise."""
    diffusers = pytest.importorskip("diffusers")
    toy = Toy("epsilon", loras=K, steps=20)
    options = read_options("shortft", {"jump": "dpm_2", "first_by_shortcut": True})
    plan = make_plan("shortft", toy.schedule, K, 1, torch.Generator(), options)
    first, second = plan.steps[:2]
    assert (first.net, second.net) == ("base", "base")
    assert second.stop == segments(toy.schedule, K)[0][-1]
    assert second.start == middle_of(toy, 0, second.stop)
    points: dict[int, Tensor] = {}
    jumped = run_chain(
        Plan((first, second)),
        toy,
        toy.noise,
        toy.cond,
        toy.schedule,
        observe=points.__setitem__,
    )
    solver = diffusers.DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        solver_order=2,
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        prediction_type="epsilon",
    )
    visited = [0, second.start, second.stop]
    solver.set_timesteps(timesteps=[int(toy.time[i]) for i in visited])
    x = toy.noise
    for i, t in zip(visited[:2], solver.timesteps, strict=False):
        x = solver.step(toy.f("base", x, i), t, x, return_dict=False)[0]
    torch.testing.assert_close(jumped, x, rtol=1e-4, atol=1e-5)
    # Plain DDIM from the same middle point ends far outside that tolerance.
    middle = points[second.start]
    ddim = toy.jump(middle, toy.f("base", middle, second.start), second.start, second.stop)
    assert (ddim - x).abs().max() > 1e-2


# Calls: how many there are, and how many keep a graph.


def count_calls(toy: Toy, plan: Plan, rollout: Sequence[Tensor]) -> tuple[int, int]:
    """Network calls of a plan, and those of them that keep tensors for the backward pass."""

    def pack(tensor: Tensor) -> Tensor:
        toy.packed += 1
        return tensor

    toy.made.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run_plan(toy, plan, rollout)
    called = [step for step in plan.steps if step.net != "cached"]
    assert [step for step, _, _ in toy.made] == called + [plan.steps[-1]] * plan.renoise
    assert all((kept > 0) == has_graph for _, has_graph, kept in toy.made)
    return len(toy.made), sum(kept > 0 for _, _, kept in toy.made)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("method", "given"), CASES, ids=NAMES)
def test_only_the_stated_calls_keep_a_graph(method: str, given: Choices, kind: Kind):
    toy = Toy(kind)
    rollout = toy.rollout()
    for plan in plans(method, given, toy, 4):
        pinned = rollout if plan.needs_rollout else ()
        assert count_calls(toy, plan, pinned) == (plan.calls, plan.grad_calls)
        expected = len(trained(plan)) + plan.renoise
        assert plan.grad_calls == expected


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
@pytest.mark.parametrize("given", SHORTFT, ids=map(named, SHORTFT))
def test_only_shortfts_stated_calls_keep_a_graph(given: Choices, stage: int):
    toy = shortft_toy(stage)
    options = read_options("shortft", given)
    plan = make_plan("shortft", toy.schedule, K, stage, torch.Generator(), options)
    rollout = rollout_of(toy, inference_of(toy, options)) if plan.needs_rollout else []
    assert count_calls(toy, plan, rollout) == (plan.calls, plan.grad_calls)
    two = given["jump"] in ("ddim_2", "dpm_2")
    everywhere = given.get("loras") == "segment"
    after = 1 if everywhere else 3 if two else 2  # calls per later segment
    own = min(given.get("tail", 1), [2, 3, 4, 3][stage - 1])
    if not everywhere and stage > 1:
        own = 1  # the last timestep alone has LoRAs
    assert plan.grad_calls == own + (K - stage) * after


@pytest.mark.parametrize("jump", ["shortcut", "ddim"])
def test_one_lora_everywhere_jumps_along(jump: str):
    """As `tune_shortcut` jumps in training, but run by the base's chain."""
    toy = Toy("epsilon")
    own = read_options("jumps", {"jump": jump})
    plan = make_plan("jumps", toy.schedule, K, 1, torch.Generator(), own)
    options = read_options("shortft", {**own, "loras": "segment", "first_by_shortcut": True})
    assert placement_of("jumps", own) == "everywhere"
    assert placement_of("shortft", options, timestep_lora=False) == "everywhere"
    few = make_plan("tune_shortcut", toy.schedule, K, 1, torch.Generator(), {})
    assert plan.trainable == (1,)
    if jump == "shortcut":
        assert plan == few
    else:
        assert [(s.start, s.stop) for s in plan.steps] == [(s.start, s.stop) for s in few.steps]
        assert {s.net for s in plan.steps} == {"policy"}


@pytest.mark.parametrize(("k", "by_shortcut"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3)])
def test_half_of_the_jumps_are_the_bases_own(k: int, by_shortcut: int):
    options = read_options("jumps", {})
    plan = make_plan("jumps", Toy("flow").schedule, k, 1, torch.Generator(), options)
    nets = ["shortcut"] * by_shortcut + ["policy"] * (k - by_shortcut)
    assert [s.net for s in plan.steps] == nets


@pytest.mark.parametrize(("method", "net"), [("jumps", "policy"), ("shortft", "base")])
def test_without_a_shortcut_none_of_the_jumps_is_by_one(method: str, net: str):
    schedule, options = Toy("flow").schedule, read_options(method, {})
    plan = make_plan(method, schedule, K, 1, torch.Generator(), options, shortcut=False)
    jumps = [s for s in plan.steps if s.stop - s.start > 1]
    assert jumps
    assert {s.net for s in jumps} == {net}


@pytest.mark.parametrize("jump", ["ddim_2", "dpm_2"])
def test_jumps_that_cannot_carry_loras_are_refused(jump: str):
    options = read_options("shortft", {"loras": "segment", "jump": jump})
    with pytest.raises(ValueError, match="loras=segment jumps by"):
        make_plan("shortft", Toy("epsilon").schedule, K, 1, torch.Generator(), options)


@pytest.mark.parametrize(
    ("method", "calls", "grad_calls"),
    [
        ("draft_k", N, 1),
        ("draft_lv", N + 2, 3),
        ("full", N, N),
        ("thinned", 6, 6),
        ("jumps", K, K),
        ("tune_shortcut", K, K),
        ("leapalign", 2, 2),
        ("flowbp_sparse", 3, 3),
        ("flowbp_bridge", 4, 4),
    ],
)
def test_number_of_calls_by_default(method: str, calls: int, grad_calls: int):
    for plan in plans(method, {}, Toy("flow"), 10):
        assert (plan.calls, plan.grad_calls) == (calls, grad_calls)


# Random choices.

RANDOM = [
    "thinned",
    "alignprop",
    "refl",
    "drtune",
    "leapalign",
    "flowbp_sparse",
    "flowbp_bridge",
    "flowbp_lagrange",
]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_generator_makes_the_choices(method: str):
    toy = Toy("flow")
    once, again, other = (plans(method, {}, toy, 20, seed) for seed in (0, 0, 1))
    assert once == again
    assert (once != other) == (method in RANDOM)
    assert (len(set(once)) > 1) == (method in RANDOM)


def spread(values: Sequence[int], allowed: Sequence[int]) -> None:
    """Values cover just what is allowed, all about equally often: within 4.5 deviations."""
    counts, share = Counter(values), 1 / len(allowed)
    assert set(counts) == set(allowed)
    mean = len(values) * share
    bound = 4.5 * math.sqrt(mean * (1 - share))
    assert all(abs(count - mean) <= bound for count in counts.values())


@pytest.mark.parametrize(
    ("given", "allowed"),
    [
        ({}, range(1, 5)),  # round(1.2) … round(3.6)
        ({"shortest": 0.0, "longest": 0.2}, range(1, 3)),
        ({"shortest": 0.5, "longest": 1.0}, range(6, 13)),
        ({"shortest": 0.5, "longest": 0.5}, range(6, 7)),
    ],
)
def test_range_of_alignprop(given: Choices, allowed: range):
    made = plans("alignprop", given, Toy("flow"), 200)
    for plan in made:
        assert trained(plan) == list(range(trained(plan)[0], N))
    spread([N - trained(plan)[0] for plan in made], allowed)


@pytest.mark.parametrize(
    ("calls", "late", "edges"),
    [
        (2, 1, [1, 12]),
        (4, 1, [1, 4, 8, 12]),
        (6, 1, [1, 3, 5, 7, 9, 12]),
        # Of 11 points: shares 5/9 and 8/9; with 4, 65/81 and 80/81 would leave the last part none.
        (4, 2, [1, 7, 10, 12]),
        (4, 4, [1, 9, 11, 12]),
        (12, 3, list(range(1, 13))),
    ],
)
def test_range_of_thinned(calls: int, late: float, edges: list[int]):
    """Point 0 always, and every other point is met by one of the calls: one from each part."""
    given = {"calls": calls, "late": late}
    made = [trained(plan) for plan in plans("thinned", given, Toy("flow"), 400)]
    assert all(points[0] == 0 and len(points) == calls for points in made)
    columns = list(zip(*made, strict=True))[1:]
    for column, (low, high) in zip(columns, itertools.pairwise(edges), strict=True):
        spread(column, range(low, high))


@pytest.mark.parametrize("calls", [1, 2, 4, 6])
def test_range_of_thinned_at_equal_distances(calls: int):
    """Every point but 0 is met; neighbours lie (n - 1) / (calls - 1) apart, up to rounding."""
    given = {"calls": calls, "even": True}
    made = [trained(plan) for plan in plans("thinned", given, Toy("flow"), 400)]
    assert all(points[0] == 0 and len(points) == calls for points in made)
    assert {p for points in made for p in points[1:]} == (set(range(1, 12)) if calls > 1 else set())
    apart = 11 / max(1, calls - 1)
    for points in made:
        assert all(abs(b - a - apart) < 1 for a, b in itertools.pairwise(points[1:]))


@pytest.mark.parametrize(
    ("last", "allowed"), [(0.25, range(9, 12)), (0.4, range(7, 12)), (1.0, range(12))]
)
def test_range_of_refl(last: float, allowed: range):
    made = plans("refl", {"last": last}, Toy("flow"), 200)
    for plan in made:
        assert trained(plan) == [plan.steps[-1].start]
    spread([trained(plan)[0] for plan in made], allowed)


@pytest.mark.parametrize(("steps", "early_stop"), [(3, 0.4), (2, 0.8), (4, 0.25), (1, 1.0)])
def test_range_of_drtune(steps: int, early_stop: float):
    made = plans("drtune", {"train_steps": steps, "early_stop": early_stop}, Toy("flow"), 200)
    offsets = set()
    for plan in made:
        stop, train = plan.steps[-1].start, trained(plan)
        stride = (stop + 1) // steps
        assert len(train) == steps
        assert train[0] >= 0
        assert train[-1] <= stop
        assert all(b - a == stride for a, b in itertools.pairwise(train))
        offsets.add(train[0])
    assert len(offsets) > 1
    spread([plan.steps[-1].start for plan in made], range(N - round(early_stop * N), N))


@pytest.mark.parametrize("method", ["leapalign", "flowbp_lagrange"])
def test_range_of_two_leaps(method: str):
    options = read_options(method, {})
    chosen = [choices_of(method, plan, options) for plan in plans(method, {}, Toy("flow"), 400)]
    pairs = [(choice["k"], choice["j"]) for choice in chosen]
    assert all(0 <= k < j <= N - 1 for k, j in pairs)
    assert {k for k, _ in pairs} == set(range(N - 1))
    assert {j for _, j in pairs} == set(range(1, N))


@pytest.mark.parametrize(("order", "active"), [(1, 1), (3, 2), (5, 3), (2, 4)])
def test_supports_of_lagrange(order: int, active: int):
    """The first supports of each leap are called, the others are not."""
    given = {"order": order, "active": active}
    for plan in plans("flowbp_lagrange", given, Toy("flow"), 200):
        choice = choices_of("flowbp_lagrange", plan, read_options("flowbp_lagrange", given))
        leaps = supports_of(choice["k"], choice["j"], order), supports_of(choice["j"], N, order)
        assert trained(plan) == [i for leap in leaps for i in leap[:active]]
        assert [s.start for s in plan.steps if s.net != "cached"] == trained(plan)


@pytest.mark.parametrize(("active", "count"), [(1, 1), (3, 3), (N, N), (N + 5, N)])
def test_range_of_sparse(active: int, count: int):
    for plan in plans("flowbp_sparse", {"active": active}, Toy("flow"), 200):
        assert len(set(trained(plan))) == len(trained(plan)) == count
        assert set(trained(plan)) <= set(range(N))


@pytest.mark.parametrize("bias", [0.0, 1.0, 2.0])
def test_sparse_draws_late_steps_more_often(bias: float):
    """One active step: its frequency is (i + 1)^late_bias, within 4.5 deviations."""
    draws = 1500
    made = plans("flowbp_sparse", {"active": 1, "late_bias": bias}, Toy("flow"), draws)
    counts = Counter(trained(plan)[0] for plan in made)
    total = sum((i + 1) ** bias for i in range(N))
    for i in range(N):
        share = (i + 1) ** bias / total
        assert abs(counts[i] - draws * share) <= 4.5 * math.sqrt(draws * share * (1 - share)) + 1


@pytest.mark.parametrize(("active", "count"), [(2, 2), (4, 4), (7, 7), (N, N), (N + 5, N)])
def test_range_of_bridge(active: int, count: int):
    options = read_options("flowbp_bridge", {"active": active})
    middles = []
    for plan in plans("flowbp_bridge", {"active": active}, Toy("flow"), 200):
        choice = choices_of("flowbp_bridge", plan, options)
        j, train = choice["j"], choice["active"]
        middles.append(j)
        assert 1 <= j <= N - 1
        assert j in train
        assert len(train) == len(set(train)) == count
        assert any(i < j for i in train)
        assert set(train) <= set(range(N))
    assert set(middles) == set(range(1, N))
