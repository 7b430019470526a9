"""The training run around `step.train_step`: stages, budgets, logs, pictures, checkpoints."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from shortft.adapter import AdapterInfo, copy_state, save_adapter
from shortft.assets import own_guidance, prompts_for, shortcut_for
from shortft.checkpoint import Checkpoint, load_latest, save_checkpoint
from shortft.config import Config, to_yaml
from shortft.drawing.progress import TrainProgress
from shortft.errors import UserError
from shortft.families import load_family
from shortft.families.base import Family, Guidance
from shortft.inputs import read_prompts
from shortft.memory import peak_memory_bytes
from shortft.networks import ModelNetworks
from shortft.plans import METHODS, Plan, inference_plan
from shortft.rewards import anchor_warning, held_out_scorer, make_reward
from shortft.rewards.combine import WeightedSum
from shortft.sampling import check_segments, generate
from shortft.schedule import Schedule
from shortft.seeds import generator, sample_seed
from shortft.step import Batch, Outcome, train_step

MAX_SKIPPED = 10
NOISE, PROMPTS, PICTURES = 1, 2, 3  # places in the seed's name space


@dataclass
class Counters:
    """Where a run stands: updates done, seconds of training, skipped in a row, stage."""

    update: int = 0
    seconds: float = 0.0
    skipped: int = 0
    stage: int = 1


class Trainer:
    """Everything a run needs, set up from its configuration.

    Raises:
        UserError: before any slow work, for whatever in the configuration cannot be done.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.accelerator = Accelerator(
            log_with="tensorboard" if config.tensorboard else None,
            project_dir=str(config.output_dir),
        )
        share = config.accumulation * self.accelerator.num_processes
        if config.batch_size % share:
            raise UserError(
                f"--batch-size {config.batch_size}: cannot be split over "
                f"{self.accelerator.num_processes} processes × {config.accumulation} parts; use a "
                f"multiple of {share}"
            )
        self.prompts = training_prompts(config)
        shortcut = shortcut_for(config.model, config.shortcut)
        digest = hashlib.sha256("\n".join(self.prompts).encode())
        digest.update(shortcut.read_bytes() if shortcut else b"")
        self.inputs = digest.hexdigest()  # of what the configuration names by path only
        device = str(self.accelerator.device)
        self.family: Family = load_family(config.model, precision=config.precision, device=device)
        self.schedule: Schedule = self.family.schedule(config.num_steps)
        self.plans = stage_plans(config, self.schedule)
        scale = config.guidance_scale
        self.guidance_scale = self.family.default_guidance_scale if scale is None else scale
        self.nets = ModelNetworks(
            self.family,
            guidance=Guidance(self.guidance_scale, config.guidance_grad),
            shortcut_guidance=Guidance(
                config.shortcut_guidance_scale or own_guidance(shortcut), config.guidance_grad
            ),
            loras=config.segments if config.timestep_lora else 1,
            rank=config.rank,
            seed=config.seed,
            shortcut=shortcut,
            merge_shortcut=config.merge_shortcut,
        )
        self.reward: WeightedSum = make_reward(config.reward, config.reward_model, device)
        self.held_out = held_out_scorer(config.model, device)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(self.nets.parameters_of(number).values())}
                for number in range(1, self.nets.loras + 1)
            ],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            betas=(0.9, 0.999),
        )
        self.counters = Counters()
        self.between_updates = True

    @property
    def micro_batch(self) -> int:
        """Samples that one process runs at once."""
        return self.config.batch_size // (self.config.accumulation * self.accelerator.num_processes)

    # One update

    def stage(self) -> int:
        """1…k, from the share of the budget that is spent; a larger budget never goes back."""
        spent = self.spent()
        bounds = stage_bounds(self.config)
        due = next((i for i, bound in enumerate(bounds, 1) if spent < bound), len(bounds))
        self.counters.stage = max(self.counters.stage, due)
        return self.counters.stage

    def spent(self) -> float:
        """Share of the budget that is spent; the run ends at 1."""
        config, counters = self.config, self.counters
        shares = [0.0]
        if config.updates is not None:
            shares.append(counters.update / config.updates)
        if config.minutes is not None:
            shares.append(counters.seconds / (60 * config.minutes))
        return max(shares)

    def batches(self, update: int) -> list[Batch]:
        """This process's micro-batches; sample i of an update is the same however it is split."""
        config = self.config
        size = self.micro_batch
        first = self.accelerator.process_index * size * config.accumulation
        made = []
        for start in range(first, first + size * config.accumulation, size):
            rows, seeds = [], []
            for index in range(start, start + size):
                rows.append(self._prompt_row(update * config.batch_size + index))
                seeds.append(sample_seed(config.seed, NOISE, update, index))
            made.append(Batch([self.prompts[row] for row in rows], seeds))
        return made

    def _prompt_row(self, position: int) -> int:
        """Every prompt once per epoch, in an order drawn per epoch."""
        epoch, offset = divmod(position, len(self.prompts))
        if epoch != getattr(self, "_epoch", None):
            self._epoch = epoch
            order = generator(self.config.seed, PROMPTS, epoch)
            self._order = torch.randperm(len(self.prompts), generator=order).tolist()
        return int(self._order[offset])

    def update(self) -> tuple[int, Outcome]:
        """One optimizer update; returns the stage it belonged to and what it did."""
        began = time.monotonic()
        self.between_updates = False
        stage = self.stage()
        plan = self.plans[stage - 1]
        self.nets.train_only(plan.trainable)
        outcome = train_step(
            plan,
            self.batches(self.counters.update),
            self.family,
            self.nets,
            self.schedule,
            self.reward,
            self.optimizer,
            self.accelerator,
            max_grad_norm=self.config.max_grad_norm,
            recompute=self.config.recompute,
        )
        counters = self.counters
        counters.update += 1
        # Stages may depend on the clock: all processes follow the first one's.
        clock = [counters.seconds + time.monotonic() - began]
        counters.seconds = float(broadcast_object_list(clock)[0])
        counters.skipped = counters.skipped + 1 if outcome.skipped else 0
        self.between_updates = True
        if counters.skipped >= MAX_SKIPPED:
            raise UserError(
                f"--reward {self.config.reward}: {MAX_SKIPPED} updates in a row had a gradient "
                "that is not finite; lower --learning-rate, or use --precision fp32"
            )
        return stage, outcome

    # What is kept

    def save_checkpoint(self, log_bytes: int) -> None:
        tensors: dict[str, dict[str, Tensor]] = {}
        for number in range(1, self.nets.loras + 1):
            tensors[f"lora_{number}"] = self.nets.state_of(number)
            tensors[f"optimizer_{number}"] = {
                f"{name}/{key}": value
                for name, parameter in self.nets.parameters_of(number).items()
                for key, value in self.optimizer.state.get(parameter, {}).items()
            }
        state = {
            **vars(self.counters),
            "log_bytes": log_bytes,
            "inputs": self.inputs,
            "config": to_yaml(self.config),
        }
        save_checkpoint(
            self.config.output_dir / "checkpoints",
            self.counters.update,
            tensors,
            state,
            keep=self.config.keep_checkpoints,
        )

    def restore(self, saved: Checkpoint) -> None:
        """Go back to a checkpoint.

        Raises:
            UserError: if the prompts or the shortcut are no longer those of the run.
        """
        if saved.state["inputs"] != self.inputs:
            raise UserError(
                "--resume: the prompts or the shortcut's file changed since the checkpoint; "
                "restore them, or start a new run in another --output-dir"
            )
        for number in range(1, self.nets.loras + 1):
            copy_state(self.nets, number, saved.tensors[f"lora_{number}"])
            flat = saved.tensors[f"optimizer_{number}"]
            for name, parameter in self.nets.parameters_of(number).items():
                prefix = f"{name}/"
                kept = {k[len(prefix) :]: v for k, v in flat.items() if k.startswith(prefix)}
                if kept:
                    on = parameter.device
                    self.optimizer.state[parameter] = {
                        key: value if key == "step" else value.to(on) for key, value in kept.items()
                    }
        for name in vars(self.counters):
            setattr(self.counters, name, saved.state[name])

    def save_adapter(self) -> Path:
        plan = inference_plan(
            self.schedule, self.config.segments, timestep_lora=self.config.timestep_lora
        )
        active = [step for step in plan.steps if step.adapters]
        info = AdapterInfo(
            base_model=self.config.model,
            loras=self.nets.loras,
            rank=self.config.rank,
            segments=self.config.segments,
            timestep_lora=self.config.timestep_lora,
            num_steps=self.config.num_steps,
            timesteps=[round(float(self.schedule.timesteps[s.start])) for s in active],
            stacked=[s.adapters for s in active],
            guidance_scale=self.guidance_scale,
            config=self.config.model_dump(mode="json"),
        )
        directory = self.config.output_dir / "adapter"
        save_adapter(self.nets, info, directory)
        return directory

    def pictures(self) -> tuple[list[str], Tensor]:
        """Fixed prompts from fixed noise by the true inference chain."""
        count = self.config.sample_prompts
        stride = max(1, len(self.prompts) // count)
        rows = [i * stride % len(self.prompts) for i in range(count)]
        plan = inference_plan(
            self.schedule, self.config.segments, timestep_lora=self.config.timestep_lora
        )
        seeds = [sample_seed(self.config.seed, PICTURES, i) for i in range(count)]
        images = generate(
            self.family,
            self.nets,
            plan,
            self.schedule,
            self.family.encode([self.prompts[row] for row in rows]),
            seeds,
            batch_size=self.micro_batch,
        )
        return [self.prompts[row] for row in rows], images


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
        len(trainer.plans),
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

    if main and config.sample_every and trainer.counters.update == 0:
        look(trainer, log)
    while trainer.spent() < 1:
        before = trainer.counters.seconds
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
        if main and every(config.sample_every):
            look(trainer, log)
        if main and every(config.checkpoint_every) and trainer.spent() < 1:
            trainer.save_checkpoint(log.position())
    if main and config.sample_every and not every(config.sample_every):
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
        "eval_reward": float(trainer.reward(on_device, prompts).mean()),
    }
    if trainer.held_out is not None:
        row["eval_held_out"] = float(trainer.held_out(on_device, prompts).mean())
    log.write(row)
    if trainer.config.tensorboard:
        trainer.accelerator.log({k: v for k, v in row.items() if k != "update"}, step=update)
        writer = trainer.accelerator.get_tracker("tensorboard", unwrap=True)
        writer.add_images("samples", images, update)


class MetricsLog:
    """One JSON object per line; a resumed run cuts off what came after its checkpoint."""

    def __init__(self, path: Path, length: int, *, enabled: bool) -> None:
        self.path, self.enabled = path, enabled
        if enabled:
            path.touch()
            os.truncate(path, min(length, path.stat().st_size))

    def write(self, row: dict[str, Any]) -> None:
        if self.enabled:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(without_nan(row), allow_nan=False) + "\n")

    def position(self) -> int:
        return self.path.stat().st_size if self.enabled else 0


def without_nan(value: Any) -> Any:
    """The same with null for numbers that JSON does not know."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def stage_plans(config: Config, schedule: Schedule) -> list[Plan]:
    """The plan of each stage.

    Raises:
        UserError: if the chain cannot be cut so, or a plan carries no gradient.
    """
    check_segments(schedule, config.segments)
    make: Callable[..., Plan] = METHODS[config.method]
    plans = [
        make(
            schedule,
            config.segments,
            stage,
            timestep_lora=config.timestep_lora,
            shortcut=config.shortcut != "none",
        )
        for stage in range(1, config.segments + 1)
    ]
    if not all(plan.grad_calls for plan in plans):
        raise UserError(f"--method {config.method}: a plan has no step that carries gradient")
    return plans


def stage_bounds(config: Config) -> list[float]:
    """Shares of the budget at which each stage ends."""
    shares = config.stage_shares or (1 / config.segments,) * config.segments
    total, bounds = 0.0, []
    for share in shares:
        total += share
        bounds.append(round(total / sum(shares), 9))  # 0.1 + 0.2 is no more than 0.3
    return bounds


def training_prompts(config: Config) -> list[str]:
    if config.prompts is not None:
        return read_prompts(config.prompts)
    return prompts_for(config.model, "train")


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
