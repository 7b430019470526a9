"""Before training: does a shortcut follow the base's own chain, or would it teach another model?

A LoRA that leaves the trajectory trains the reward LoRAs on pictures that inference never draws.
So the jumps that training is about to make are measured on a few prompts first, and compared with
what the base itself does in the same jumps under the same guidance: a shortcut that does not land
clearly closer is refused. That finds LoRAs which do not help to jump: random or damaged ones, one
of another base, one that changes next to nothing. A shortcut that is worse than it could be but
still better than the base's jump passes; no released adversarial model or style was at hand to try.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from shortft.chain import run_chain
from shortft.drawing.files import write_atomic
from shortft.errors import UserError
from shortft.plans import Step, base_plan
from shortft.schedule import jump
from shortft.seeds import CHECK, sample_seed
from shortft.shortcuts import ships
from shortft.trainer import Trainer

PROMPTS = 4
# Share of the base's error by which a shortcut must stay below it. Reward LoRAs land within a few
# per cent of the base, on either side, as does a twentieth of the shipped shortcut; the whole of it
# lands 16 to 36 % closer (docs/shortcuts.md).
MARGIN = 0.1
RECORD = "shortcut_check.json"


def require_faithful(trainer: Trainer, report: Callable[[str], None]) -> None:
    """Refuse a shortcut that does not preserve the base's trajectory.

    Those that ship were measured when they were made. A verdict is kept in the run's folder, so
    that `--resume` does not measure again.

    Args:
        report: told the cost before, and the figures after.

    Raises:
        UserError: with both figures and what to do instead.
    """
    config = trainer.config
    shipped = ships(config.shortcut) or trainer.shortcut.path is None
    if shipped or not config.check_shortcut:
        return
    steps = trainer.plan(0, 1).steps
    jumps = [Step(s.start, s.stop, "shortcut") for s in steps if s.net == "shortcut"]
    # A few-step model that is tuned itself has no trajectory to keep.
    if not jumps or trainer.placement == "few_step":
        return
    record = config.output_dir / RECORD
    about = described(trainer)
    # The first process's answer holds for all, which then measure together or not at all.
    if broadcast_object_list([_recorded(record) == about])[0]:
        return
    own, chain = trainer.nets.shortcut_guidance.scale, trainer.nets.guidance.scale
    calls = trainer.schedule.num_steps + (2 if own == chain else 3) * len(jumps)
    report(
        f"measuring the shortcut on {PROMPTS} prompts, {calls} network calls each "
        "(--no-check-shortcut leaves it out)"
    )
    errors = jump_errors(trainer, jumps)
    limit = (1 - MARGIN) * errors["base"]
    told = (
        f"jumps miss the base's own chain by {errors['shortcut']:.3f} of their length, jumps of "
        f"the base itself by {errors['base']:.3f}"
    )
    if own != chain:
        told += f" (with the chain's guidance by {errors['guided']:.3f})"
    if not errors["shortcut"] < limit:
        raise UserError(
            f"--shortcut {config.shortcut}: does not preserve the trajectory of {config.model}: "
            f"its {told}, and it must stay below {limit:.3f}; use another few-step LoRA, make one "
            "by `shortft shortcut`, give 'none' for jumps of the base, or pass "
            "--no-check-shortcut to train with it all the same"
        )
    report(f"the shortcut's {told}")
    if trainer.accelerator.is_main_process:
        found = {"about": about, **errors, "prompts": PROMPTS}
        write_atomic(record, (json.dumps(found, indent=2) + "\n").encode())


def described(trainer: Trainer) -> dict[str, Any]:
    """What a verdict depends on."""
    config = trainer.config
    fields = ("model", "resolution", "num_steps", "segments", "shortcut", "seed")
    return {
        **{name: getattr(config, name) for name in fields},
        "inputs": trainer.inputs,
        "guidance_scale": trainer.guidance_scale,
        "shortcut_guidance_scale": trainer.nets.shortcut_guidance.scale,
        "shortcut_scale": config.shortcut_scale or trainer.shortcut.scale,
    }


@torch.no_grad()
def jump_errors(trainer: Trainer, jumps: list[Step]) -> dict[str, float]:
    """‖landed - end‖ / ‖end - start‖ of jumps from true states, mean over jumps and prompts.

    Returns:
        The shortcut's; the base's own with the shortcut's guidance (``base``), and with the
        chain's (``guided``).
    """
    family, nets, schedule = trainer.family, trainer.nets, trainer.schedule
    stride = max(1, len(trainer.prompts) // PROMPTS)
    prompts = [trainer.prompts[i * stride % len(trainer.prompts)] for i in range(PROMPTS)]
    cond = family.encode(prompts)
    noise = family.noise([sample_seed(trainer.config.seed, CHECK, i) for i in range(PROMPTS)])
    jumpers = {
        "shortcut": (nets.module(jumps[0]), nets.shortcut_guidance),
        "base": (nets.base, nets.shortcut_guidance),
    }
    if nets.guidance.scale != nets.shortcut_guidance.scale:
        jumpers["guided"] = (nets.base, nets.guidance)
    missed: dict[str, list[Tensor]] = {name: [] for name in jumpers}
    for rows in torch.arange(PROMPTS).split(trainer.micro_batch):
        here, plan = cond[rows], base_plan(schedule)
        states: dict[int, Tensor] = {}
        run_chain(plan, nets, noise[rows], here, schedule, observe=states.__setitem__)
        for step in jumps:
            start, end = states[step.start], states[step.stop]
            moved = (end - start).flatten(1).norm(dim=1)
            for name, (net, guidance) in jumpers.items():
                timestep = float(schedule.timesteps[step.start])
                prediction = family.predict(net, start, timestep, here, guidance)
                landed = jump(schedule, start, prediction, step.start, step.stop)
                missed[name].append((landed - end).flatten(1).norm(dim=1) / moved)
    errors = {name: float(torch.cat(parts).mean()) for name, parts in missed.items()}
    return {"guided": errors["base"], **errors}


def _recorded(record: Path) -> object:
    """What an earlier check was about; None where there is none, or a damaged one."""
    try:
        return dict(json.loads(record.read_text(encoding="utf-8"))).get("about")
    except (OSError, ValueError, TypeError):
        return None
