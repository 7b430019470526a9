"""What is seen on the way: pictures of the true chain, their scores, the guard's decision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shortft.drawing.progress import TrainProgress
from shortft.guard import Look
from shortft.interrupts import Interrupts
from shortft.kept import keep_best
from shortft.metrics import diversity, picture_statistics
from shortft.metrics_log import MetricsLog
from shortft.out_of_memory import advised
from shortft.trainer import Trainer
from shortft.variety import embedder


def look(
    trainer: Trainer, log: MetricsLog, progress: TrainProgress, interrupts: Interrupts
) -> None:
    """Draw the fixed pictures by the true chain, score them, keep both; ask the guard.

    Raises:
        UserError: if memory runs out or a reward misbehaves; the run can go on from here.
    """
    with advised(trainer.config, trainer.micro_batch):
        row, images = figures(trainer)
    update = trainer.counters.update
    seen = Look(update, row["eval_reward"], row.get("eval_held_out"))
    if not seen.is_finite:
        progress.log(f"update {update}: evaluation not finite, the guard passes over it")
    interrupts.hold()  # what was seen, what is kept of it and that it is done go together
    before, best = trainer.guard.state(), trainer.best
    try:
        decide(trainer, log, progress, seen, row)
    except OSError:
        trainer.guard.restore(before)
        trainer.best = best
        trainer.tripped = False
        raise
    trainer.counters.look_due = False
    interrupts.release()
    if trainer.config.tensorboard:
        shown = {k: v for k, v in row.items() if k.startswith("eval_")}
        trainer.accelerator.log(shown, step=update)
        writer = trainer.accelerator.get_tracker("tensorboard", unwrap=True)
        writer.add_images("samples", images, update)


def decide(
    trainer: Trainer, log: MetricsLog, progress: TrainProgress, seen: Look, row: dict[str, Any]
) -> None:
    """Ask the guard, keep what it calls the best, and log both."""
    better, alarm = trainer.guard.see(seen)
    if alarm and trainer.config.guard != "off":
        row["guard"] = alarm
        progress.log(f"guard: {alarm}")
        trainer.tripped = trainer.config.guard == "stop"
    if better:  # the start counts: a run may have to go back to it
        row["best"] = True
        keep_best(trainer)
    log.write(row)


@torch.no_grad()
def figures(trainer: Trainer) -> tuple[dict[str, Any], Tensor]:
    """The evaluation's row of the log, and the pictures (B, 3, H, W) that its grid shows."""
    from shortft.drawing.grids import save_grid

    config, update = trainer.config, trainer.counters.update
    trainer.seed_others()
    prompts, pictures = trainer.pictures()
    shown = pictures[: config.sample_prompts]
    path = config.output_dir / "samples" / f"update-{update:06d}.png"
    save_grid(path, [shown], [f"update {update}"], prompts[: config.sample_prompts])
    on_device = pictures.to(trainer.family.device)
    row: dict[str, Any] = {
        "update": update,
        "at_seconds": trainer.counters.seconds,
        "eval_reward": trainer.score(trainer.reward, on_device, prompts),
    }
    if trainer.held_out is not None:
        row["eval_held_out"] = trainer.score(trainer.held_out, on_device, prompts)
    if config.sample_noises > 1:
        scorers = (trainer.held_out, trainer.reward)
        with embedder(scorers, on_device.device) as (embed, _):
            row["eval_diversity"] = float(diversity(on_device, embed, prompts).mean())
    statistics = picture_statistics(pictures)
    row["eval_contrast"] = float(statistics.contrast.mean())
    row["eval_saturated"] = float((statistics.black + statistics.white).mean())
    return row, shown
