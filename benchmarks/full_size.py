"""One ShortFT update on the full Stable Diffusion 1.5 or SDXL architecture, with random weights.

    python benchmarks/full_size.py                 # SD1.5, 512 × 512, bf16, per-step recomputation
    python benchmarks/full_size.py small           # the same script in seconds
    python benchmarks/full_size.py sd15 sdxl --batches 1 4 8       # for a GPU

Weights do not matter for time and memory, so that nothing is downloaded. Prints parameters, seconds
of one stage-1 update, and the peak of the process's memory so far (on a GPU: of its allocator, for
each batch by itself). On a GPU one update runs before the one that is timed. What larger models
would take is computed by benchmarks/memory_plan.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch
from accelerate import Accelerator
from full_models import MODELS

from shortft.drawing.progress import memory_text
from shortft.families import default_device
from shortft.families.base import Guidance
from shortft.memory import peak_memory_bytes
from shortft.methods.shortft import shortft_plan
from shortft.networks import ModelNetworks
from shortft.plans import Plan, inference_plan
from shortft.quiet import quiet
from shortft.rewards import make_reward
from shortft.step import Batch, Outcome, train_step

STEPS, SEGMENTS = 50, 4


class Rig:
    """A model at full size with its LoRAs, ready for updates."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        family_class, make, _ = MODELS[name]
        self.device, self.recompute = default_device(), not options.no_recompute
        torch.manual_seed(0)
        with quiet():
            self.family: Any = family_class(
                make(), name, precision=options.precision, device=self.device
            )
        self.family.encode_ahead(["red apple"])
        self.schedule = self.family.schedule(STEPS)
        self.nets = ModelNetworks(
            self.family,
            guidance=Guidance(self.family.default_guidance_scale, options.guidance_grad),
            loras=SEGMENTS,
            rank=options.rank,
            plain_jumps=True,  # in place of an unguided few-step LoRA, at its cost
        )
        self.plan: Plan = shortft_plan(self.schedule, SEGMENTS, 1)
        self.nets.train_only(self.plan.trainable)
        numbers = range(1, SEGMENTS + 1)
        self.loras = [p for n in numbers for p in self.nets.parameters_of(n).values()]
        self.optimizer = torch.optim.AdamW(self.loras, lr=1e-4)
        self.accelerator = Accelerator(cpu=self.device == "cpu")
        self.reward = make_reward("symmetry", None, self.device)

    def update(self, batch: int) -> Outcome:
        """One update, done when this returns."""
        outcome = train_step(
            self.plan,
            [Batch(["red apple"] * batch, list(range(batch)))],
            self.family,
            self.nets,
            self.schedule,
            self.reward,
            self.optimizer,
            self.accelerator,
            inference=inference_plan(self.schedule, SEGMENTS),
            max_grad_norm=1.0,
            recompute=self.recompute,
        )
        if self.device == "cuda":
            torch.cuda.synchronize()
        return outcome


def run(name: str, options: argparse.Namespace) -> None:
    """Print one model's figures."""
    rig = Rig(name, options)
    count = sum(p.numel() for p in rig.family.denoiser.parameters())
    learned = sum(p.numel() for p in rig.loras)
    device = torch.cuda.get_device_name() if rig.device == "cuda" else "CPU"
    print(
        f"{name}: denoiser {count / 1e6:.0f} M parameters, {options.precision}, "
        f"{rig.family.resolution} pixels; LoRAs {learned / 1e6:.0f} M; {device}",
        flush=True,
    )
    for batch in options.batches:
        try:
            if rig.device == "cuda":
                rig.update(batch)  # the first one of a shape is slow
                torch.cuda.reset_peak_memory_stats()
            began = time.monotonic()
            outcome = rig.update(batch)
            seconds = time.monotonic() - began
        except torch.OutOfMemoryError:
            rig.optimizer.zero_grad(set_to_none=True)
            print(f"  batch {batch}: out of memory", flush=True)
            continue
        print(
            f"  stage 1, batch {batch}: {rig.plan.calls} calls, {rig.plan.grad_calls} with "
            f"gradient, {seconds:.1f} s, peak {memory_text(peak_memory_bytes())}, gradient norm "
            f"{outcome.grad_norm:.3g}{', not finite' if outcome.skipped else ''}",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=["sd15"], help="small, sd15, sdxl")
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--guidance-grad", choices=("both", "positive"), default="both")
    parser.add_argument("--no-recompute", action="store_true")
    options = parser.parse_args()
    for name in options.models:
        run(name, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
