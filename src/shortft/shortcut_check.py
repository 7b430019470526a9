"""How faithful is a shortcut? Its jumps and its chain against the base's own chain."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from shortft.chain import run_chain
from shortft.errors import UserError
from shortft.families.base import Conditioning, Family, Guidance, branches
from shortft.plans import Plan, Step, base_plan
from shortft.sampling import check_segments, decode_few
from shortft.schedule import Schedule, jump, segments


@dataclass(frozen=True)
class Jumper:
    """A network that jumps over segments: the shortcut, or the base itself."""

    name: str
    module: nn.Module
    guidance: Guidance

    def evaluations(self, cond: Conditioning) -> int:
        """Network evaluations per jump: two under guidance that needs the empty prompt."""
        return branches(cond, self.guidance)


@dataclass(frozen=True)
class Jumping:
    """The base chain with some jumps made by a jumper; carries no reward LoRA."""

    family: Family
    guidance: Guidance
    jumper: Jumper

    def predict(
        self, step: Step, latents: Tensor, timestep: float, cond: Conditioning, **_: object
    ) -> Tensor:
        """Without gradient, so that there is nothing to recompute."""
        if step.net == "shortcut":
            net, g = self.jumper.module, self.jumper.guidance
        else:
            net, g = self.family.denoiser, self.guidance
        return self.family.predict(net, latents, timestep, cond, g)


@dataclass(frozen=True)
class Fidelity:
    """How close a jumper comes to the base's guided chain.

    Attributes:
        name: of the jumper.
        evaluations: network evaluations per jump.
        jump_error: per segment, ‖jump - end‖ / ‖end - start‖ from true starts, mean over samples.
        chain_psnr: dB of the images of ShortFT's stage-1 chain (segment 1 by the base), against
            the images of the true chain; mean over samples.
        all_jumps_psnr: dB with segment 1 jumped over too.
    """

    name: str
    evaluations: int
    jump_error: tuple[float, ...]
    chain_psnr: float
    all_jumps_psnr: float


def jump_plan(schedule: Schedule, k: int, *, first: bool) -> Plan:
    """ShortFT's stage-1 chain without LoRAs; with `first`, segment 1 is jumped over as well."""
    steps = []
    for number, part in enumerate(segments(schedule, k), start=1):
        *walk, last = part
        if number == 1 and not first:
            steps += [Step(i, i + 1, "base") for i in walk]
        elif walk:
            steps.append(Step(walk[0], last, "shortcut"))
        steps.append(Step(last, last + 1, "base"))
    return Plan(tuple(steps))


def psnr(images_BCHW: Tensor, reference_BCHW: Tensor) -> Tensor:
    """(B,) peak signal-to-noise ratio in dB of images in [0, 1]."""
    error = (images_BCHW - reference_BCHW).square().flatten(1).mean(1)
    return -10 * error.clamp(min=1e-10).log10()


@torch.no_grad()
def measure(
    family: Family,
    jumpers: Sequence[Jumper],
    schedule: Schedule,
    k: int,
    cond: Conditioning,
    noise: Tensor,
    guidance: Guidance,
    *,
    batch_size: int = 32,
) -> list[Fidelity]:
    """Measure jumpers on the base's own trajectories from the given noise (B, C, h, w)."""
    parts = segments(schedule, k)
    errors: list[list[Tensor]] = [[] for _ in jumpers]
    chains: list[list[Tensor]] = [[] for _ in jumpers]
    jumps: list[list[Tensor]] = [[] for _ in jumpers]
    for rows in torch.arange(len(noise)).split(batch_size):
        states: dict[int, Tensor] = {}
        here = cond[rows]
        walk = Jumping(family, guidance, jumpers[0])
        run_chain(
            base_plan(schedule), walk, noise[rows], here, schedule, observe=states.__setitem__
        )
        reference = decode_few(family, states[schedule.num_steps])
        for index, jumper in enumerate(jumpers):
            nets = Jumping(family, guidance, jumper)
            errors[index].append(
                torch.stack(
                    [_jump_error(nets, schedule, part, states, here) for part in parts], dim=1
                )
            )
            for first, collected in ((False, chains), (True, jumps)):
                end = run_chain(
                    jump_plan(schedule, k, first=first), nets, noise[rows], here, schedule
                )
                collected[index].append(psnr(decode_few(family, end), reference))
    return [
        Fidelity(
            jumper.name,
            jumper.evaluations(cond),
            tuple(torch.cat(errors[i]).mean(0).tolist()),
            float(torch.cat(chains[i]).mean()),
            float(torch.cat(jumps[i]).mean()),
        )
        for i, jumper in enumerate(jumpers)
    ]


def _jump_error(
    nets: Jumping,
    schedule: Schedule,
    part: tuple[int, ...],
    states: dict[int, Tensor],
    cond: Conditioning,
) -> Tensor:
    """(B,) relative error of one jump over a segment, from its true start."""
    first, last = part[0], part[-1]
    if first == last:
        return torch.zeros(len(states[first]))
    step = Step(first, last, "shortcut")
    prediction = nets.predict(step, states[first], float(schedule.timesteps[first]), cond)
    landed = jump(schedule, states[first], prediction, first, last)
    missed = (landed - states[last]).flatten(1).norm(dim=1)
    return (missed / (states[last] - states[first]).flatten(1).norm(dim=1)).cpu()


def better_than_ddim(fidelities: Sequence[Fidelity]) -> bool:
    """Whether the first jumper beats, on every segment and the chain, those that cost no more.

    So a guided shortcut is measured against guided jumps too: else any LoRA that changes little
    would pass by its guidance alone.
    """
    shortcut, *others = fidelities
    for rival in others:
        if rival.evaluations > shortcut.evaluations:
            continue
        jumps = zip(shortcut.jump_error, rival.jump_error, strict=True)
        if shortcut.chain_psnr <= rival.chain_psnr or any(a > b for a, b in jumps):
            return False
    return True


def check_command(
    model: str,
    shortcut: str,
    num_prompts: int,
    seed: int,
    num_steps: int,
    segments: int,
    guidance_scale: float | None,
    shortcut_guidance_scale: float | None = None,
    shortcut_scale: float | None = None,
    output: Path | None = None,
    prompts_path: Path | None = None,
    pipeline: str | None = None,
    resolution: int | None = None,
    precision: str = "fp32",
    batch_size: int = 16,
) -> int:
    """Print the table of `shortft check`; 1 if the shortcut is no better than a DDIM jump."""
    from rich.console import Console
    from rich.table import Table

    from shortft.assets import prompts_for
    from shortft.drawing.files import write_atomic
    from shortft.families import load_family
    from shortft.inputs import read_prompts
    from shortft.networks import SHORTCUT, activate, few_step_guidance, view
    from shortft.seeds import sample_seed
    from shortft.shortcuts import find_shortcut

    found = find_shortcut(model, shortcut, segments, guidance_scale=shortcut_guidance_scale)
    path = found.path
    if path is None:
        raise UserError(
            f"--shortcut {shortcut}: there is nothing to check; give `guided`, `unguided`, a "
            "LoRA's file or a published one's name"
        )
    if output is not None and output.resolve() == path.with_suffix(".json").resolve():
        raise UserError(f"--output {output}: holds the shortcut's own settings; give another name")
    prompts = read_prompts(prompts_path) if prompts_path else prompts_for(model, "held_out")
    prompts = [prompts[i % len(prompts)] for i in range(num_prompts)]
    family = load_family(model, pipeline=pipeline, precision=precision, resolution=resolution)
    scale = family.default_guidance_scale if guidance_scale is None else guidance_scale
    schedule = family.schedule(num_steps)
    check_segments(schedule, segments)
    own = shortcut_guidance_scale or found.guidance_scale or few_step_guidance(family, scale)
    module = view(family.denoiser)
    family.load_lora(module, path, SHORTCUT)
    activate(module, {SHORTCUT: shortcut_scale or found.scale})
    module.requires_grad_(False)
    jumpers = [
        Jumper("shortcut", module, Guidance(own)),
        Jumper("plain DDIM jump", family.denoiser, Guidance()),
        Jumper("guided DDIM jump", family.denoiser, Guidance(scale)),
    ]
    family.encode_ahead(prompts)  # the text encoders are not needed any more
    console = Console()
    with console.status(f"{num_steps}-step chains of {num_prompts} prompts"):
        measured = measure(
            family,
            jumpers,
            schedule,
            segments,
            family.encode(prompts),
            family.noise([sample_seed(seed, 0, i) for i in range(num_prompts)]),
            Guidance(scale),
            batch_size=batch_size,
        )
    table = Table(title=f"{path.name} on {model}: {num_prompts} held-out prompts, seed {seed}")
    table.add_column("jump", no_wrap=True)
    heads = ["calls", *(f"error {i}" for i in range(1, segments + 1)), "chain", "all jumps"]
    for head in heads:
        table.add_column(head, justify="right")
    for f in measured:
        cells = [f"{error:.3f}" for error in f.jump_error]
        table.add_row(
            f.name, str(f.evaluations), *cells, f"{f.chain_psnr:.1f}", f"{f.all_jumps_psnr:.1f}"
        )
    console.print(table)
    console.print(
        "calls: network evaluations per jump. error i: ‖jump - end‖ / ‖end - start‖ over segment "
        "i. chain: dB of the images of ShortFT's stage-1 chain against the base's; all jumps: with "
        "segment 1 jumped over too.",
        style="dim",
    )
    if output is not None:
        write_atomic(output, (json.dumps([asdict(f) for f in measured], indent=2) + "\n").encode())
    if better_than_ddim(measured):
        console.print("It is better than DDIM jumps that cost no more, on every segment.")
        if measured[0].chain_psnr < measured[2].chain_psnr:
            console.print(
                "Over the chain a guided DDIM jump is closer to the base (`--shortcut none`)."
            )
        return 0
    console.print(
        "[bold]The shortcut is no better than DDIM jumps[/bold] that cost no more: it does not "
        "preserve this model's trajectory. Use another few-step LoRA, train one by `shortft "
        "shortcut`, or pass `--shortcut none`."
    )
    return 1
