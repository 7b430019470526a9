"""The chain's gradient against finite differences and against hand-written steps, in float64."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shortft.chain import Networks, run_chain, scale_grad
from shortft.families.base import Conditioning, Guidance
from shortft.families.sd import StableDiffusion
from shortft.methods.shortft import shortft_plan
from shortft.networks import SHORTCUT, ModelNetworks, add_lora, lora_parameters, lora_state, view
from shortft.plans import Plan, Step, base_plan, inference_plan
from shortft.schedule import segments
from tiny import randomise_loras, tiny_family, to_float64

STEPS, K = 12, 4
PROMPTS = ["red apple", "panda face"]


def make_shortcut(family: StableDiffusion, path: Path) -> Path:
    module = view(family.denoiser)
    generator = torch.Generator().manual_seed(3)
    add_lora(module, SHORTCUT, rank=2, targets=family.shortcut_targets, generator=generator)
    for parameter in lora_parameters(module, SHORTCUT).values():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    family.save_lora(lora_state(module, SHORTCUT), path)
    return path


class Rig:
    """A tiny model in float64 with four LoRAs and a shortcut."""

    def __init__(self, tmp_path: Path, guidance: Guidance, prediction_type: str = "epsilon"):
        self.family = tiny_family(prediction_type)
        self.nets = ModelNetworks(
            self.family,
            guidance=guidance,
            loras=K,
            rank=2,
            shortcut=make_shortcut(self.family, tmp_path / "shortcut.safetensors"),
        )
        randomise_loras(self.nets)
        to_float64(self.family, self.nets)
        self.schedule = self.family.schedule(STEPS)
        cond = self.family.encode(PROMPTS)
        self.cond = cond.to(torch.float64)
        self.noise = self.family.noise([1, 2]).double()
        generator = torch.Generator().manual_seed(5)
        self.weights = torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64)

    def loss(self, plan: Plan, nets: Networks | None = None, **options: object) -> Tensor:
        """A smooth function of the pixels, before the clamp to [0, 1]."""
        nets = nets or self.nets
        latents = run_chain(plan, nets, self.noise, self.cond, self.schedule, **options)
        images = self.family.vae.decode(latents / 0.7, return_dict=False)[0]
        return (images * self.weights).sum()

    def gradients(self, plan: Plan, **options: object) -> dict[str, Tensor]:
        self.nets.train_only(plan.trainable)
        for number in range(1, K + 1):
            for parameter in self.nets.parameters_of(number).values():
                parameter.grad = None
        self.loss(plan, **options).backward()
        return {
            f"{number}.{name}": parameter.grad
            for number in range(1, K + 1)
            for name, parameter in self.nets.parameters_of(number).items()
            if parameter.grad is not None
        }


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path, Guidance(3.0))


class FixedPrefix:
    """Repeats the first predictions of the steps before the gradient starts.

    In segment 1 LoRA 1 acts there too, but by definition without gradient.
    """

    def __init__(self, rig: Rig, plan: Plan) -> None:
        self.rig, self.kept = rig, dict[int, Tensor]()
        self.prefix = {
            s.start for s, grad in zip(plan.steps, plan.grad_mask, strict=True) if not grad
        }

    def predict(
        self, step: Step, latents: Tensor, timestep: float, cond: Conditioning, **_: object
    ) -> Tensor:
        if step.start not in self.kept:
            prediction = self.rig.nets.predict(step, latents, timestep, cond)
            if step.start not in self.prefix:
                return prediction
            self.kept[step.start] = prediction
        return self.kept[step.start]


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_gradient_equals_finite_differences(rig: Rig, stage: int):
    """Along random directions in the space of all trained LoRA weights."""
    plan = shortft_plan(rig.schedule, K, stage)
    gradients = rig.gradients(plan)
    assert {int(name.partition(".")[0]) for name in gradients} == set(plan.trainable)
    parameters = {
        f"{number}.{name}": parameter
        for number in plan.trainable
        for name, parameter in rig.nets.parameters_of(number).items()
    }
    generator = torch.Generator().manual_seed(stage)
    nets = FixedPrefix(rig, plan)
    rig.loss(plan, nets)
    for _ in range(3):
        direction = {
            name: torch.randn(p.shape, generator=generator, dtype=p.dtype)
            for name, p in parameters.items()
        }
        slope = sum((gradients[name] * d).sum() for name, d in direction.items())
        h, values = 1e-5, []
        for sign in (1, -1):
            for name, d in direction.items():
                parameters[name].data.add_(d, alpha=sign * h)
            with torch.no_grad():
                values.append(rig.loss(plan, nets))
            for name, d in direction.items():
                parameters[name].data.sub_(d, alpha=sign * h)
        torch.testing.assert_close(slope, (values[0] - values[1]) / (2 * h), rtol=1e-5, atol=1e-7)


def guided(rig: Rig, module: torch.nn.Module, x: Tensor, t: int, scale: float) -> Tensor:
    """Classifier-free guidance written out."""
    cond = module(x, t, rig.cond.positive, return_dict=False)[0]
    if scale == 1:
        return cond
    uncond = module(x, t, rig.cond.negative, return_dict=False)[0]
    return uncond + scale * (cond - uncond)


def brute_force(rig: Rig, stage: int) -> Tensor:
    """ShortFT's chain written by hand: DDIM with alphas of its own, autograd over everything."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    power = torch.cumprod(1 - betas, 0)
    times = [t + 1 for t in range(0, 1000 // STEPS * STEPS, 1000 // STEPS)][::-1]
    assert times == [int(t) for t in rig.schedule.timesteps]
    x = rig.noise

    def move(x: Tensor, eps: Tensor, t: int, s: int | None) -> Tensor:
        here, there = power[t], power[s] if s is not None else power[0]
        x0 = (x - (1 - here).sqrt() * eps) / here.sqrt()
        return there.sqrt() * x0 + (1 - there).sqrt() * eps

    def policy(stacked: int) -> torch.nn.Module:
        return rig.nets.module(Step(0, 1, "policy", stacked, trains=True))

    for number in range(1, K + 1):
        inside = [t for t in times if 1000 * (K - number) / K <= t < 1000 * (K - number + 1) / K]
        *walk, last = inside
        if number <= stage:
            for t, s in itertools.pairwise(inside):
                module = policy(1) if number == 1 else rig.family.denoiser
                x = move(x, guided(rig, module, x, t, 3.0), t, s)
        elif walk:
            eps = guided(rig, rig.nets._shortcut, x, walk[0], 1.0)
            x = move(x, eps, walk[0], last)
        if number == stage:
            x = x.detach()
        after = [t for t in times if t < last]
        x = move(x, guided(rig, policy(number), x, last, 3.0), last, max(after, default=None))
    images = rig.family.vae.decode(x / 0.7, return_dict=False)[0]
    return (images * rig.weights).sum()


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_gradient_equals_brute_force_autograd(rig: Rig, stage: int):
    plan = shortft_plan(rig.schedule, K, stage)
    ours = rig.gradients(plan)
    rig.nets.train_only(plan.trainable)
    for number in plan.trainable:
        for parameter in rig.nets.parameters_of(number).values():
            parameter.grad = None
    loss = brute_force(rig, stage)
    torch.testing.assert_close(loss, rig.loss(plan), rtol=1e-10, atol=1e-10)
    loss.backward()
    for number in plan.trainable:
        for name, parameter in rig.nets.parameters_of(number).items():
            expected = parameter.grad
            assert expected is not None
            torch.testing.assert_close(ours[f"{number}.{name}"], expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("grad", ["both", "positive"])
def test_recomputation_changes_nothing(tmp_path: Path, prediction_type, grad):
    rig = Rig(tmp_path, Guidance(2.0, grad), prediction_type)
    plan = shortft_plan(rig.schedule, K, 1)
    plain, again = rig.gradients(plan), rig.gradients(plan, recompute=True)
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():  # branches in one batch, or one after the other
        torch.testing.assert_close(again[name], gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("grad", ["both", "positive"])
def test_recomputation_holds_one_branch_at_a_time(tmp_path: Path, grad):
    """So the exact gradient takes no more memory than that of the prompt's branch alone."""
    rig = Rig(tmp_path, Guidance(2.0, grad))
    plan = shortft_plan(rig.schedule, K, 1)
    rows: list[int] = []

    def record(_: object, arguments: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            rows.append(len(arguments[0]))

    for net in {rig.nets.module(step) for step in plan.steps}:
        net.register_forward_pre_hook(record)
    rig.gradients(plan, recompute=True)
    # The shortcut here is unguided; without its gradient the other branch runs once.
    branches = [
        2 if grad == "both" and step.net != "shortcut" else 1
        for step, with_gradient in zip(plan.steps, plan.grad_mask, strict=True)
        if with_gradient
    ]
    assert rows == [len(rig.noise)] * (2 * sum(branches))
    rows.clear()
    rig.gradients(plan)
    assert rows == [len(rig.noise) * count for count in branches]


def test_positive_guidance_leaves_out_the_negative_branch(tmp_path: Path):
    """Its gradient is that of a chain whose negative predictions are constants."""
    both = Rig(tmp_path, Guidance(2.0, "both"))
    positive = Rig(tmp_path, Guidance(2.0, "positive"))
    plan = shortft_plan(both.schedule, K, 4)  # one call with gradient: easy to write out
    with torch.no_grad():
        torch.testing.assert_close(both.loss(plan), positive.loss(plan))
    ours = positive.gradients(plan)

    last = plan.steps[-1]
    states: dict[int, Tensor] = {}
    with torch.no_grad():
        run_chain(
            plan,
            positive.nets,
            positive.noise,
            positive.cond,
            positive.schedule,
            observe=states.__setitem__,
        )
    x, t = states[last.start], int(positive.schedule.timesteps[last.start])
    module = positive.nets.module(last)
    with torch.no_grad():
        uncond = module(x, t, positive.cond.negative, return_dict=False)[0]
    cond = module(x, t, positive.cond.positive, return_dict=False)[0]
    eps = uncond + 2.0 * (cond - uncond)
    alpha, sigma = positive.schedule.alpha, positive.schedule.sigma
    x0 = (x - sigma[last.start] * eps) / alpha[last.start]
    end = alpha[last.stop] * x0 + sigma[last.stop] * eps
    for parameter in positive.nets.parameters_of(K).values():
        parameter.grad = None
    images = positive.family.vae.decode(end / 0.7, return_dict=False)[0]
    (images * positive.weights).sum().backward()
    for name, parameter in positive.nets.parameters_of(K).items():
        assert parameter.grad is not None
        torch.testing.assert_close(ours[f"{K}.{name}"], parameter.grad, rtol=1e-8, atol=1e-10)
    differs = both.gradients(plan)
    assert any(not torch.allclose(differs[name], ours[name]) for name in ours)


def test_steps_without_gradient_keep_no_graph(rig: Rig):
    """Activations kept for backward: one share per gradient call, none for the others."""

    def kept(plan: Plan, **options: object) -> int:
        rig.nets.train_only(plan.trainable)
        total = 0
        fixed = {
            p.untyped_storage().data_ptr()
            for module in (rig.family.denoiser, rig.family.vae, rig.nets._loras)
            for p in module.parameters()
        }
        shortcut = rig.nets._shortcut
        assert shortcut is not None
        fixed |= {p.untyped_storage().data_ptr() for p in shortcut.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            if tensor.untyped_storage().data_ptr() not in fixed:
                total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            latents = run_chain(plan, rig.nets, rig.noise, rig.cond, rig.schedule, **options)
        assert latents.requires_grad == bool(plan.grad_calls)
        return total

    assert kept(base_plan(rig.schedule)) == 0
    assert kept(inference_plan(rig.schedule, K)) == 0
    sizes = [kept(shortft_plan(rig.schedule, K, stage)) for stage in (1, 2, 3, 4)]
    assert sizes[0] > sizes[1] > sizes[2] > sizes[3] > 0
    # The last stage runs 12 calls but keeps one: far less than a twelfth more than that one.
    one = kept(Plan((Step(0, STEPS, "policy", K, trains=True),), tuple(range(1, K + 1))))
    assert sizes[3] < 1.05 * one
    # With recomputation only the steps' inputs stay.
    assert kept(shortft_plan(rig.schedule, K, 1), recompute=True) < 0.1 * sizes[3]


def test_base_and_shortcut_stay_bitwise_unchanged(rig: Rig):
    shortcut = rig.nets._shortcut
    assert shortcut is not None
    frozen = [*rig.family.denoiser.parameters(), *shortcut.parameters()]
    frozen += [*rig.family.vae.parameters()]
    before = [p.detach().clone() for p in frozen]
    for stage in (1, 2, 3, 4):
        plan = shortft_plan(rig.schedule, K, stage)
        trained = rig.nets.train_only(plan.trainable)
        others = [p for number in range(1, stage) for p in rig.nets.parameters_of(number).values()]
        kept = [p.detach().clone() for p in others]
        moved = [p.detach().clone() for p in trained]
        optimizer = torch.optim.AdamW(
            [p for n in range(1, K + 1) for p in rig.nets.parameters_of(n).values()], lr=1e-2
        )
        optimizer.zero_grad(set_to_none=True)
        rig.loss(plan).backward()
        optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(others, kept, strict=True))
        assert all(not torch.equal(a, b) for a, b in zip(trained, moved, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(frozen, before, strict=True))
    assert all(p.grad is None for p in frozen)


def test_pinned_steps_take_the_rollouts_values_and_keep_the_gradient(rig: Rig):
    states: list[Tensor] = []
    run_chain(
        base_plan(rig.schedule),
        rig.nets,
        rig.noise,
        rig.cond,
        rig.schedule,
        observe=lambda _, x: states.append(x),
    )
    rollout = torch.stack(states)
    plan = shortft_plan(rig.schedule, K, 1, pin=True)
    seen: dict[int, Tensor] = {}
    rig.nets.train_only(plan.trainable)
    end = run_chain(
        plan,
        rig.nets,
        rig.noise,
        rig.cond,
        rig.schedule,
        rollout=rollout,
        observe=seen.__setitem__,
    )
    for part in segments(rig.schedule, K)[1:]:
        torch.testing.assert_close(seen[part[-1]], rollout[part[-1]], rtol=0, atol=1e-14)
    end.sum().backward()
    first = rig.nets.parameters_of(1).values()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in first)
    with pytest.raises(ValueError, match="rollout"):
        run_chain(plan, rig.nets, rig.noise, rig.cond, rig.schedule)


@pytest.mark.parametrize("factor", [0.0, 0.1, 1.0])
def test_scale_grad(factor):
    x = torch.arange(3.0, requires_grad=True)
    y = scale_grad(x, factor)
    assert torch.equal(y.detach(), x.detach())
    if factor:
        y.sum().backward()
        torch.testing.assert_close(x.grad, torch.full((3,), factor))
    else:
        assert not y.requires_grad
