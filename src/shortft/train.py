"""The training run around `step.train_step`: budgets, logs, pictures, checkpoints."""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from shortft.checkpoint import any_in, load_latest
from shortft.config import Config, option_name, parse_yaml, to_yaml
from shortft.drawing.curves import read_metrics
from shortft.drawing.files import write_atomic
from shortft.drawing.progress import TrainProgress
from shortft.errors import Stopped, UserError
from shortft.faithful import require_faithful
from shortft.guard import Guard, Look
from shortft.interrupts import Interrupts
from shortft.memory import peak_memory_bytes
from shortft.metrics import picture_statistics
from shortft.metrics_log import MetricsLog
from shortft.rewards import anchor_warning
from shortft.space import check_space
from shortft.trainer import Trainer


def train(
    config: Config, resume: bool = False, allow_change: bool = False, auto_resume: bool = False
) -> Path:
    """Run a training; `shortft train`.

    Args:
        resume: go on from the newest whole checkpoint in the output directory.
        auto_resume: the same if there is one, else start.
        allow_change: resume even if settings differ that change what the run learns.

    Returns:
        The adapter's directory.

    Raises:
        UserError: for what the user can mend; what was done is kept.
        Stopped: if a signal asked for it; a checkpoint was written.
    """
    root = config.output_dir
    if auto_resume:
        resume = any_in(root / "checkpoints")
    elif not resume and (root / "checkpoints").exists():
        raise UserError(
            f"--output-dir {root}: holds a run; pass --resume to continue it, or name another one"
        )
    saved, notes = load_latest(root / "checkpoints") if resume else (None, [])
    if saved is not None:
        notes += check_same_run(
            str(saved.state.get("config", "")), config, allow_change=allow_change
        )
    trainer = Trainer(config)
    main = trainer.accelerator.is_main_process
    log_bytes = 0
    if saved is not None:
        trainer.restore(saved, allow_change=allow_change)
        log_bytes = saved.state["log_bytes"]
    trainer.check_same_start()
    if main:
        size = trainer.checkpoint_bytes() * (config.keep_checkpoints + 1)
        check_space(root, size, "the run's checkpoints", "lower --keep-checkpoints, ")
        root.mkdir(parents=True, exist_ok=True)
        write_atomic(root / "config.yaml", to_yaml(config).encode())
    log = MetricsLog(root / "metrics.jsonl", log_bytes, enabled=main)
    purge = {"purge_step": trainer.counters.update + 1} if resume else {}
    trainer.accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": purge})
    progress = TrainProgress(
        config.updates,
        config.minutes,
        trainer.stages,
        start_update=trainer.counters.update,
        start_seconds=trainer.counters.seconds,
        enabled=config.progress and main,
    )
    warning = anchor_warning(config.reward)
    with progress, Interrupts(immediate=trainer.accelerator.num_processes == 1) as interrupts:
        for note in notes:
            progress.log(note)
        if warning:
            progress.log(f"warning: {warning}")
        if resume:
            progress.log(f"continuing after update {trainer.counters.update}")
        require_faithful(trainer, progress.log)
        try:
            if main:
                remember(trainer.guard, root / "metrics.jsonl")
            run_updates(trainer, log, progress, interrupts)
            interrupts.hold()
        except (Stopped, UserError) as reason:
            interrupts.hold()
            if main:
                trainer.save_checkpoint(log.position())
                note_cause(root, reason)
                progress.log(f"stopped after update {trainer.counters.update}; go on by --resume")
            trainer.accelerator.end_training()
            raise
        except RuntimeError as error:
            if trainer.accelerator.num_processes == 1 or not lost_process(error):
                raise
            # Processes may stand at different places of an update: only older checkpoints are sure.
            raise UserError(
                f"process {trainer.accelerator.process_index}: lost touch with another process "
                "(its own message says why); go on by --resume, or let torchrun do so: "
                "--max-restarts with --auto-resume"
            ) from error
        if main:
            trainer.save_checkpoint(log.position())
            adapter = trainer.save_adapter()
            best = trainer.guard.best
            if trainer.tripped and best is not None:
                shutil.copytree(root / "best", adapter, dirs_exist_ok=True)
                progress.log(f"went back to the adapter of update {best.update}")
            progress.log(f"adapter: {adapter}")
    trainer.accelerator.end_training()
    return root / "adapter"


def run_updates(
    trainer: Trainer, log: MetricsLog, progress: TrainProgress, interrupts: Interrupts
) -> None:
    """Update until the budget is spent, with logs, pictures and checkpoints on the way."""
    config, accelerator, counters = trainer.config, trainer.accelerator, trainer.counters
    main = accelerator.is_main_process

    def every(interval: int) -> bool:
        return bool(interval) and counters.update % interval == 0

    def look_if_due() -> None:
        if main and counters.look_due:
            look(trainer, log, progress)
        counters.look_due = False
        trainer.agree_on_guard()

    watched = bool(config.sample_every or config.sample_times)
    if counters.update == 0:
        counters.look_due = watched
    look_if_due()
    while trainer.spent() < 1 and not trainer.tripped:
        before, part = counters.seconds, int(trainer.spent() * config.sample_times)
        stage, outcome = trainer.update(commit=interrupts.hold)
        update, seconds = counters.update, counters.seconds - before
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
        if outcome.drift is not None:
            row["drift"] = outcome.drift
        log.write(row)
        flat = {k: v for k, v in row.items() if isinstance(v, float)}
        accelerator.log({**flat, **outcome.parts, "stage": stage}, step=update)
        progress.update(update, stage, outcome.reward, seconds, row["peak_memory_bytes"])
        if outcome.skipped:
            progress.log(f"update {update}: reward or gradient not finite, nothing changed")
        # Pictures come after the checkpoint, which knows that they are due: a run that is stopped
        # while it draws them draws them again.
        passed = int(trainer.spent() * config.sample_times) > part
        last = watched and trainer.spent() >= 1
        counters.look_due = every(config.sample_every) or passed or last
        if main and every(config.checkpoint_every) and trainer.spent() < 1:
            trainer.save_checkpoint(log.position())
        interrupts.release()
        asked = trainer.asked_to_stop(interrupts.asked)
        if asked is not None:
            raise Stopped(asked)
        trainer.check_skipped()
        look_if_due()


@torch.no_grad()
def look(trainer: Trainer, log: MetricsLog, progress: TrainProgress) -> None:
    """Draw the fixed pictures by the true chain, score them, keep both; ask the guard."""
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
    statistics = picture_statistics(images)
    row["eval_contrast"] = float(statistics.contrast.mean())
    row["eval_saturated"] = float((statistics.black + statistics.white).mean())
    better, alarm = trainer.guard.see(seen(row))
    if alarm and trainer.config.guard != "off":
        row["guard"] = alarm
        progress.log(f"guard: {alarm}")
        trainer.tripped = trainer.config.guard == "stop"
    if better:  # the start counts: a run may have to go back to it
        row["best"] = True
        trainer.save_adapter("best")
    log.write(row)
    if trainer.config.tensorboard:
        figures = {k: v for k, v in row.items() if k.startswith("eval_")}
        trainer.accelerator.log(figures, step=update)
        writer = trainer.accelerator.get_tracker("tensorboard", unwrap=True)
        writer.add_images("samples", images, update)


def seen(row: Mapping[str, Any]) -> Look:
    """An evaluation's row of the log, as the guard takes it."""
    return Look(int(row["update"]), float(row["eval_reward"]), row.get("eval_held_out"))


def remember(guard: Guard, log: Path) -> None:
    """Show the guard what an interrupted run has seen already."""
    for row in read_metrics(log).evaluations:
        guard.see(seen(row))


# What may differ on resume: where and how a run is watched, and what memory it takes.
FREE = {
    "encode_ahead",
    "prompts",  # compared by content, as is the shortcut
    "shortcut",
    "check_shortcut",
    "recompute",
    "merge",
    "accumulation",
    "split_on_out_of_memory",
    "reward_seconds",
    "reward_device",
    "guard",
    "guard_drop",
    "held_out",
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
# What the saved weights depend on.
FIXED = {"model", "resolution", "method", "segments", "timestep_lora", "rank"}


def check_same_run(saved: str, config: Config, *, allow_change: bool = False) -> list[str]:
    """Refuse to resume with settings that would make it another run.

    Returns:
        One line per allowed difference.

    Raises:
        UserError: naming the settings that differ.
    """
    old = parse_yaml(saved, "--resume: the checkpoint's configuration")
    new = config.model_dump(mode="json")
    changed = [n for n, value in new.items() if n not in FREE and old.get(n, value) != value]
    lines = [f"{option_name(n)} {new[n]}: the run to resume has {old[n]}" for n in changed]
    fixed = [line for name, line in zip(changed, lines, strict=True) if name in FIXED]
    if fixed:
        raise UserError(
            f"{'; '.join(fixed)}; use the same setting, or start a new run in another --output-dir"
        )
    if lines and not allow_change:
        raise UserError(
            f"{'; '.join(lines)}; use the same setting, pass --allow-change to go on with the new "
            "one, or start a new run in another --output-dir"
        )
    return [f"changed: {line}" for line in lines]


def lost_process(error: RuntimeError) -> bool:
    """Whether an error says that another process is gone."""
    text = str(error).lower()
    return isinstance(error, torch.distributed.DistError) or "gloo" in text or "nccl" in text


def note_cause(root: Path, reason: BaseException) -> None:
    """Keep the traceback of somebody else's error in error.txt."""
    if reason.__cause__ is not None:
        text = "".join(traceback.format_exception(reason.__cause__))
        write_atomic(root / "error.txt", text.encode())
