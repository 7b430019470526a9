"""`shortft shortcut`: the training loop around `distill.Distiller`, and what it writes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from shortft.config import option_name
from shortft.distill import Bank, Distiller
from shortft.drawing.files import write_atomic
from shortft.errors import UserError
from shortft.families.base import Guidance
from shortft.model_card import public
from shortft.networks import few_step_guidance
from shortft.seeds import sample_seed
from shortft.shortcut_check import Fidelity, Jumper, measure

Kind = Literal["regression", "consistency"]
AT_FIRST, LATER = 0.2, 0.4  # shares of the budget that walking trajectories may take
MEASURING = 0.1  # seconds of measuring on the way for each second of training, but for the first
EVERY = 150  # seconds between saves
MAX_SKIPPED = 10  # updates in a row


def distill(
    distiller: Distiller,
    kind: Kind,
    *,
    minutes: float,
    batch_size: int,
    learning_rate: float,
    trajectories: int,
    report: Callable[[str], None],
    save: Callable[[], None],
    fidelity: Callable[[], Fidelity],
    sample_batch: int = 64,
    accumulation: int = 1,
) -> int:
    """Train for a wall-clock budget, sampling trajectories included, measuring not.

    A quarter of the trajectories is made before the first update, the rest evenly over three
    quarters of the time; fewer where that took more than a fifth of the time at first, or
    three fifths in all. After 30 % of it, regression adds states of the shortened chain for as
    many prompts as it adds true trajectories.

    Returns:
        how many trajectories were made.

    Raises:
        UserError: after `MAX_SKIPPED` updates in a row that were not finite.
    """
    began = time.monotonic()
    budget = minutes * 60
    optimizer = torch.optim.AdamW(
        distiller.parameters.values(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0
    )
    bank = Bank()
    images, prompts = torch.empty(0), torch.empty(0, dtype=torch.long)
    made = skipped = 0
    walking = measuring = took = 0.0  # seconds
    last_report = last_save = began

    def more(count: int) -> None:
        nonlocal made, images, prompts
        if kind == "regression":
            distiller.true_pieces(bank, count)
        else:  # it learns from the ends alone, which take a fraction of a bank's memory
            ends, rows = distiller.true_pieces(None, count)
            images = torch.cat([images, ends]) if made else ends
            prompts = torch.cat([prompts, rows])
        made += count

    def draw() -> Tensor:
        count = batch_size // accumulation
        if kind == "regression":
            return distiller.regression_loss(bank, count)
        return distiller.consistency_loss(images, prompts, count)

    smooth = math.nan
    while (elapsed := time.monotonic() - began) < budget:
        done = elapsed / budget
        share = AT_FIRST + LATER * done * bool(distiller.updates)
        affordable = not made or walking < budget * share
        if made < trajectories * min(1.0, 0.25 + done) and affordable:
            set_out = time.monotonic()
            more(sample_batch)
            if kind == "regression" and distiller.updates and done > 0.3:
                distiller.visited_pieces(bank, sample_batch)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            walking += time.monotonic() - set_out
            if made < trajectories * 0.25:
                continue
        warm = min(1.0, distiller.updates / 50 + 0.02)
        rate = learning_rate * warm * 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = distiller.update(draw, optimizer, accumulation)
        skipped = skipped + 1 if loss is None else 0
        if skipped >= MAX_SKIPPED:
            raise UserError(
                f"--learning-rate {learning_rate:g}: {MAX_SKIPPED} updates in a row had a loss or "
                "a gradient that is not finite; lower it, or use --precision fp32; what was saved "
                "before stays"
            )
        if loss is not None:
            smooth = loss if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss
        now = time.monotonic()
        if now - last_report > 20:
            last_report = now
            report(
                f"{elapsed / 60:5.1f} min  update {distiller.updates}  loss {smooth:.4f}  "
                f"lr {rate:.1e}  trajectories {made}  pieces {len(bank)}"
            )
        if now - last_save > EVERY:
            save()
            last_save = time.monotonic()
            if not measuring or measuring + took <= MEASURING * elapsed:
                f = fidelity()
                errors = " ".join(f"{e:.3f}" for e in f.jump_error)
                report(f"held-out: error {errors}  chain {f.chain_psnr:.1f} dB")
                took = time.monotonic() - last_save
                measuring, began, last_save = measuring + took, began + took, last_save + took
    save()
    return made


def check_same_chain(told: Path, chain: dict[str, Any]) -> int:
    """Refuse to go on with a LoRA that was made for another chain or guidance.

    Args:
        told: the JSON file beside the LoRA; one that is not there tells nothing.

    Returns:
        how many draws the LoRA has learned from; 0 where that is not told.

    Raises:
        UserError: naming the settings that differ.
    """
    if not told.is_file():
        return 0
    try:
        before = dict(json.loads(told.read_text(encoding="utf-8")))
        draws = int(before.get("draws", 0))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{told}: damaged ({error}); restore or remove it") from error
    for name, value in chain.items():
        if name != "model" and before.get(name, value) != value:
            raise UserError(
                f"{option_name(name)} {value}: {told} says that the LoRA was made for "
                f"{before[name]}; give that to go on by --resume, or another --output"
            )
    return draws


def distill_command(
    model: str,
    output: Path,
    kind: Kind,
    minutes: float,
    rank: int,
    batch_size: int,
    learning_rate: float,
    num_steps: int,
    segments: int,
    guidance_scale: float | None,
    shortcut_guidance_scale: float | None,
    trajectories: int,
    seed: int,
    resume: bool,
    precision: str = "fp32",
    prompts_path: Path | None = None,
    pipeline: str | None = None,
    resolution: int | None = None,
    accumulation: int = 1,
) -> None:
    """`shortft shortcut`: make a shortcut LoRA for a model and say how faithful it is."""
    from rich.console import Console

    from shortft.assets import prompts_for
    from shortft.families import load_family
    from shortft.inputs import read_prompts
    from shortft.sampling import check_segments

    if batch_size % accumulation:
        raise UserError(
            f"--accumulation {accumulation}: does not divide --batch-size {batch_size}; choose "
            "one of its divisors"
        )
    if output.suffix != ".safetensors":
        raise UserError(f"--output {output}: must end in .safetensors")
    if output.exists() and not resume:
        raise UserError(
            f"--output {output}: exists; pass --resume to go on from it, or another name"
        )
    if prompts_path is None:
        training, held_out = prompts_for(model, "train"), prompts_for(model, "held_out")[:32]
    else:  # every tenth prompt only measures
        listed = read_prompts(prompts_path)
        held_out = listed[::10][:32]
        training = [prompt for prompt in listed if prompt not in held_out] or listed
    console = Console()
    family = load_family(model, pipeline=pipeline, precision=precision, resolution=resolution)
    guidance = Guidance(family.default_guidance_scale if guidance_scale is None else guidance_scale)
    schedule = family.schedule(num_steps)
    check_segments(schedule, segments)
    if num_steps == segments:
        raise UserError(
            f"--segments {segments}, --num-steps {num_steps}: every segment is a single step, so "
            "that there is nothing to jump over; give fewer segments"
        )
    family.encode_ahead([*training, *held_out])  # the text encoders are not needed any more
    student_guidance = Guidance(
        shortcut_guidance_scale or few_step_guidance(family, guidance.scale)
    )
    distiller = Distiller(
        family,
        schedule,
        segments,
        guidance,
        training,
        rank=rank,
        student_guidance=student_guidance,
        seed=seed,
    )
    chain: dict[str, Any] = {  # what the LoRA is made for, and how it runs
        "model": public(model),
        "resolution": family.resolution,
        "num_steps": num_steps,
        "segments": segments,
        "guidance_scale": guidance.scale,
        "shortcut_guidance_scale": student_guidance.scale,
    }
    told = output.with_suffix(".json")

    def tell(figures: dict[str, Any]) -> None:
        whole = {**chain, "draws": distiller.draws, **figures}
        write_atomic(told, (json.dumps(whole, indent=2) + "\n").encode())

    def save() -> None:
        distiller.save(output)
        tell({})  # figures of an earlier LoRA say nothing of this one

    going_on = resume and output.exists()
    if going_on:
        distiller.draws = check_same_chain(told, chain)
        distiller.load(output)
    if not (going_on and told.is_file()):
        tell({})  # before the LoRA: one without its guidance would run with another
    noise = family.noise([sample_seed(seed, 3, i) for i in range(len(held_out))])
    held_out_cond = family.encode(held_out)

    def fidelity(*others: Jumper) -> list[Fidelity]:
        jumpers = [Jumper("shortcut", distiller.averaged(), student_guidance), *others]
        return measure(
            family,
            jumpers,
            schedule,
            segments,
            held_out_cond,
            noise,
            guidance,
            batch_size=batch_size // accumulation,
        )

    made = distill(
        distiller,
        kind,
        minutes=minutes,
        batch_size=batch_size,
        learning_rate=learning_rate,
        trajectories=trajectories,
        report=console.print,
        save=save,
        fidelity=lambda: fidelity()[0],
        # Without gradient there is room for more.
        sample_batch=min(64, 2 * batch_size // accumulation),
        accumulation=accumulation,
    )
    figures: dict[str, Any] = {
        "precision": precision,
        "kind": kind,
        "minutes": minutes,
        "updates": distiller.updates,
        "rank": rank,
        "batch_size": batch_size,
        "accumulation": accumulation,
        "learning_rate": learning_rate,
        "trajectories": made,
        "seed": seed,
        "held_out": [
            vars(f)
            for f in fidelity(
                Jumper("plain DDIM jump", family.denoiser, Guidance()),
                Jumper("guided DDIM jump", family.denoiser, guidance),
            )
        ],
    }
    tell(figures)
    for f in figures["held_out"]:
        errors = " ".join(f"{e:.3f}" for e in f["jump_error"])
        console.print(f"{f['name']}: error {errors}, chain {f['chain_psnr']:.1f} dB")
    console.print(f"{output}: check it on fresh samples by `shortft check`")
