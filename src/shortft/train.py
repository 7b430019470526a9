"""The training run around `step.train_step`: budgets, logs, pictures, checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from shortft import kept
from shortft.assets import EMBEDDED
from shortft.cause import note_cause
from shortft.checkpoint import load_latest, names_in
from shortft.config import Config, option_name, to_yaml
from shortft.confined import RUN, refuse_links
from shortft.drawing.curves import draw_curves
from shortft.drawing.files import write_atomic
from shortft.drawing.progress import TrainProgress
from shortft.errors import AllAtOnce, Stopped, Torn, UserError
from shortft.faithful import require_faithful
from shortft.inputs import parse_yaml
from shortft.interrupts import Interrupts
from shortft.launcher import as_launched
from shortft.lock import only_one
from shortft.memory import peak_memory_bytes
from shortft.metrics_log import MetricsLog
from shortft.out_of_memory import advised
from shortft.precision import emulated, settled
from shortft.preflight.disk import check_room
from shortft.rewards import anchor_warning
from shortft.rewards.places import emoji_clip_warning
from shortft.seeds import given_back
from shortft.trainer import Trainer
from shortft.watch import look


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
        Torn: if an update failed halfway; older checkpoints are whole.
    """
    config = as_launched(config)
    root = config.output_dir
    refuse_links(root, RUN)
    found = names_in(root / "checkpoints")
    started = bool(found)
    if auto_resume:
        resume = started
    elif not resume and started:
        raise UserError(
            f"--output-dir {root}: holds a run; pass --resume to continue it, or name another one"
        )
    saved, notes = load_latest(root / "checkpoints") if resume else (None, [])
    if saved is None:
        config = settled(config)
    else:
        text = str(saved.state.get("config", ""))
        config = settled(config, parse_yaml(text, SAVED).get("precision"))
        notes += check_same_run(text, config, allow_change=allow_change)
    check_room(config)
    trainer = Trainer(config)
    log_bytes = 0
    if saved is not None:
        kept.restore(trainer, saved, allow_change=allow_change)
        log_bytes = saved.state["log_bytes"]
        del saved  # as large as LoRAs and optimizer together
    trainer.check_same_start()
    with ExitStack() as stack, telling_of_disk(root):
        if trainer.accelerator.is_main_process:
            check_room(config, trainer.lora_numbers)
            root.mkdir(parents=True, exist_ok=True)
            stack.enter_context(only_one(root))
            if names_in(root / "checkpoints") != found:
                raise UserError(
                    f"--output-dir {root}: another run wrote checkpoints there meanwhile; start "
                    "again, with --resume or --auto-resume"
                )
            write_atomic(root / "config.yaml", to_yaml(config).encode())
        log = MetricsLog(
            root / "metrics.jsonl", log_bytes, enabled=trainer.accelerator.is_main_process
        )
        if log.lost:
            notes.append(f"{log.path}: its last {log.lost} bytes are lost, and with them the rows")
        with given_back():
            run(trainer, log, notes, resume=resume)
    return root / "adapter"


def run(trainer: Trainer, log: MetricsLog, notes: list[str], *, resume: bool) -> None:
    """The whole run from where the trainer stands; `train` says what is raised."""
    config, root, counters = trainer.config, trainer.config.output_dir, trainer.counters
    main = trainer.accelerator.is_main_process
    purge = {"purge_step": counters.update + 1} if resume else {}
    trainer.accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": purge})
    progress = TrainProgress(
        config.updates,
        config.minutes,
        trainer.stages,
        start_update=counters.update,
        start_seconds=counters.seconds,
        enabled=config.progress and main,
    )
    with progress, Interrupts(immediate=trainer.accelerator.num_processes == 1) as interrupts:
        for note in (*notes, *remarks(trainer)):
            progress.log(note)
        if resume:
            progress.log(f"continuing after update {counters.update}")
        else:
            counters.look_due = bool(config.sample_every or config.sample_times)
        require_faithful(trainer, progress.log)
        try:
            if main and trainer.best is not None:  # what is there may be of a later time
                interrupts.hold()
                kept.write_adapter(trainer, "best", trainer.best)
                interrupts.release()
            run_updates(trainer, log, progress, interrupts)
            interrupts.hold()
        except Torn:
            trainer.accelerator.end_training()
            raise
        except (Stopped, UserError, OSError) as reason:
            interrupts.hold()
            try:
                if main:
                    kept.keep(trainer, log.position())
                    progress.log(f"stopped after update {counters.update}; go on by --resume")
                note_cause(root, reason)
            finally:
                if isinstance(reason, Stopped | AllAtOnce):
                    # torchrun ends all processes as soon as one has left: not before this.
                    trainer.accelerator.wait_for_everyone()
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
            finish(trainer, log, progress)
    trainer.accelerator.end_training()


def finish(trainer: Trainer, log: MetricsLog, progress: TrainProgress) -> None:
    """Keep what the run ends with: a checkpoint, the adapter, the curves."""
    root, best = trainer.config.output_dir, trainer.guard.best
    kept.keep(trainer, log.position())
    back = trainer.tripped and best is not None
    adapter = kept.write_adapter(trainer, states=trainer.best if back else None)
    if back and best is not None:
        progress.log(f"went back to the adapter of update {best.update}")
    draw_curves(log.path, root / "curves.png", reward_name=trainer.reward.name)
    progress.log(f"adapter: {adapter}")


def remarks(trainer: Trainer) -> list[str]:
    """What should be said before a run."""
    config, found = trainer.config, []
    warning = anchor_warning(config.reward)
    if warning:
        found.append(f"warning: {warning}")
    warning = emoji_clip_warning(config.scorers, config.reward_model)
    if warning and config.model != EMBEDDED:
        found.append(f"warning: {warning}")
    slow = emulated(config)
    if slow:
        found.append(f"warning: {slow}")
    if config.guard != "off" and trainer.held_out is None:
        found.append(
            "note: no scorer watches for a reward that is hacked; --held-out names one, such as "
            "pickscore"
        )
    return found


@contextmanager
def telling_of_disk(root: Path) -> Iterator[None]:
    """Say in one line which file could not be written, and why.

    Raises:
        UserError: for an OSError of a file.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or isinstance(error, ConnectionError):
            raise
        raise UserError(
            f"{error.filename or root}: cannot be written ({error.strerror}); make room or mend "
            "the disk, then go on by --resume"
        ) from error


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
            look(trainer, log, progress, interrupts)
        elif counters.look_due and config.shard:
            with advised(config, trainer.micro_batch):
                trainer.pictures()  # the first process needs all of them to run the denoiser
        counters.look_due = False
        trainer.agree_on_guard()

    watched = bool(config.sample_every or config.sample_times)
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
        # Pictures come after the checkpoint, which knows that they are due: a run that is stopped
        # while it draws them draws them again.
        passed = int(trainer.spent() * config.sample_times) > part
        last = watched and trainer.spent() >= 1
        counters.look_due = every(config.sample_every) or passed or last
        log.write(row)
        flat = {k: v for k, v in row.items() if isinstance(v, float)}
        accelerator.log({**flat, **outcome.parts, "stage": stage}, step=update)
        progress.update(update, stage, outcome.reward, seconds, row["peak_memory_bytes"])
        if outcome.skipped:
            progress.log(f"update {update}: reward or gradient not finite, nothing changed")
        if main and every(config.checkpoint_every) and trainer.spent() < 1:
            kept.keep(trainer, log.position())
        interrupts.release()
        asked = trainer.asked_to_stop(interrupts.asked)
        if asked is not None:
            raise Stopped(asked)
        trainer.check_progress()
        look_if_due()


SAVED = "--resume: the checkpoint's configuration"
# What may differ on resume: where and how a run is watched, and what memory it takes.
FREE = {
    "encode_ahead",
    "prompts",  # compared by content, as is the shortcut
    "shortcut",
    "check_shortcut",
    "shard",
    "recompute",
    "merge",
    "accumulation",
    "split_on_out_of_memory",
    "reward_seconds",
    "reward_device",
    "guard",
    "guard_drop",
    "best_by",
    "held_out",
    "output_dir",
    "updates",
    "minutes",
    "progress",
    "tensorboard",
    "sample_every",
    "sample_prompts",
    "sample_noises",
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
    old = parse_yaml(saved, SAVED)
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
