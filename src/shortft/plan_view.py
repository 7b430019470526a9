"""`shortft plan`: what each stage of a run will do, and what it will cost."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from shortft.cause import noting_cause
from shortft.config import Config
from shortft.cost import Call, Cost, Kept
from shortft.families.base import Conditioning, branches
from shortft.judge import judge, pull
from shortft.methods import METHODS
from shortft.plans import Step
from shortft.schedule import segments
from shortft.trainer import Trainer


def measure_cost(trainer: Trainer) -> Cost:
    """Time one call of each kind on real modules; the second of two, the first warms up."""
    batch = trainer.batches(0)[0]
    noise, cond = trainer.family.noise(batch.seeds), trainer.family.encode(batch.prompts)

    def forward(step: Step) -> None:
        with torch.no_grad():
            _predict(trainer, step, noise, cond)

    def gradient(step: Step) -> None:
        # The input carries gradient too, as it does in the middle of a chain.
        x = noise.clone().requires_grad_()
        _predict(trainer, step, x, cond).square().mean().backward()

    def decode() -> None:
        images = trainer.family.decode(noise.clone().requires_grad_())
        pixels = images.detach().requires_grad_()
        seconds, reward = trainer.config.reward_seconds, trainer.reward
        with reward.at_work(images.device):
            scores = reward.combine(judge(reward, pixels, batch.prompts, seconds=seconds))
            gradient = pull(scores.sum(), pixels, reward.name)
        images.backward(gradient)

    def timed(action: Callable[[], None]) -> tuple[float, int]:
        action()
        _wait(trainer)
        alive = (thing for thing in gc.get_objects() if type(thing) is torch.nn.Parameter)
        kept = Kept(alive)
        began = time.monotonic()
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
            action()
        _wait(trainer)
        return time.monotonic() - began, kept.total

    def timed_call(without: Step, trained: Step) -> Call:
        seconds, _ = timed(partial(forward, without))
        with_gradient, kept = timed(partial(gradient, trained))
        g = trainer.nets.guidance_of(trained)
        if trainer.config.recompute and g.grad == "both":  # one branch after the other
            kept //= branches(cond, g)
        return Call(seconds, with_gradient, kept)

    policy = Step(0, 1, "policy", trainer.nets.loras, trains=True)
    call = jump = timed_call(Step(0, 1, "base"), policy)
    jumps = [step for step in trainer.plan(0, 1).steps if step.net == "shortcut"]
    if jumps:
        jump = timed_call(jumps[0], jumps[0])
    seconds, kept_bytes = timed(decode)
    trainer.optimizer.zero_grad(set_to_none=True)
    steps, anchored = trainer.schedule.num_steps, trainer.config.anchor > 0
    return Cost(call, jump, seconds, kept_bytes, steps, anchored)


def _predict(trainer: Trainer, step: Step, x: Tensor, cond: Conditioning) -> Tensor:
    return trainer.nets.predict(step, x, float(trainer.schedule.timesteps[0]), cond)


def _wait(trainer: Trainer) -> None:
    """Let the GPU finish, so that the clock shows work and not launches."""
    if trainer.family.device.type == "cuda":
        torch.cuda.synchronize()


def show_plan(config: Config, png: Path | None = None) -> None:
    """Draw every stage's chain with its calls and the estimate of memory and time."""
    from rich.console import Console

    from shortft.drawing.plan_picture import plan_png
    from shortft.drawing.plan_text import plan_text
    from shortft.drawing.progress import memory_text

    console = Console()
    with console.status(f"loading {config.model}, timing one call"):
        trainer = Trainer(config.model_copy(update={"tensorboard": False}))
        with noting_cause(config.output_dir):
            cost = measure_cost(trainer)
    times = trainer.schedule.timesteps.tolist()
    method = METHODS[config.method]
    by_segment = method.by_segment
    parts = segments(trainer.schedule, config.segments) if method.uses_segments else ()
    splits = config.accumulation
    stages, notes = [], []
    for number in range(1, trainer.stages + 1):
        plan = trainer.plan(0, number)
        seconds = cost.seconds(plan, recompute=config.recompute) * splits
        held = cost.activation_bytes(plan, recompute=config.recompute)
        note = f"≈ {seconds:.2g} s per update, {memory_text(held)} of activations"
        name = f"stage {number}" if by_segment else f"{config.method}, update 0"
        if plan.needs_rollout:
            note += f"; a rollout of {trainer.schedule.num_steps} calls before it is counted in"
        last = number == trainer.stages
        console.print(plan_text(plan, times, parts, name, legend=last))
        console.print(f"{note}\n", style="dim", highlight=False)
        stages.append((name, plan))
        notes.append(note)
    precision = trainer.config.precision
    console.print(
        f"Estimates for batch {config.batch_size} in {splits} part(s), {precision}, from "
        "one timed call of each kind on this machine; weights and optimizer come on top.",
        style="dim",
    )
    if png is not None:
        plan_png(png, stages, times, parts, notes, f"{config.method} on {config.model}")
        console.print(str(png), markup=False)
