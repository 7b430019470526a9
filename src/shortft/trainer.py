"""One training run's state: networks, plans, optimizer and counters, and what is kept of them."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from shortft.adapter import AdapterInfo, copy_state, save_adapter
from shortft.assets import prompts_for
from shortft.checkpoint import Checkpoint, save_checkpoint
from shortft.config import Config, to_yaml
from shortft.ema import Average
from shortft.errors import UserError
from shortft.families import load_family
from shortft.families.base import Family, Guidance
from shortft.guard import Guard
from shortft.inputs import read_prompts
from shortft.methods import METHODS, make_plan, placement_of
from shortft.networks import ModelNetworks
from shortft.optimizers import make_optimizer, set_state, state_of
from shortft.out_of_memory import advice, ran_out
from shortft.plans import Plan, inference_plan, parts_for
from shortft.rewards import held_out_scorer, make_reward
from shortft.rewards.combine import WeightedSum
from shortft.sampling import check_segments, generate
from shortft.schedule import Schedule
from shortft.seeds import generator, sample_seed
from shortft.shortcuts import Shortcut, find_shortcut
from shortft.step import Batch, Outcome, train_step

MAX_SKIPPED = 10
CLOCKS = {"wall": time.monotonic, "cpu": time.process_time}
Scorer = Callable[[Tensor, Sequence[str]], Tensor]
NOISE, PROMPTS, PICTURES, PLAN = 1, 2, 3, 6  # places in the seed's name space


@dataclass
class Counters:
    """Where a run stands: updates done, seconds of training by the run's clock, skipped in a row,
    stage, and whether the pictures of this update are still to be drawn.
    """

    update: int = 0
    seconds: float = 0.0
    skipped: int = 0
    stage: int = 1
    look_due: bool = False


class Trainer:
    """Everything a run needs, set up from its configuration.

    Raises:
        UserError: before any slow work, for whatever in the configuration cannot be done.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        check_launcher()
        # Without this, processes that torchrun starts on CPUs would not know of one another.
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        self.accelerator = Accelerator(
            cpu=several and not torch.cuda.is_available(),
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
        shown = config.sample_from
        self.sample_prompts = read_prompts(shown) if shown else self.prompts
        method = METHODS[config.method]
        self.shortcut = shortcut = Shortcut(None)
        if method.uses_segments:
            self.shortcut = shortcut = find_shortcut(config.model, config.shortcut, config.segments)
        digest = hashlib.sha256("\n".join(self.prompts).encode())
        digest.update(shortcut.path.read_bytes() if shortcut.path else b"")
        self.inputs = digest.hexdigest()  # of what the configuration names by path only
        device = str(self.accelerator.device)
        self.family: Family = load_family(
            config.model,
            pipeline=config.pipeline,
            decoder=config.decoder,
            precision=config.precision,
            device=device,
            resolution=config.resolution,
        )
        if config.encode_ahead:
            self.family.encode_ahead([*self.prompts, *self.sample_prompts])
        self.schedule: Schedule = self.family.schedule(config.num_steps)
        if method.uses_segments:
            check_segments(self.schedule, config.segments)
        self.placement = placement_of(
            config.method, config.method_options, timestep_lora=config.timestep_lora
        )
        parts = parts_for(self.placement, config.segments)
        self.inference = inference_plan(self.schedule, parts, self.placement)
        self.stages = config.segments if method.by_segment else 1
        for stage in range(1, self.stages + 1):
            if not self.plan(0, stage).grad_calls:
                raise UserError(f"--method {config.method}: no step of its plan carries gradient")
        scale = config.guidance_scale
        self.guidance_scale = self.family.default_guidance_scale if scale is None else scale
        self.nets = ModelNetworks(
            self.family,
            guidance=Guidance(self.guidance_scale, config.guidance_grad),
            shortcut_guidance=Guidance(
                config.shortcut_guidance_scale or shortcut.guidance_scale, config.guidance_grad
            ),
            loras=config.segments if self.placement in ("stacked", "segments") else 1,
            rank=config.rank,
            seed=config.seed,
            shortcut=shortcut.path,
            shortcut_scale=config.shortcut_scale or shortcut.scale,
            merge=config.merge,
            plain_jumps=config.shortcut == "plain",
        )
        scored_on = config.reward_device or device
        half = torch.bfloat16 if config.reward_precision == "bf16" else torch.float32
        self.reward: WeightedSum = make_reward(config.reward, config.reward_model, scored_on, half)
        self.held_out: Scorer | None = (
            make_reward(config.held_out, config.reward_model, scored_on, half)
            if config.held_out
            else held_out_scorer(config.model, device)
        )
        if config.best_by == "held_out" and self.held_out is None:
            raise UserError(
                f"--best-by held_out: {config.model} has no scorer of its own; name one by "
                "--held-out, or use --best-by reward"
            )
        self.guard = Guard(config.guard_drop, config.best_by)
        self.tripped = False  # the guard has ended the run
        self.optimizer = make_optimizer(
            config.optimizer,
            [list(self.nets.parameters_of(n).values()) for n in range(1, self.nets.loras + 1)],
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
        )
        self.average = Average(
            {n: self.nets.parameters_of(n) for n in range(1, self.nets.loras + 1)}, config.ema
        )
        self.counters = Counters()
        self.splits = config.accumulation

    @property
    def micro_batch(self) -> int:
        """Samples that one process runs at once."""
        return self.config.batch_size // (self.splits * self.accelerator.num_processes)

    # One update

    def plan(self, update: int, stage: int) -> Plan:
        """The plan of an update; random methods draw it anew for each, alike on all processes.

        Raises:
            UserError: if the method's options do not fit the chain.
        """
        config = self.config
        try:
            return make_plan(
                config.method,
                self.schedule,
                config.segments,
                stage,
                generator(config.seed, PLAN, update),
                config.method_options,
                timestep_lora=config.timestep_lora,
                shortcut=config.shortcut != "none",
            )
        except ValueError as error:
            raise UserError(
                f"--method {config.method}, --num-steps {config.num_steps}: {error}"
            ) from error

    def stage(self) -> int:
        """1…k, from the share of the budget that is spent; a larger budget never goes back."""
        spent = self.spent()
        bounds = stage_bounds(self.config.stage_shares, self.stages)
        due = next((i for i, bound in enumerate(bounds, 1) if spent < bound), len(bounds))
        self.counters.stage = max(self.counters.stage, due)
        return self.counters.stage

    def learning_rate(self) -> float:
        """Constant, then linear to 0 over the last `learning_rate_decay` of the budget."""
        config = self.config
        left = 1 - self.spent()
        if left >= config.learning_rate_decay:
            return config.learning_rate
        return config.learning_rate * left / config.learning_rate_decay

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
        first = self.accelerator.process_index * size * self.splits
        made = []
        for start in range(first, first + size * self.splits, size):
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

    def update(self, commit: Callable[[], None] = lambda: None) -> tuple[int, Outcome]:
        """One optimizer update; returns the stage it belonged to and what it did.

        Args:
            commit: called just before weights change; from then on nothing may interrupt.

        Raises:
            UserError: if memory ran out and the batch cannot be split further, a reward
                misbehaves, or too many updates in a row were skipped.
        """
        clock = CLOCKS[self.config.clock]
        began = clock()
        stage = self.stage()
        plan = self.plan(self.counters.update, stage)
        self.nets.train_only(plan.trainable)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        while True:
            try:
                outcome = train_step(
                    plan,
                    self.batches(self.counters.update),
                    self.family,
                    self.nets,
                    self.schedule,
                    self.reward,
                    self.optimizer,
                    self.accelerator,
                    inference=self.inference,
                    max_grad_norm=self.config.max_grad_norm,
                    recompute=self.config.recompute,
                    anchor=self.config.anchor,
                    reward_seconds=self.config.reward_seconds,
                    commit=commit,
                )
                break
            except (MemoryError, RuntimeError) as error:
                if not ran_out(error):
                    raise
                problem = advice(self.config, self.micro_batch)
            # Outside the handler, whose traceback would keep the activations alive.
            self.optimizer.zero_grad(set_to_none=True)
            if not (self.config.split_on_out_of_memory and self.micro_batch % 2 == 0):
                raise UserError(problem)
            self.splits *= 2
        counters = self.counters
        counters.update += 1
        if not outcome.skipped:
            self.average.update(counters.update)
        # Stages may depend on the clock: all processes follow the first one's.
        seconds = [counters.seconds + clock() - began]
        counters.seconds = float(broadcast_object_list(seconds)[0])
        counters.skipped = counters.skipped + 1 if outcome.skipped else 0
        return stage, outcome

    def check_skipped(self) -> None:
        """Give up where updates in a row changed nothing.

        Raises:
            UserError: after `MAX_SKIPPED` of them.
        """
        if self.counters.skipped >= MAX_SKIPPED:
            raise UserError(
                f"--reward {self.config.reward}: {MAX_SKIPPED} updates in a row had a reward or a "
                "gradient that is not finite; lower --learning-rate, or use --precision fp32"
            )

    def check_same_start(self) -> None:
        """Whether all processes start at the same update.

        Raises:
            UserError: if not, on all of them.
        """
        update = torch.tensor([self.counters.update], device=self.accelerator.device)
        found = self.accelerator.gather(update).tolist()
        if len(set(found)) > 1:
            raise UserError(
                f"--output-dir {self.config.output_dir}: processes found checkpoints of updates "
                f"{', '.join(map(str, found))}; all of them must see the same directory"
            )

    def asked_to_stop(self, asked: int | None) -> int | None:
        """The signal that any process got, agreed on by all."""
        if self.accelerator.num_processes == 1:
            return asked
        number = torch.tensor([float(asked or 0)], device=self.accelerator.device)
        return int(self.accelerator.gather(number).max()) or None

    def agree_on_guard(self) -> None:
        """Let all processes know what the first one's guard decided."""
        if self.accelerator.num_processes > 1:
            self.tripped = bool(broadcast_object_list([self.tripped])[0])

    # What is kept

    def save_checkpoint(self, log_bytes: int) -> None:
        self.average.put_back()  # a signal may have come while it was in use
        tensors: dict[str, dict[str, Tensor]] = self.average.state()
        for number in range(1, self.nets.loras + 1):
            tensors[f"lora_{number}"] = self.nets.state_of(number)
            tensors[f"optimizer_{number}"] = {
                f"{name}/{key}": value
                for name, parameter in self.nets.parameters_of(number).items()
                for key, value in state_of(self.optimizer, parameter).items()
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

    def checkpoint_bytes(self) -> int:
        """Largest size of a checkpoint: weights, AdamW's two moments and an average in fp32."""
        loras = range(1, self.nets.loras + 1)
        return (16 if self.config.ema else 12) * sum(
            p.numel() for n in loras for p in self.nets.parameters_of(n).values()
        )

    def restore(self, saved: Checkpoint, *, allow_change: bool = False) -> None:
        """Go back to a checkpoint.

        Raises:
            UserError: if the prompts or the shortcut are no longer those of the run, or the
                checkpoint holds something else than this run would write.
        """
        try:
            self._restore(saved, allow_change=allow_change)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(
                f"--resume: {saved.path} does not hold this run's state ({error}); start a new run "
                "in another --output-dir"
            ) from error

    def _restore(self, saved: Checkpoint, *, allow_change: bool) -> None:
        if saved.state["inputs"] != self.inputs and not allow_change:
            raise UserError(
                "--resume: the prompts or the shortcut's file changed since the checkpoint; "
                "restore them, pass --allow-change, or start a new run in another --output-dir"
            )
        for number in range(1, self.nets.loras + 1):
            copy_state(self.nets, number, saved.tensors[f"lora_{number}"])
            flat = saved.tensors[f"optimizer_{number}"]
            for name, parameter in self.nets.parameters_of(number).items():
                prefix = f"{name}/"
                kept = {k[len(prefix) :]: v for k, v in flat.items() if k.startswith(prefix)}
                if kept:
                    set_state(self.optimizer, parameter, kept)
        self.average.restore(saved.tensors)
        numbers = [saved.state["log_bytes"], saved.state.get("update", 0)]
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ValueError(f"its counters are {numbers}")
        for name in vars(self.counters):
            setattr(self.counters, name, saved.state.get(name, getattr(self.counters, name)))

    def save_adapter(self, folder: str = "adapter") -> Path:
        """Write the LoRAs as they are now, or their average, into a folder of the run."""
        active = [step for step in self.inference.steps if step.adapters]
        info = AdapterInfo(
            base_model=self.config.model,
            loras=self.nets.loras,
            rank=self.config.rank,
            segments=self.config.segments,
            placement=self.placement,
            num_steps=self.config.num_steps,
            timesteps=[round(float(self.schedule.timesteps[s.start])) for s in active],
            stacked=[s.adapters for s in active],
            guidance_scale=self.guidance_scale,
            resolution=self.config.resolution,
            config=self.config.model_dump(mode="json"),
        )
        directory = self.config.output_dir / folder
        with self.average.in_place():
            save_adapter(self.nets, info, directory)
        return directory

    def pictures(self) -> tuple[list[str], Tensor]:
        """Fixed prompts from fixed noise by the true inference chain."""
        count, listed = self.config.sample_prompts, self.sample_prompts
        stride = max(1, len(listed) // count)
        prompts = [listed[i * stride % len(listed)] for i in range(count)]
        seeds = [sample_seed(self.config.seed, PICTURES, i) for i in range(count)]
        with self.average.in_place():
            images = generate(
                self.family,
                self.nets,
                self.inference,
                self.schedule,
                self.family.encode(prompts),
                seeds,
                batch_size=self.micro_batch,
            )
        return prompts, images


def check_launcher() -> None:
    """Refuse launchers that promise to share the model out: every process holds all of it.

    Raises:
        UserError: if accelerate was told to use FSDP, DeepSpeed or Megatron.
    """
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1"):
            raise UserError(
                f"accelerate launch: {name} is asked for, but models are not split over processes; "
                "start without it (docs/several-gpus.md), and save memory by --recompute, "
                "--encode-ahead and --accumulation"
            )


def stage_bounds(shares: Sequence[float] | None, stages: int) -> list[float]:
    """Shares of the budget at which each stage ends; equal ones where none are given."""
    if shares is None or stages == 1:
        shares = (1 / stages,) * stages
    total, bounds = 0.0, []
    for share in shares:
        total += share
        bounds.append(round(total / sum(shares), 9))  # 0.1 + 0.2 is no more than 0.3
    return bounds


def training_prompts(config: Config) -> list[str]:
    if config.prompts is not None:
        return read_prompts(config.prompts)
    return prompts_for(config.model, "train")
