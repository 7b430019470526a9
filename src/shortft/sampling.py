"""Draw pictures with the true inference chain."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shortft.adapter import load_into, read_info
from shortft.assets import EMBEDDED
from shortft.chain import run_chain
from shortft.errors import UserError
from shortft.families.base import Family, Guidance
from shortft.inputs import make_output_dir
from shortft.methods.catalog import METHODS
from shortft.networks import ModelNetworks, few_step_guidance
from shortft.plans import Plan, base_plan, inference_plan
from shortft.schedule import Schedule, segments
from shortft.shortcuts import GUIDED, Shortcut, find_shortcut

DECODED_AT_ONCE = 1024 * 1024  # pixels: one picture of 1024 × 1024, 256 of 64 × 64


@dataclass(frozen=True)
class Sampler:
    """What draws a model's pictures: its networks, and the calls of them by which it does."""

    nets: ModelNetworks
    schedule: Schedule
    plan: Plan

    def draw(self, prompts: list[str], seeds: list[int], *, batch_size: int = 16) -> Tensor:
        """(B, 3, H, W) images in [0, 1] on the CPU; image i is of prompt i and seed i alone."""
        side = self.nets.family.resolution
        images = torch.empty(len(seeds), 3, side, side, dtype=torch.float32)
        for rows, drawn in self.in_batches(prompts, seeds, batch_size):
            images[rows] = drawn
        return images

    @torch.no_grad()
    def in_batches(
        self, prompts: list[str], seeds: list[int], batch_size: int
    ) -> Iterator[tuple[slice, Tensor]]:
        """The same as they are drawn: which ones, and the images."""
        family = self.nets.family
        for start in range(0, len(seeds), batch_size):
            rows = slice(start, start + batch_size)
            cond, noise = family.encode(prompts[rows]), family.noise(seeds[rows])
            latents = run_chain(self.plan, self.nets, noise, cond, self.schedule)
            yield rows, decode_few(family, latents).float().cpu()


@torch.no_grad()
def decode_few(family: Family, latents: Tensor) -> Tensor:
    """(B, 3, H, W) images in [0, 1] without gradient, few at a time.

    A decoder's activations are larger than the denoiser's: in fp32, SDXL's takes several GB for a
    picture of 1024 × 1024.
    """
    few = max(1, DECODED_AT_ONCE // family.resolution**2)
    return torch.cat([family.decode(part) for part in latents.split(few)])


def check_segments(schedule: Schedule, k: int) -> None:
    """Whether a chain can be cut into k segments.

    Raises:
        UserError: if not.
    """
    try:
        segments(schedule, k)
    except ValueError as error:
        raise UserError(f"--segments {k}, --num-steps {schedule.num_steps}: {error}") from error


def load_tuned(
    family: Family,
    adapter: Path | None,
    num_steps: int | None,
    guidance_scale: float | None,
    strength: float = 1.0,
    *,
    plain_chain: bool = False,
) -> Sampler:
    """The true inference chain of a model with an adapter, or of the base alone.

    Without a number of steps the adapter's own, for the base alone 50; likewise its guidance.

    Args:
        plain_chain: run a LoRA of the few-step model on the base's chain, at every timestep.
    """
    if adapter is None:
        schedule = family.schedule(num_steps or 50)
        scale = family.default_guidance_scale if guidance_scale is None else guidance_scale
        nets = ModelNetworks(family, guidance=Guidance(scale))
        return Sampler(nets, schedule, base_plan(schedule))
    info = read_info(adapter)
    schedule = info.schedule(family.schedule(num_steps or info.num_steps))
    check_segments(schedule, info.parts)
    scale = info.guidance_scale if guidance_scale is None else guidance_scale
    placement, own, shortcut = info.placement, info.config, Shortcut(None)
    if placement == "few_step" and plain_chain:
        placement = "everywhere"
    if placement == "few_step":
        auto = METHODS["tune_shortcut"].shortcut or GUIDED
        shortcut = find_shortcut(
            own["model"],
            own["shortcut"],
            info.segments,
            auto,
            own.get("shortcut_guidance_scale"),
        )
    jump_scale = own.get("shortcut_guidance_scale") or shortcut.guidance_scale
    nets = ModelNetworks(
        family,
        guidance=Guidance(scale),
        shortcut_guidance=Guidance(jump_scale or few_step_guidance(family, info.guidance_scale)),
        loras=info.loras,
        rank=info.rank,
        shortcut=shortcut.path,
        shortcut_scale=own.get("shortcut_scale") or shortcut.scale,
        plain_jumps=placement == "few_step" and own["shortcut"] == "plain",
    )
    load_into(nets, adapter)
    nets.train_only([])
    nets.set_strength(strength)
    return Sampler(nets, schedule, inference_plan(schedule, info.parts, placement))


def sample(
    model: str | None,
    adapter: Path | None,
    prompts: list[str],
    output_dir: Path,
    seed: int,
    num_steps: int | None,
    guidance_scale: float | None,
    strength: float,
    batch_size: int,
    pipeline: str | None = None,
    precision: str = "fp32",
) -> None:
    """`shortft sample`: one picture per prompt; picture i has seed + i, as in diffusers.

    Without a model the adapter's own, or else the embedded one.
    """
    from rich.console import Console

    from shortft.drawing.grids import save_images
    from shortft.families import load_family

    # A wrong path is told before the model is loaded.
    info = read_info(adapter) if adapter is not None else None
    resolution = info.resolution if info else None
    model, pipeline = info.base(model, pipeline) if info else (model or EMBEDDED, pipeline)
    make_output_dir("--output-dir", output_dir)
    console = Console()
    with console.status(f"loading {model}"):
        family = load_family(model, pipeline=pipeline, precision=precision, resolution=resolution)
        sampler = load_tuned(family, adapter, num_steps, guidance_scale, strength)
        family.encode_ahead(prompts)  # the text encoders are not needed any more
    seeds = [seed + i for i in range(len(prompts))]
    with console.status(f"{len(prompts)} pictures, {sampler.plan.calls} steps each"):
        for rows, images in sampler.in_batches(prompts, seeds, batch_size):
            saved = save_images(output_dir, images, prompts[rows], seeds[rows], first=rows.start)
            for path in saved:
                console.print(str(path), markup=False, highlight=False, soft_wrap=True)
