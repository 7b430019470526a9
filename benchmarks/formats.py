"""What a call and the decoder cost in each memory layout, with autocast and without.

    python benchmarks/formats.py                       # the embedded model, batch 8
    python benchmarks/formats.py sd15 --batch 4        # the full architecture, for a GPU

Seconds of one call of the policy (guidance, one LoRA), without gradient and with, and of decoding
the batch and back, the median of `--rounds`, layouts taking turns; on a GPU also the peak of memory
above what is held. `first` is channels first (NCHW), `last` channels last. Without autocast the
LoRA is in bf16 as well, which training does not do: it shows what autocast's own formats cost.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from full_models import MODELS

from shortft.families import default_device, load_family
from shortft.families.base import Guidance
from shortft.networks import ModelNetworks
from shortft.plans import Step
from shortft.quiet import quiet

LAYOUTS = {"first": torch.contiguous_format, "last": torch.channels_last}
PLAIN = patch("shortft.families.pipeline.autocast", lambda *_: contextlib.nullcontext())
STEP = Step(25, 26, "policy", 1, trains=True)


def family_of(model: str) -> Any:
    device = default_device()
    torch.manual_seed(0)
    if model not in MODELS:
        return load_family(model, precision="bf16", device=device)
    family_class, make, _ = MODELS[model]
    with torch.device(device), quiet():
        return family_class(make(), model, precision="bf16", device=device)


class Rig:
    """One model in one layout, with LoRAs in fp32 under autocast, or all in bf16."""

    def __init__(self, family: Any, layout: str, plain: bool, batch: int, rank: int) -> None:
        self.family, self.layout, self.plain = family, LAYOUTS[layout], plain
        guidance = Guidance(family.default_guidance_scale)
        self.nets = ModelNetworks(family, guidance=guidance, loras=1, rank=rank)
        if plain:
            self.nets._loras.to(torch.bfloat16)
        self.noise = family.noise(range(batch))
        self.cond = family.encode(["red apple"] * batch)

    def enter(self) -> contextlib.AbstractContextManager[Any]:
        self.family._layout = self.layout
        with quiet():
            self.family.denoiser.to(memory_format=self.layout)
            self.family.vae.to(memory_format=self.layout)
        return PLAIN if self.plain else contextlib.nullcontext()

    @torch.no_grad()
    def forward(self) -> None:
        self.nets.predict(STEP, self.noise, 500.0, self.cond)

    def gradient(self) -> None:
        x = self.noise.clone().requires_grad_()
        self.nets.predict(STEP, x, 500.0, self.cond).square().mean().backward()

    def decode(self) -> None:
        x = self.noise.contiguous(memory_format=self.layout).requires_grad_()
        self.family.decode(x).square().mean().backward()


def measure(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds, and GB above what is held before."""
    if not torch.cuda.is_available():
        began = time.process_time()
        work()
        return time.process_time() - began, 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held, began = torch.cuda.memory_allocated(), time.monotonic()
    work()
    torch.cuda.synchronize()
    return time.monotonic() - began, (torch.cuda.max_memory_allocated() - held) / 1e9


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="emoji", help=f"emoji, {', '.join(MODELS)}")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    family = family_of(options.model)
    rigs = {
        (layout, plain): Rig(family, layout, plain, options.batch, options.rank)
        for plain in (False, True)
        for layout in LAYOUTS
    }
    works = ("forward", "gradient", "decode")
    found: dict[Any, list[tuple[float, float]]] = {}
    for number in range(options.rounds + 1):
        for key, rig in rigs.items():
            with rig.enter():
                for work in works:
                    figures = measure(getattr(rig, work))
                    if number:  # the first round warms up
                        found.setdefault((key, work), []).append(figures)
    print(f"{options.model}, batch {options.batch}, rank {options.rank}, bf16, {family.device}")
    print(f"| channels | autocast | {' | '.join(works)} |\n|---|---|---|---|---|")
    for layout, plain in rigs:
        cells = [layout, "no" if plain else "yes"]
        for work in works:
            seconds, memory = zip(*found[(layout, plain), work], strict=True)
            peak = f", {median(memory):.2f} GB" if any(memory) else ""
            cells.append(f"{1e3 * median(seconds):.0f} ms{peak}")
        print(f"| {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
