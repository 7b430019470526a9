"""What is kept of a run: its checkpoints, the best LoRAs so far, and the adapter."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from shortft.adapter import AdapterInfo, copy_state, save_adapter, usual_cut
from shortft.checkpoint import Checkpoint, save_checkpoint
from shortft.config import to_yaml
from shortft.errors import UserError
from shortft.inputs import parse_yaml
from shortft.methods import METHODS
from shortft.optimizers import set_state, state_of
from shortft.out_of_memory import advice, ran_out
from shortft.paths import exists
from shortft.trainer import Trainer

# What an evaluation's scores depend on: if it changes, earlier ones say nothing of later ones.
MEASURED_BY = (
    "reward",
    "held_out",
    "reward_model",
    "reward_precision",
    "precision",
    "decoder",
    "seed",
    "method_options",
    "sample_prompts",
    "sample_noises",
    "num_steps",
    "guidance_scale",
)


def keep(trainer: Trainer, log_bytes: int) -> None:
    """Write a checkpoint: everything that decides how the run goes on.

    Args:
        log_bytes: length of the log that belongs to it.

    Raises:
        UserError: if the disk refuses; older checkpoints stay.
    """
    trainer.average.put_back()  # a signal may have come while it was in use
    tensors: dict[str, dict[str, Tensor]] = trainer.average.state()
    for number in trainer.numbers:
        tensors[f"lora_{number}"] = trainer.nets.state_of(number)
        tensors[f"optimizer_{number}"] = {
            f"{name}/{key}": value
            for name, parameter in trainer.nets.parameters_of(number).items()
            for key, value in state_of(trainer.optimizer, parameter).items()
        }
    tensors |= {f"best_{number}": state for number, state in (trainer.best or {}).items()}
    state = {
        **vars(trainer.counters),
        "log_bytes": log_bytes,
        "inputs": trainer.inputs,
        "config": to_yaml(trainer.config),
        "guard": trainer.guard.state(),
        "tripped": trainer.tripped,
        "splits": trainer.splits,
        "cut_by": trainer.schedule.cut_by,
        "jumps_by": trainer.jumps_by,
        "shown": shown(trainer),
        "held_out_by": trainer.held_out_by,
    }
    save_checkpoint(
        trainer.config.output_dir / "checkpoints",
        trainer.counters.update,
        tensors,
        state,
        keep=trainer.config.keep_checkpoints,
    )


def restore(trainer: Trainer, saved: Checkpoint, *, allow_change: bool = False) -> None:
    """Go back to a checkpoint.

    Raises:
        UserError: if the prompts, or files that the settings name, are no longer those of the run,
            or the checkpoint holds something else than this run would write.
    """
    try:
        _restore(trainer, saved, allow_change=allow_change)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        if ran_out(error):
            raise UserError(advice(trainer.config, trainer.micro_batch)) from error
        raise UserError(
            f"--resume: {saved.path} does not hold this run's state ({error}); start a new run "
            "in another --output-dir"
        ) from error


def _restore(trainer: Trainer, saved: Checkpoint, *, allow_change: bool) -> None:
    config, counters, state = trainer.config, trainer.counters, saved.state
    if state["inputs"] != trainer.inputs and not allow_change:
        raise UserError(
            "--resume: the prompts, the shortcut's file, a reward's file or a local model "
            "changed since the checkpoint; restore them, pass --allow-change, or start a new "
            "run in another --output-dir"
        )
    cut_by = state.get("cut_by") or usual_cut(flow=trainer.schedule.prediction_type == "flow")
    if METHODS[config.method].uses_segments and cut_by != trainer.schedule.cut_by:
        raise UserError(
            f"--resume: the run's chain was cut into segments by {cut_by}, and would now be by "
            f"{trainer.schedule.cut_by}, so that LoRAs would act at other timesteps; start a new "
            "run in another --output-dir"
        )
    jumps_by = state.get("jumps_by", trainer.jumps_by)
    if jumps_by != trainer.jumps_by and not allow_change:
        raise UserError(
            f"--resume: the run's jumps were by {_words(jumps_by)}, and would now be by "
            f"{_words(trainer.jumps_by)}; use the same --shortcut, pass --allow-change, or start a "
            "new run in another --output-dir"
        )
    before = parse_yaml(str(state["config"]), "--resume: the checkpoint's configuration")
    same_optimizer = before.get("optimizer", "adamw") == config.optimizer
    for number in trainer.numbers:
        copy_state(trainer.nets, number, saved.tensors[f"lora_{number}"])
        # Another optimizer (--allow-change) starts anew.
        flat = saved.tensors[f"optimizer_{number}"] if same_optimizer else {}
        parameters = trainer.nets.parameters_of(number)
        strangers = {key.rpartition("/")[0] for key in flat} - parameters.keys()
        if strangers:
            raise ValueError(f"optimizer_{number} holds {min(strangers)}")
        for name, parameter in parameters.items():
            prefix = f"{name}/"
            kept = {k[len(prefix) :]: v for k, v in flat.items() if k.startswith(prefix)}
            if kept:
                set_state(trainer.optimizer, parameter, kept)
    trainer.average.restore(saved.tensors)
    now = config.model_dump(mode="json")
    measured_alike = (
        all(before.get(name) == now[name] for name in MEASURED_BY)
        and state["inputs"] == trainer.inputs
        and state.get("shown") == shown(trainer)
        and state.get("held_out_by", trainer.held_out_by) == trainer.held_out_by
        and (trainer.placement != "few_step" or jumps_by == trainer.jumps_by)
    )
    if measured_alike:
        if "best_1" in saved.tensors:
            trainer.best = {n: saved.tensors[f"best_{n}"] for n in trainer.numbers}
        trainer.guard.restore(state.get("guard", {}))
        trainer.tripped = bool(state.get("tripped")) and config.guard == "stop"
    numbers = [state["log_bytes"], state.get("update", 0)]
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError(f"its counters are {numbers}")
    for name in vars(counters):
        setattr(counters, name, state.get(name, getattr(counters, name)))
    # A batch that was halved for lack of memory stays so: sums are rounded in the same order.
    splits = state.get("splits", 1)
    share = splits * trainer.accelerator.num_processes
    if config.split_on_out_of_memory and splits > trainer.splits and not config.batch_size % share:
        trainer.splits = splits


def shown(trainer: Trainer) -> str:
    """SHA-256 of the prompts that evaluations draw from."""
    return hashlib.sha256("\n".join(trainer.sample_prompts).encode()).hexdigest()


def _words(jumps_by: Sequence[object] | None) -> str:
    if not jumps_by:
        return "none"
    kind, guidance_scale, scale = jumps_by
    if kind != "file":
        return f"--shortcut {kind}"
    return f"a few-step LoRA with guidance {guidance_scale} and scale {scale}"


def keep_best(trainer: Trainer) -> None:
    """Keep the LoRAs as they are now, or their average, as the best ones; write ``best/``."""
    with trainer.average.in_place():
        trainer.best = {
            number: {k: v.detach().cpu().clone() for k, v in trainer.nets.state_of(number).items()}
            for number in trainer.numbers
        }
    write_adapter(trainer, "best", trainer.best)


def write_adapter(
    trainer: Trainer,
    folder: str = "adapter",
    states: Mapping[int, dict[str, Tensor]] | None = None,
) -> Path:
    """Write LoRAs into a folder of the run: as they are now, or their average, or `states`."""
    config, schedule = trainer.config, trainer.schedule
    active = [step for step in trainer.inference.steps if step.adapters]
    info = AdapterInfo(
        base_model=config.model,
        loras=trainer.nets.loras,
        rank=config.rank,
        segments=config.segments,
        placement=trainer.placement,
        num_steps=config.num_steps,
        timesteps=[round(float(schedule.timesteps[step.start])) for step in active],
        stacked=[step.adapters for step in active],
        guidance_scale=trainer.guidance_scale,
        resolution=config.resolution,
        cut_by=schedule.cut_by,
        local=[name for name in (config.model, config.shortcut) if exists(name)],
        config=config.model_dump(mode="json"),
    )
    directory = config.output_dir / folder
    with trainer.average.in_place():
        save_adapter(trainer.nets, info, directory, states)
    return directory
