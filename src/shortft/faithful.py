"""Before training: does a shortcut follow the base's own chain, or would it teach another model?

A LoRA that leaves the trajectory (an adversarial few-step model, a style, one of another base)
trains the reward LoRAs on pictures that inference never draws. So the jumps that training is
about to make are measured on a few prompts first, and compared with what the base itself does in
the same jumps under the same guidance: a shortcut that lands no closer is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shortft.chain import run_chain
from shortft.drawing.files import write_atomic
from shortft.errors import UserError
from shortft.plans import Step, base_plan
from shortft.schedule import jump
from shortft.seeds import sample_seed
from shortft.trainer import Trainer

PROMPTS = 4
RECORD = "shortcut_check.json"
NOISE = 7  # place in the seed's name space


def require_faithful(trainer: Trainer, report: Callable[[str], None]) -> None:
    """Refuse a shortcut that does not preserve the base's trajectory.

    The shipped one was measured when it was made. A verdict is kept in the run's folder, so that
    `--resume` does not measure again.

    Args:
        report: told the cost before, and the figures after.

    Raises:
        UserError: with both figures and what to do instead.
    """
    config = trainer.config
    if not config.check_shortcut or config.shortcut == "auto" or trainer.shortcut.path is None:
        return
    steps = trainer.plan(0, 1).steps
    jumps = [Step(s.start, s.stop, "shortcut") for s in steps if s.net == "shortcut"]
    # A few-step model that is tuned itself has no trajectory to keep.
    if not jumps or trainer.placement == "few_step":
        return
    record = config.output_dir / RECORD
    about = described(trainer)
    if record.is_file() and json.loads(record.read_text(encoding="utf-8")).get("about") == about:
        return
    calls = trainer.schedule.num_steps + 2 * len(jumps)
    report(
        f"measuring the shortcut on {PROMPTS} prompts, {calls} network calls each "
        "(--no-check-shortcut leaves it out)"
    )
    shortcut, plain = jump_errors(trainer, jumps)
    if not shortcut < plain:
        raise UserError(
            f"--shortcut {config.shortcut}: does not preserve the trajectory of {config.model}: "
            f"its jumps miss the base's own chain by {shortcut:.2f} of their length, jumps of the "
            f"base itself by {plain:.2f}; use another few-step LoRA, make one by `shortft "
            "shortcut`, give 'none' for jumps of the base, or pass --no-check-shortcut to train "
            "with it all the same"
        )
    report(
        f"the shortcut's jumps miss the base's own chain by {shortcut:.2f} of their length, jumps "
        f"of the base itself by {plain:.2f}"
    )
    if trainer.accelerator.is_main_process:
        found = {"about": about, "shortcut": shortcut, "base": plain, "prompts": PROMPTS}
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
def jump_errors(trainer: Trainer, jumps: list[Step]) -> tuple[float, float]:
    """‖landed - end‖ / ‖end - start‖ of jumps from true states, mean over jumps and prompts.

    Returns:
        The shortcut's, and the base's own with the shortcut's guidance.
    """
    family, nets, schedule = trainer.family, trainer.nets, trainer.schedule
    stride = max(1, len(trainer.prompts) // PROMPTS)
    prompts = [trainer.prompts[i * stride % len(trainer.prompts)] for i in range(PROMPTS)]
    cond = family.encode(prompts)
    noise = family.noise([sample_seed(trainer.config.seed, NOISE, i) for i in range(PROMPTS)])
    missed: dict[str, list[Tensor]] = {"shortcut": [], "base": []}
    for rows in torch.arange(PROMPTS).split(trainer.micro_batch):
        here, plan = cond[rows], base_plan(schedule)
        states: dict[int, Tensor] = {}
        run_chain(plan, nets, noise[rows], here, schedule, observe=states.__setitem__)
        for step in jumps:
            start, end = states[step.start], states[step.stop]
            moved = (end - start).flatten(1).norm(dim=1)
            for name, net in (("shortcut", nets.module(step)), ("base", nets.base)):
                timestep = float(schedule.timesteps[step.start])
                prediction = family.predict(net, start, timestep, here, nets.shortcut_guidance)
                landed = jump(schedule, start, prediction, step.start, step.stop)
                missed[name].append((landed - end).flatten(1).norm(dim=1) / moved)
    return float(torch.cat(missed["shortcut"]).mean()), float(torch.cat(missed["base"]).mean())
