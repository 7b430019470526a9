"""Why methods differ: each method's gradient beside the gradient of the whole true chain.

    python benchmarks/gradients.py [--reward clip:1,symmetry:3] [--adapter runs/mine/adapter]

For a batch of prompts and noise it writes a table and a chart. Per method:

- cosine: angle between the method's gradient (mean over its random draws) and the gradient of the
  true chain through every call, over the weights that the method trains. The true chain is that of
  the base with LoRAs where the method's act at inference ("full"); for a tuned shortcut, whose own
  chain is short, the one with a LoRA at every timestep.
- one draw: the same for one draw, mean over draws: what an update of that batch sees.
- norm: length of the mean gradient, in units of the true one.
- gap: mean reward where the method looks, minus the true chain's.
- norms of the gradient of the reward with respect to the latents: of one sample, mean over batch
  and draws, at the first, some middle and the last points that carry gradient; the chart has all.

LoRAs start at the identity, whose B matrices are zero and whose A matrices therefore have no
gradient yet. Without --adapter they are moved by a little noise (the same for all methods); with
it they are trained ones, for the methods whose LoRAs act where the adapter's do. Give it twice to
have both kinds: one of shortft, one of any other method.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shortft.adapter import AdapterInfo, load_into, read_info
from shortft.assets import EMBEDDED, prompts_for
from shortft.chain import run_chain
from shortft.drawing.files import write_atomic
from shortft.drawing.lines import Line, Panel, draw_lines
from shortft.families import load_family
from shortft.families.base import Family, Guidance
from shortft.methods import METHODS, make_plan, read_options
from shortft.methods.catalog import variant_settings
from shortft.networks import ModelNetworks
from shortft.plans import Placement, Plan, Step, inference_plan
from shortft.rewards import make_reward
from shortft.rewards.combine import WeightedSum
from shortft.schedule import Schedule
from shortft.seeds import generator, sample_seed
from shortft.shortcuts import GUIDED, find_shortcut
from shortft.step import leap_weight, noise_of_copy, states_of

# By where LoRAs act at inference: what is measured against the true chain of that placement.
GROUPS: dict[Placement, tuple[str, ...]] = {
    "everywhere": (
        *(name for name in METHODS if name not in ("shortft", "full")),
        "jumps:jump=shortcut",
        "jumps:jump=shortcut,shortcut=guided",
        "shortft_everywhere",
    ),
    "stacked": (
        "shortft",
        "shortft:tail=4",
        "shortft:tail=13",
        "shortft_pinned",
        "shortft_first_by_shortcut",
        "shortft_ddim",
        "shortft_plain_ddim",
        "shortft_dpm_2",
    ),
    "segments": ("shortft_segments", "shortft_segments:first_by_shortcut=true"),
}
TITLES = {
    "everywhere": "one LoRA at every timestep",
    "stacked": "ShortFT's LoRAs",
    "segments": "LoRAs 1…i at every timestep of segment i",
}
STAGED = ("shortft", "shortft_everywhere", "shortft_segments")
K, STEPS, RANK = 4, 50, 16
HEAD = ("method", "cosine", "one draw", "norm", "gap", "‖gradient‖ at the latents of")


@dataclass(frozen=True)
class Found:
    """What one plan gave.

    Attributes:
        weights: gradient of each LoRA that was trained, flat, by number.
        reward: mean where the plan looks.
        latents: by point, the norm of one sample's reward gradient, mean over the batch.
    """

    weights: Mapping[int, Tensor]
    reward: float
    latents: Mapping[int, float]


class Bench:
    """A batch, a model, a reward, and LoRAs that are not at the identity."""

    def __init__(
        self, reward: str, batch: int, noise: float, seed: int, adapters: Sequence[Path] = ()
    ) -> None:
        self.family: Family = load_family(EMBEDDED)
        self.schedule: Schedule = self.family.schedule(STEPS)
        self.reward: WeightedSum = make_reward(reward, None, self.family.device)
        listed = prompts_for(EMBEDDED, "train")
        self.prompts = [listed[i * len(listed) // batch] for i in range(batch)]
        self.seeds = [sample_seed(seed, 1, i) for i in range(batch)]
        self.cond = self.family.encode(self.prompts)
        self.noise = self.family.noise(self.seeds)
        self.move, self.seed = noise, seed
        self.adapters: dict[Placement, tuple[Path, AdapterInfo]] = {}
        for path in adapters:
            info = read_info(path)
            self.adapters[info.placement] = path, info

    def networks(self, placement: Placement, which: str = GUIDED) -> ModelNetworks:
        """Networks with the adapter for this placement, or with LoRAs moved by noise."""
        path, info = self.adapters.get(placement, (None, None))
        shortcut, plain = find_shortcut(EMBEDDED, which, K), which == "plain"
        nets = ModelNetworks(
            self.family,
            guidance=Guidance(self.family.default_guidance_scale),
            shortcut_guidance=Guidance(shortcut.guidance_scale),
            loras=1 if placement == "everywhere" else K,
            rank=info.rank if info else RANK,
            shortcut=shortcut.path,
            merge=not plain,
            plain_jumps=plain,
        )
        if path is not None:
            load_into(nets, path)
            return nets
        draw = generator(self.seed, 2)
        with torch.no_grad():
            for number in range(1, nets.loras + 1):
                for parameter in nets.parameters_of(number).values():
                    parameter.add_(self.move * torch.randn(parameter.shape, generator=draw))
        return nets

    def states(self, nets: ModelNetworks, inference: Plan) -> Tensor:
        """The true chain's states."""
        return states_of(inference, nets, self.noise, self.cond, self.schedule)

    def found(self, nets: ModelNetworks, plan: Plan, inference: Plan, states: Tensor) -> Found:
        """Run a plan, forward and backward; what goes before the gradient is not run again."""
        nets.train_only(plan.trainable)
        for number in plan.trainable:
            for parameter in nets.parameters_of(number).values():
                parameter.grad = None
        seen: dict[int, Tensor] = {}

        def observe(point: int, latents: Tensor) -> None:
            if latents.requires_grad:
                latents.retain_grad()
                seen[point] = latents

        leaps: list[Tensor] = []
        whole_chain = plan.grad_mask[0] and not plan.needs_rollout
        latents = run_chain(
            from_states(plan, inference),
            nets,
            self.noise.clone().requires_grad_() if whole_chain else self.noise,
            self.cond,
            self.schedule,
            recompute=plan.grad_calls > 10,
            rollout=states,
            fresh_noise=lambda copy: noise_of_copy(self.family, self.seeds, copy),
            observe=observe,
            observe_leap=leaps.append,
        )
        images = self.family.decode(latents)
        scores = self.reward(images, self.prompts * (1 + plan.renoise))
        (scores * leap_weight(leaps, plan.leap_tau)).mean().backward()
        weights = {
            number: torch.cat(
                [
                    (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                    for p in nets.parameters_of(number).values()
                ]
            )
            for number in plan.trainable
        }
        # The mean over the batch leaves each sample a share of its gradient.
        size = len(self.prompts)
        norms = {
            point: float(size * x.grad.flatten(1).norm(dim=1).mean())
            for point, x in seen.items()
            if x.grad is not None
        }
        return Found(weights, float(scores.detach().mean()), norms)


def from_states(plan: Plan, inference: Plan) -> Plan:
    """The same plan with the true chain's states in place of the calls that it shares with it.

    Only calls before the first gradient: values are the same, and nothing flows there.
    """
    steps = list(plan.steps)
    for i, (step, true) in enumerate(zip(plan.steps, inference.steps, strict=False)):
        if plan.grad_mask[i] or replace(step, input_grad=1.0) != true:
            break
        steps[i] = Step(i, i + 1, "cached", pin=True)
    return replace(plan, steps=tuple(steps))


def whole(plan: Plan) -> Plan:
    """An inference chain with gradient to every LoRA call."""
    steps = tuple(replace(step, trains=step.adapters > 0) for step in plan.steps)
    loras = max(step.adapters for step in steps)
    return Plan(steps, tuple(range(1, loras + 1)))


def flat(weights: Mapping[int, Tensor], numbers: Sequence[int]) -> Tensor:
    return torch.cat([weights[number] for number in numbers])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


def drawn(
    names: Sequence[str], bench: Bench, options: argparse.Namespace
) -> Iterator[tuple[str, list[Plan], str]]:
    """Each method's plans, and its shortcut.

    They are the draws of random ones, and every stage of those with stages.
    """
    for name in names:
        settings: Mapping[str, Any] = variant_settings(name, K)
        method = settings["method"]
        values = read_options(method, settings.get("method_options") or {})
        shortcut = settings.get("shortcut") or METHODS[method].shortcut or GUIDED
        for stage in range(1, K + 1) if name in STAGED else (1,):
            plans = [
                make_plan(
                    method,
                    bench.schedule,
                    K,
                    stage,
                    generator(options.seed, 3, i),
                    values,
                    timestep_lora=settings.get("timestep_lora", True),
                )
                for i in range(options.draws)
            ]
            shown = f"{name}, stage {stage}" if stage > 1 else name
            yield shown, plans if len(set(plans)) > 1 else plans[:1], shortcut


def mean_norms(found: Sequence[Found]) -> dict[int, float]:
    """By point, over the draws that carry gradient there."""
    points = sorted({point for one in found for point in one.latents})
    norms = {p: [one.latents[p] for one in found if p in one.latents] for p in points}
    return {point: sum(values) / len(values) for point, values in norms.items()}


def row(name: str, found: Sequence[Found], true: Found, schedule: Schedule) -> str:
    """One line of the table."""
    numbers = sorted(found[0].weights)
    expected = flat(true.weights, numbers)
    gradients = [flat(one.weights, numbers) for one in found]
    mean = torch.stack(gradients).mean(0)
    one_draw = sum(cosine(gradient, expected) for gradient in gradients) / len(found)
    gap = sum(one.reward for one in found) / len(found) - true.reward
    norms = mean_norms(found)
    points = list(norms)
    picked = sorted({points[i * (len(points) - 1) // 4] for i in range(5)}) if points else []
    names = [*(f"{t:.0f}" for t in schedule.timesteps.tolist()), "end"]
    cells = [name, f"{cosine(mean, expected):.3f}", f"{one_draw:.3f}"]
    cells += [f"{float(mean.norm() / expected.norm()):.2f}", f"{gap:+.4f}"]
    cells.append(", ".join(f"{names[p]}: {norms[p]:.3g}" for p in picked))
    return f"| {' | '.join(cells)} |"


def chart(path: Path, groups: Mapping[str, Mapping[str, dict[int, float]]], x: Tensor) -> Path:
    """Norms by timestep, one panel for each way to place LoRAs, the true chain's drawn wide."""
    times = [*x.tolist(), 0.0]
    label = "‖d reward / d latents‖ of one sample"
    panels = []
    for title, norms in groups.items():
        lines = [
            Line(
                name,
                [times[p] for p in found],
                list(found.values()),
                strong=name == next(iter(norms)),
            )
            for name, found in norms.items()
        ]
        panels.append(Panel(lines, "timestep", label, title, log="y", falling_x=True))
    return draw_lines(path, *panels)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reward", default="clip:1,symmetry:3")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--draws", type=int, default=4, help="plans drawn of random methods")
    parser.add_argument("--noise", type=float, default=0.01, help="how far the LoRAs are moved")
    parser.add_argument("--adapter", type=Path, action="append", default=[], help="a trained one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/gradients"))
    options = parser.parse_args(arguments)
    bench = Bench(options.reward, options.batch, options.noise, options.seed, options.adapter)
    lines = [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    print("\n".join(lines), flush=True)
    groups: dict[str, dict[str, dict[int, float]]] = {}
    for placement, names in GROUPS.items():
        nets, inference = bench.networks(placement), inference_plan(bench.schedule, K, placement)
        states = bench.states(nets, inference)
        true = bench.found(nets, whole(inference), inference, states)
        norms = groups.setdefault(TITLES[placement], {})

        def add(name: str, found: Sequence[Found], true: Found = true, norms: Any = norms) -> None:
            norms[name] = mean_norms(found)
            lines.append(row(name, found, true, bench.schedule))
            print(lines[-1], flush=True)

        add(f"full: {TITLES[placement]}", [true])
        for name, plans, shortcut in drawn(names, bench, options):
            used = nets if shortcut == GUIDED else bench.networks(placement, shortcut)
            add(name, [bench.found(used, plan, inference, states) for plan in plans])
    write_atomic(options.output_dir / "gradients.md", ("\n".join(lines) + "\n").encode())
    chart(options.output_dir / "gradients.png", groups, bench.schedule.timesteps)
    text = json.dumps({"norms": groups, "settings": vars(options)}, indent=2, default=str)
    write_atomic(options.output_dir / "gradients.json", (text + "\n").encode())
    print(options.output_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
