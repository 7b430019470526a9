"""One update of each method on the full Stable Diffusion 1.5 or SDXL architecture, random weights.

    python benchmarks/full_size.py                 # ShortFT, SD1.5, 512 × 512, bf16, recomputed
    python benchmarks/full_size.py small           # the same script in seconds
    python benchmarks/full_size.py sd15 sdxl --batches 1 4 8 --methods all       # for a GPU

Weights do not matter for time and memory, so that nothing is downloaded. Prints per method and
batch the network calls of an update (ShortFT: of stage 1), how many carry gradient, seconds (the
median of `--updates`), and the peak of the process's memory so far (on a GPU: of its allocator, for
each row by itself). On a GPU one update runs before those that are timed. Jumps run the base
itself without guidance, at an unguided few-step LoRA's cost. What larger models would take is
computed by benchmarks/memory_plan.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from full_models import MODELS

from shortft.drawing.progress import memory_text
from shortft.errors import UserError
from shortft.families import default_device
from shortft.families.base import Guidance
from shortft.memory import peak_memory_bytes
from shortft.methods import METHODS, make_plan, placement_of, read_options
from shortft.methods.catalog import variant_settings
from shortft.networks import ModelNetworks
from shortft.plans import Plan, inference_plan, parts_for
from shortft.quiet import quiet
from shortft.rewards import make_reward
from shortft.seeds import generator
from shortft.step import Batch, Outcome, train_step

STEPS, SEGMENTS = 50, 4


def method_of(name: str) -> tuple[str, dict[str, Any]]:
    """A method and its options by a competitor's name.

    Raises:
        UserError: if there is none of that name, or it sets more than options of the method.
    """
    settings: dict[str, Any] = variant_settings(name, SEGMENTS)
    if beyond := sorted(settings.keys() - {"method", "method_options"}):
        raise UserError(f"--methods {name}: sets {', '.join(beyond)}, which is not measured here")
    return settings["method"], read_options(settings["method"], settings.get("method_options", {}))


class Rig:
    """A method on a model at full size with its LoRAs, ready for updates."""

    def __init__(self, family: Any, name: str, options: argparse.Namespace) -> None:
        self.method, self.values = method_of(name)
        self.family = family
        self.schedule = family.schedule(STEPS)
        placement = placement_of(self.method, self.values)
        parts = parts_for(placement, SEGMENTS)
        self.inference = inference_plan(self.schedule, parts, placement)
        self.nets = ModelNetworks(
            family,
            guidance=Guidance(family.default_guidance_scale, options.guidance_grad),
            loras=SEGMENTS if placement in ("stacked", "segments") else 1,
            rank=options.rank,
            plain_jumps=True,
        )
        numbers = range(1, self.nets.loras + 1)
        self.loras = [p for n in numbers for p in self.nets.parameters_of(n).values()]
        self.optimizer = torch.optim.AdamW(self.loras, lr=1e-4)
        self.accelerator = Accelerator(cpu=family.device.type == "cpu")
        self.reward = make_reward("symmetry", None, family.device)
        self.recompute = not options.no_recompute

    def plan(self, update: int) -> Plan:
        draw = generator(0, update)
        return make_plan(self.method, self.schedule, SEGMENTS, 1, draw, self.values)

    def update(self, plan: Plan, batch: int) -> Outcome:
        """One update, done when this returns."""
        self.nets.train_only(plan.trainable)
        outcome = train_step(
            plan,
            [Batch(["red apple"] * batch, list(range(batch)))],
            self.family,
            self.nets,
            self.schedule,
            self.reward,
            self.optimizer,
            self.accelerator,
            inference=self.inference,
            max_grad_norm=1.0,
            recompute=self.recompute,
        )
        if self.family.device.type == "cuda":
            torch.cuda.synchronize()
        return outcome


def measure(rig: Rig, batch: int, updates: int) -> str:
    """The cells of one row."""
    cuda = rig.family.device.type == "cuda"
    rows: list[tuple[int, int, float]] = []
    try:
        if cuda:
            rig.update(rig.plan(0), batch)  # the first one of a shape is slow
            torch.cuda.reset_peak_memory_stats()
        for number in range(updates):
            plan = rig.plan(number)
            began = time.monotonic()
            outcome = rig.update(plan, batch)
            extra = STEPS if plan.needs_rollout else 0
            rows.append((plan.calls + extra, plan.grad_calls, time.monotonic() - began))
    except torch.OutOfMemoryError:
        rig.optimizer.zero_grad(set_to_none=True)
        return "out of memory | | | |"
    calls, with_gradient, seconds = (median(column) for column in zip(*rows, strict=True))
    norm = f"{outcome.grad_norm:.3g}{', not finite' if outcome.skipped else ''}"
    peak = memory_text(peak_memory_bytes())
    return f"{calls:g} | {with_gradient:g} | {seconds:.2f} | {peak} | {norm}"


def run(model: str, options: argparse.Namespace) -> None:
    """Print one model's table."""
    device = default_device()
    family_class, make, _ = MODELS[model]
    torch.manual_seed(0)
    with quiet():
        family: Any = family_class(make(), model, precision=options.precision, device=device)
    family.encode_ahead(["red apple"])
    count = sum(p.numel() for p in family.denoiser.parameters())
    print(
        f"{model}: denoiser {count / 1e6:.0f} M parameters, {options.precision}, "
        f"{family.resolution} pixels; {STEPS} steps; "
        f"{'no ' if options.no_recompute else ''}recomputation; guidance "
        f"{options.guidance_grad}; rank {options.rank}; "
        f"{torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}"
    )
    print("| method | batch | LoRAs | calls | with gradient | s | peak | gradient norm |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name in options.methods:
        rig = Rig(family, name, options)
        learned = sum(p.numel() for p in rig.loras)
        for batch in options.batches:
            cells = measure(rig, batch, options.updates)
            print(f"| {name} | {batch} | {learned / 1e6:.0f} M | {cells} |", flush=True)
        del rig
        if device == "cuda":
            torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=["sd15"], help=", ".join(MODELS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument(
        "--methods", nargs="+", default=["shortft"], help="names, with options; all"
    )
    parser.add_argument("--updates", type=int, default=1, help="timed")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--guidance-grad", choices=("both", "positive"), default="both")
    parser.add_argument("--no-recompute", action="store_true")
    options = parser.parse_args()
    if unknown := sorted(set(options.models) - MODELS.keys()):
        parser.error(f"{', '.join(unknown)}: unknown; give one of {', '.join(MODELS)}")
    if options.methods == ["all"]:
        options.methods = list(METHODS)
    try:
        for name in options.methods:
            method_of(name)
    except UserError as wrong:
        parser.error(str(wrong))
    for name in options.models:
        run(name, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
