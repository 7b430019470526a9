"""Why methods differ: each method's gradient beside the gradient of the whole true chain.

    python benchmarks/gradients.py [--reward clip:1,symmetry:2]

For a batch of prompts and noise it prints, per method:

- cosine: angle between the method's gradient (mean over its random draws) and the gradient of the
  true chain through every call, over all LoRA weights. ShortFT's is measured against its own
  inference chain, with its stacked LoRAs; the others against the chain with one LoRA everywhere.
- single draw: the same for one draw, mean over draws: what an update of that batch sees.
- norm: length of the mean gradient, in units of the true one.
- gap: mean reward where the method looks, minus the true chain's.
- norms of the gradient of the reward with respect to the latents, at a few points of the chain.

LoRAs start at the identity, whose B matrices are zero and whose A matrices therefore have no
gradient yet, so that they are moved by a little noise first (the same for all methods).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from shortft.assets import EMBEDDED, prompts_for
from shortft.chain import run_chain
from shortft.families import load_family
from shortft.families.base import Family, Guidance
from shortft.methods import METHODS, make_plan, placement_of, read_options
from shortft.methods.catalog import VARIANTS
from shortft.networks import ModelNetworks
from shortft.plans import Plan, inference_plan
from shortft.rewards import make_reward
from shortft.rewards.combine import WeightedSum
from shortft.schedule import Schedule
from shortft.seeds import generator, sample_seed
from shortft.shortcuts import find_shortcut
from shortft.step import leap_weight, noise_of_copy, states_of

RANDOM = ("alignprop", "drtune", "refl", "leapalign", "flowbp_sparse", "flowbp_bridge")
SHORTFT = ("shortft", "shortft_pinned", "shortft_ddim", "shortft_plain_ddim", "shortft_dpm_2")
K, STEPS = 4, 50


class Bench:
    """A batch, a model, and the reward."""

    def __init__(self, reward: str, batch: int, noise: float, seed: int) -> None:
        self.family: Family = load_family(EMBEDDED)
        self.schedule: Schedule = self.family.schedule(STEPS)
        self.reward: WeightedSum = make_reward(reward, None, self.family.device)
        listed = prompts_for(EMBEDDED, "train")
        self.prompts = [listed[i * len(listed) // batch] for i in range(batch)]
        self.seeds = [sample_seed(seed, 1, i) for i in range(batch)]
        self.move, self.seed = noise, seed

    def networks(self, loras: int, *, plain: bool = False) -> ModelNetworks:
        """Networks with LoRAs that were moved a little."""
        shortcut = find_shortcut(EMBEDDED, "plain" if plain else "auto", K)
        nets = ModelNetworks(
            self.family,
            guidance=Guidance(self.family.default_guidance_scale),
            shortcut_guidance=Guidance(shortcut.guidance_scale),
            loras=loras,
            rank=16,
            shortcut=shortcut.path,
            merge=not plain,
            plain_jumps=plain,
        )
        draw = generator(self.seed, 2)
        with torch.no_grad():
            for number in range(1, loras + 1):
                for parameter in nets.parameters_of(number).values():
                    parameter.add_(self.move * torch.randn(parameter.shape, generator=draw))
        return nets

    def gradient(
        self, nets: ModelNetworks, plan: Plan, inference: Plan
    ) -> tuple[Tensor, float, dict[int, float]]:
        """The LoRAs' gradient, the mean reward, and ‖d reward / d latents‖ by point."""
        trained = nets.train_only(plan.trainable)
        for parameter in trained:
            parameter.grad = None
        cond, noise = self.family.encode(self.prompts), self.family.noise(self.seeds)
        seen: dict[int, Tensor] = {}

        def observe(point: int, latents: Tensor) -> None:
            if latents.requires_grad:
                latents.retain_grad()
                seen[point] = latents

        leaps: list[Tensor] = []
        rollout = (
            states_of(inference, nets, noise, cond, self.schedule) if plan.needs_rollout else None
        )
        latents = run_chain(
            plan,
            nets,
            noise,
            cond,
            self.schedule,
            recompute=plan.grad_calls > 10,
            rollout=rollout,
            fresh_noise=lambda copy: noise_of_copy(self.family, self.seeds, copy),
            observe=observe,
            observe_leap=leaps.append,
        )
        images = self.family.decode(latents)
        scores = self.reward(images, self.prompts * (1 + plan.renoise))
        (scores * leap_weight(leaps, plan.leap_tau)).mean().backward()
        flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        gradient = torch.cat([g.flatten() for g in flat])
        norms = {point: float(x.grad.norm()) for point, x in seen.items() if x.grad is not None}
        return gradient, float(scores.detach().mean()), norms


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


def whole(plan: Plan) -> Plan:
    """An inference chain with gradient to every LoRA call."""
    steps = tuple(replace(step, trains=step.net == "policy") for step in plan.steps)
    loras = max(step.adapters for step in steps)
    return Plan(steps, tuple(range(1, loras + 1)))


def shown(norms: dict[int, float], schedule: Schedule) -> str:
    """Gradient norms at the first, some middle and the last points that carry gradient."""
    points = sorted(norms)
    picked = sorted({points[i * (len(points) - 1) // 4] for i in range(5)}) if points else []
    names = [*(f"{t:.0f}" for t in schedule.timesteps.tolist()), "end"]
    return ", ".join(f"{names[p]}: {norms[p]:.3g}" for p in picked)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reward", default="clip:1,symmetry:2")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--draws", type=int, default=8, help="plans drawn of random methods")
    parser.add_argument("--noise", type=float, default=0.01, help="how far the LoRAs are moved")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="also write the table into this file")
    options = parser.parse_args()
    bench = Bench(options.reward, options.batch, options.noise, options.seed)
    head = ("method", "cosine", "single draw", "norm", "gap", "‖gradient‖ at the latents of")
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]

    def add(name: str, nets: ModelNetworks, true: tuple[Tensor, float], plans: list[Plan]) -> None:
        method = name if name in METHODS else "shortft"
        place = inference_plan(bench.schedule, K, placement_of(method))
        found = [bench.gradient(nets, plan, place) for plan in plans]
        mean = torch.stack([gradient for gradient, _, _ in found]).mean(0)
        single = sum(cosine(gradient, true[0]) for gradient, _, _ in found) / len(found)
        gap = sum(score for _, score, _ in found) / len(found) - true[1]
        cells = [name, f"{cosine(mean, true[0]):.3f}", f"{single:.3f}"]
        cells += [f"{float(mean.norm() / true[0].norm()):.2f}", f"{gap:+.4f}"]
        lines.append(f"| {' | '.join([*cells, shown(found[0][2], bench.schedule)])} |")
        print(lines[-1], flush=True)

    print("\n".join(lines), flush=True)
    nets = bench.networks(1)
    everywhere = inference_plan(bench.schedule, K, "everywhere")
    gradient, score, norms = bench.gradient(nets, whole(everywhere), everywhere)
    lines.append(f"| full | 1 | 1 | 1 | 0 | {shown(norms, bench.schedule)} |")
    print(lines[-1], flush=True)
    for name in [m for m in METHODS if m not in ("shortft", "full")]:
        draws = options.draws if name in (*RANDOM, "flowbp_lagrange") else 1
        values = read_options(name, {})
        plans = [
            make_plan(name, bench.schedule, K, 1, generator(options.seed, 3, i), values)
            for i in range(draws)
        ]
        add(name, nets, (gradient, score), plans)

    stacked = inference_plan(bench.schedule, K, "stacked")
    nets, plain = bench.networks(K), bench.networks(K, plain=True)
    gradient, score, norms = bench.gradient(nets, whole(stacked), stacked)
    lines.append(f"| shortft's true chain | 1 | 1 | 1 | 0 | {shown(norms, bench.schedule)} |")
    print(lines[-1], flush=True)
    for name in SHORTFT:
        given = VARIANTS.get(name, {}).get("method_options") or {}
        values = read_options("shortft", dict(given))  # type: ignore[call-overload]
        draw = generator(options.seed, 3)
        plan = make_plan("shortft", bench.schedule, K, 1, draw, values)
        add(name, plain if "plain" in name else nets, (gradient, score), [plan])
    if options.output:
        options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
