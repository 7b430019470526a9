"""The training run around `step.train_step`: budgets, logs, pictures, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from shortft.checkpoint import load_latest
from shortft.config import Config, to_yaml
from shortft.drawing.progress import TrainProgress
from shortft.errors import UserError
from shortft.memory import peak_memory_bytes
from shortft.metrics_log import MetricsLog
from shortft.rewards import anchor_warning
from shortft.trainer import Trainer


def train(config: Config, resume: bool = False) -> Path:
    """Run a training; `shortft train`.

    Returns:
        The adapter's directory.
    """
    root = config.output_dir
    if not resume and (root / "checkpoints").exists():
        raise UserError(
            f"--output-dir {root}: holds a run; pass --resume to continue it, or name another one"
        )
    saved, notes = load_latest(root / "checkpoints") if resume else (None, [])
    if saved is not None:
        check_same_run(saved.state["config"], config)
    trainer = Trainer(config)
    main = trainer.accelerator.is_main_process
    log_bytes = 0
    if saved is not None:
        trainer.restore(saved)
        log_bytes = int(saved.state["log_bytes"])
    if main:
        root.mkdir(parents=True, exist_ok=True)
        (root / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    log = MetricsLog(root / "metrics.jsonl", log_bytes, enabled=main)
    trainer.accelerator.init_trackers("tensorboard")
    progress = TrainProgress(
        config.updates,
        config.minutes,
        trainer.stages,
        start_update=trainer.counters.update,
        start_seconds=trainer.counters.seconds,
        enabled=config.progress and main,
    )
    with progress:
        for note in notes:
            progress.log(note)
        warning = anchor_warning(config.reward)
        if warning:
            progress.log(f"warning: {warning}")
        if resume:
            progress.log(f"continuing after update {trainer.counters.update}")
        try:
            run_updates(trainer, log, progress)
        except KeyboardInterrupt:
            if trainer.accelerator.num_processes == 1 and trainer.between_updates:
                trainer.save_checkpoint(log.position())
                progress.log(f"stopped after update {trainer.counters.update}; go on by --resume")
            raise
        if main:
            trainer.save_checkpoint(log.position())
            adapter = trainer.save_adapter()
            progress.log(f"adapter: {adapter}")
    trainer.accelerator.end_training()
    return root / "adapter"


def run_updates(trainer: Trainer, log: MetricsLog, progress: TrainProgress) -> None:
    """Update until the budget is spent, with logs, pictures and checkpoints on the way."""
    config, accelerator = trainer.config, trainer.accelerator
    main = accelerator.is_main_process

    def every(interval: int) -> bool:
        return bool(interval) and trainer.counters.update % interval == 0

    looked = False
    if main and (config.sample_every or config.sample_times) and trainer.counters.update == 0:
        look(trainer, log)
    while trainer.spent() < 1:
        before, part = trainer.counters.seconds, int(trainer.spent() * config.sample_times)
        stage, outcome = trainer.update()
        update, seconds = trainer.counters.update, trainer.counters.seconds - before
        row: dict[str, Any] = {
            "update": update,
            "stage": stage,
            "reward": outcome.reward,
            "parts": outcome.parts,
            "grad_norm": outcome.grad_norm,
            "seconds": seconds,
            "peak_memory_bytes": peak_memory_bytes(),
            "skipped": outcome.skipped,
        }
        log.write(row)
        flat = {k: v for k, v in row.items() if isinstance(v, float)}
        accelerator.log({**flat, **outcome.parts, "stage": stage}, step=update)
        progress.update(update, stage, outcome.reward, seconds, row["peak_memory_bytes"])
        if outcome.skipped:
            progress.log(f"update {update}: gradient not finite, nothing changed")
        looked = every(config.sample_every) or int(trainer.spent() * config.sample_times) > part
        if main and looked:
            look(trainer, log)
        if main and every(config.checkpoint_every) and trainer.spent() < 1:
            trainer.save_checkpoint(log.position())
    if main and (config.sample_every or config.sample_times) and not looked:
        look(trainer, log)


@torch.no_grad()
def look(trainer: Trainer, log: MetricsLog) -> None:
    """Draw the fixed pictures by the true chain, score them, keep both."""
    from shortft.drawing.grids import save_grid

    update = trainer.counters.update
    prompts, images = trainer.pictures()
    path = trainer.config.output_dir / "samples" / f"update-{update:06d}.png"
    save_grid(path, [images], [f"update {update}"], prompts)
    on_device = images.to(trainer.family.device)
    row: dict[str, Any] = {
        "update": update,
        "at_seconds": trainer.counters.seconds,
        "eval_reward": float(trainer.reward(on_device, prompts).mean()),
    }
    if trainer.held_out is not None:
        row["eval_held_out"] = float(trainer.held_out(on_device, prompts).mean())
    log.write(row)
    if trainer.config.tensorboard:
        trainer.accelerator.log({k: v for k, v in row.items() if k != "update"}, step=update)
        writer = trainer.accelerator.get_tracker("tensorboard", unwrap=True)
        writer.add_images("samples", images, update)


def check_same_run(saved: str, config: Config) -> None:
    """Refuse to resume with settings that would make it another run.

    Raises:
        UserError: naming the first setting that differs.
    """
    import yaml

    may_change = {
        "prompts",  # compared by content, as is the shortcut
        "shortcut",
        "recompute",  # these three change the memory a run takes, not what it learns
        "merge_shortcut",
        "accumulation",
        "output_dir",
        "updates",
        "minutes",
        "progress",
        "tensorboard",
        "sample_every",
        "sample_prompts",
        "sample_times",
        "sample_from",
        "checkpoint_every",
        "keep_checkpoints",
    }
    old, new = yaml.safe_load(saved), config.model_dump(mode="json")
    for name, value in new.items():
        if name not in may_change and old.get(name, value) != value:
            raise UserError(
                f"--{name.replace('_', '-')} {value}: the run to resume has {old[name]}; use the "
                "same setting, or start a new run in another --output-dir"
            )
