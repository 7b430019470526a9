"""One training run's state: networks, plans, optimizer and counters; `kept` writes and reads it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from torch import Tensor

from shortft.assets import EMBEDDED, prompts_for
from shortft.config import Config, option_name
from shortft.ema import Average
from shortft.errors import AllAtOnce, UserError
from shortft.families import load_family
from shortft.families.base import Family, Guidance
from shortft.fingerprint import fingerprint, held_out_print
from shortft.guard import Guard
from shortft.inputs import read_prompts
from shortft.judge import judge
from shortft.launcher import check_split, processes
from shortft.methods import METHODS
from shortft.networks import ModelNetworks, few_step_guidance
from shortft.optimizers import make_optimizer
from shortft.out_of_memory import advice, ran_out
from shortft.plans import Plan, inference_plan, parts_for, stage_bounds
from shortft.precision import settled
from shortft.preflight.files import check_local_files
from shortft.rewards import held_out_scorer, make_reward
from shortft.rewards.combine import WeightedSum
from shortft.run_plans import lora_count, placement, plan_of, stage_count
from shortft.sampling import Sampler, check_segments
from shortft.schedule import Schedule
from shortft.seeds import NOISE, OTHERS, PICTURES, PROMPTS, generator, sample_seed
from shortft.shortcuts import BASE_JUMPS, Shortcut, find_shortcut
from shortft.step import Batch, Outcome, train_step

MAX_SKIPPED = 10
MAX_FLAT = 3
CLOCKS = {"wall": time.monotonic, "cpu": time.process_time}


@dataclass
class Counters:
    """Where a run stands: updates done, seconds of training by the run's clock, updates in a row
    that were skipped or had no gradient at all, stage, and whether the pictures of this update are
    still to be drawn.
    """

    update: int = 0
    seconds: float = 0.0
    skipped: int = 0
    flat: int = 0
    stage: int = 1
    look_due: bool = False


class Trainer:
    """Everything a run needs, set up from its configuration.

    Raises:
        UserError: before any slow work, for whatever in the configuration cannot be done.
    """

    def __init__(self, config: Config) -> None:
        self.config = config = settled(config)
        check_local_files(config)
        if config.held_out is None and config.model != EMBEDDED:
            for option in ("best_by held_out", "guard stop"):
                name, value = option.split()
                if getattr(config, name) == value:
                    raise UserError(
                        f"{option_name(name)} {value}: {config.model} has no scorer of its own; "
                        "name one by --held-out"
                    )
        # Without this, processes that torchrun starts on CPUs would not know of one another.
        self.accelerator = Accelerator(
            cpu=processes() > 1 and not torch.cuda.is_available(),
            log_with="tensorboard" if config.tensorboard else None,
            project_dir=str(config.output_dir),
        )
        check_split(config, self.accelerator.num_processes)
        self.prompts = training_prompts(config)
        shown = config.sample_from
        self.sample_prompts = read_prompts(shown) if shown else self.prompts
        method = METHODS[config.method]
        self.shortcut = shortcut = Shortcut(None)
        if method.shortcut is not None:
            self.shortcut = shortcut = find_shortcut(
                config.model,
                config.shortcut,
                config.segments,
                auto=method.shortcut,
                guidance_scale=config.shortcut_guidance_scale,
            )
        self.inputs = fingerprint(config, self.prompts, shortcut.path)
        self.held_out_by = held_out_print(config)
        device = str(self.accelerator.device)
        self.family: Family = load_family(
            config.model,
            pipeline=config.pipeline,
            decoder=config.decoder,
            precision=config.precision,
            device=device,
            resolution=config.resolution,
            sharded=config.shard,
        )
        if config.encode_ahead:
            self.family.encode_ahead([*self.prompts, *self.sample_prompts])
        self.schedule: Schedule = self.family.schedule(config.num_steps)
        if method.uses_segments:
            check_segments(self.schedule, config.segments)
        self.placement = placement(config)
        parts = parts_for(self.placement, config.segments)
        self.inference = inference_plan(self.schedule, parts, self.placement)
        self.stages = stage_count(config)
        for stage in range(1, self.stages + 1):
            if not self.plan(0, stage).grad_calls:
                raise UserError(f"--method {config.method}: no step of its plan carries gradient")
        scale = config.guidance_scale
        self.guidance_scale = self.family.default_guidance_scale if scale is None else scale
        own = config.shortcut_guidance_scale or shortcut.guidance_scale
        jump_scale = own or few_step_guidance(self.family, self.guidance_scale)
        # How jumps run, which a shortcut's file alone does not say; None without a shortcut.
        self.jumps_by = method.shortcut and [
            config.shortcut if config.shortcut in BASE_JUMPS else "file",
            jump_scale,
            config.shortcut_scale or shortcut.scale,
        ]
        self.nets = ModelNetworks(
            self.family,
            guidance=Guidance(self.guidance_scale, config.guidance_grad),
            shortcut_guidance=Guidance(jump_scale, config.guidance_grad),
            loras=lora_count(config),
            rank=config.rank,
            seed=config.seed,
            shortcut=shortcut.path,
            shortcut_scale=config.shortcut_scale or shortcut.scale,
            merge=config.merge,
            plain_jumps=config.shortcut == "plain",
        )
        self.reward = scorer_of(config, config.reward, device)
        self.held_out = (
            scorer_of(config, config.held_out, device)
            if config.held_out
            else held_out_scorer(config.model, device)
        )
        self.guard = Guard(config.guard_drop, config.best_by)
        self.tripped = False  # the guard has ended the run
        self.best: dict[int, dict[str, Tensor]] | None = None  # LoRAs of the best evaluation
        self.optimizer = make_optimizer(
            config.optimizer,
            [list(self.nets.parameters_of(n).values()) for n in self.numbers],
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
        )
        self.average = Average({n: self.nets.parameters_of(n) for n in self.numbers}, config.ema)
        self.counters = Counters()
        self.splits = config.accumulation

    @property
    def numbers(self) -> range:
        """The LoRAs' numbers, 1…k."""
        return range(1, self.nets.loras + 1)

    @property
    def lora_numbers(self) -> int:
        """How many numbers all LoRAs have."""
        groups = [self.nets.parameters_of(number).values() for number in self.numbers]
        return sum(parameter.numel() for group in groups for parameter in group)

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
        return plan_of(self.config, self.schedule, update, stage)

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
        left = max(0.0, 1 - self.spent())
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
            self.seed_others()
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
        counters.flat = counters.flat + 1 if outcome.grad_norm == 0 else 0
        return stage, outcome

    def seed_others(self) -> None:
        """Seed the global generators, which only others draw from, such as a user's reward.

        Drawn per update and process, their numbers are the same after a resume. Nothing of this
        package draws from them; `train` gives them back, a loop of one's own must do so itself
        (`seeds.given_back`).
        """
        rank = self.accelerator.process_index
        set_seed(sample_seed(self.config.seed, OTHERS, self.counters.update, rank) % 2**32)

    def check_progress(self) -> None:
        """Give up where updates in a row changed nothing.

        Raises:
            AllAtOnce: after `MAX_SKIPPED` that were not finite, or `MAX_FLAT` without gradient.
        """
        if self.counters.flat >= MAX_FLAT:
            raise AllAtOnce(
                f"--reward {self.config.reward}: {MAX_FLAT} updates in a row had a gradient of "
                "exactly 0, so that nothing is learned; its score must follow from the pixels "
                "without rounding, thresholds and counting, and must not be at its limit already"
            )
        if self.counters.skipped >= MAX_SKIPPED:
            raise AllAtOnce(
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

    # What is looked at

    def score(self, scorer: WeightedSum, images: Tensor, prompts: Sequence[str]) -> float:
        """Mean score of pictures (B, 3, H, W) that only are looked at.

        Raises:
            UserError: naming the reward that misbehaves.
        """
        scores, size = [], self.micro_batch
        with scorer.at_work(images.device):
            for i in range(0, len(images), size):
                few, of_few = images[i : i + size], prompts[i : i + size]
                parts = judge(scorer, few, of_few, seconds=self.config.reward_seconds)
                scores.append(scorer.combine(parts))
        return float(torch.cat(scores).mean())

    def pictures(self) -> tuple[list[str], Tensor]:
        """Fixed prompts by the true chain: all from a first noise each, then from further ones."""
        count, listed = self.config.sample_prompts, self.sample_prompts
        stride = max(1, len(listed) // count)
        noises = self.config.sample_noises
        prompts = [listed[i * stride % len(listed)] for i in range(count)] * noises
        seeds = [sample_seed(self.config.seed, PICTURES, i) for i in range(count * noises)]
        with self.average.in_place():
            sampler = Sampler(self.nets, self.schedule, self.inference)
            images = sampler.draw(prompts, seeds, batch_size=self.micro_batch)
        return prompts, images


def scorer_of(config: Config, spec: str, device: str) -> WeightedSum:
    """A reward with its models where the configuration wants them."""
    return make_reward(
        spec,
        config.reward_model,
        "cpu" if config.reward_device else device,
        torch.bfloat16 if config.reward_precision == "bf16" else torch.float32,
        visits=config.reward_device == "offload",
    )


def training_prompts(config: Config) -> list[str]:
    if config.prompts is not None:
        return read_prompts(config.prompts)
    return prompts_for(config.model, "train")
