"""Memory, time and disk of a run, counted on an empty copy of its networks. Nothing is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from shortft.config import Config
from shortft.cost import Call, Cost, Kept
from shortft.families.base import Guidance
from shortft.families.pipeline import PipelineFamily
from shortft.launcher import processes
from shortft.methods import METHODS
from shortft.networks import few_step_guidance
from shortft.plans import Plan, inference_plan, parts_for, stage_bounds
from shortft.precision import settled
from shortft.preflight.disk import disk_bytes
from shortft.preflight.outline import (
    adapted_layers,
    as_if_real,
    blank_prompt,
    empty_family,
    encoder_parameters,
    linear_parameters,
    lora_layers,
    lora_numbers,
    parameters,
)
from shortft.preflight.places import specs
from shortft.rewards.spec import scorers
from shortft.run_plans import placement, plan_of, stage_count
from shortft.schedule import Schedule
from shortft.shortcuts import BASE_JUMPS, known_guidance

# Parameters in millions, and GB of activations per picture, of reward models in fp32, which is how
# training runs them, counted on empty models of the same configuration (ImageReward: about).
REWARD_MODELS = {
    "clip": (427.6, 0.36),  # a ViT-L/14
    "pickscore": (986.1, 0.43),
    "hpsv2": (986.1, 0.43),
    "hpsv2.1": (986.1, 0.43),
    "imagereward": (447.0, 0.5),
    "aesthetic": (428.5, 0.36),
}
GB = 10**9
ON_TOP = 1.2  # fragments, kernels' workspace, norms that a GPU runs in fp32
FIXED = 1 * GB  # CUDA's context and libraries, or Python's


@dataclass(frozen=True)
class Estimate:
    """What a run takes.

    Attributes:
        parts: bytes by what they are, at the peak of training.
        encoding: bytes while prompts are encoded ahead, text encoders included.
        disk: bytes that the run will write.
        cost: seconds and bytes of single calls.
        stages: the plan of each stage.
        schedule: of the chain.
        speed: operations per second that the time was computed with.
    """

    parts: dict[str, int]
    encoding: int
    disk: int
    cost: Cost
    stages: list[Plan]
    schedule: Schedule
    speed: float

    @property
    def peak(self) -> int:
        """Bytes at the peak, with what comes on top."""
        return max(int(sum(self.parts.values()) * ON_TOP), self.encoding) + FIXED


def estimate(config: Config, folder: Path, *, gpu: bool, speed: float) -> Estimate:
    """Count what a run of `config` takes per process, of as many as WORLD_SIZE says.

    Args:
        folder: the model's configurations in diffusers' layout.
        gpu: count for a GPU.
        speed: operations per second, see `measure_speed`.

    Raises:
        UserError: the model's configuration or the chain does not fit.
    """
    config = settled(config)
    family = empty_family(
        folder,
        precision=config.precision,
        resolution=config.resolution,
        tiny_decoder=config.decoder is not None,
        gpu=gpu,
    )
    schedule = family.schedule(config.num_steps)
    stages = [plan_of(config, schedule, 0, stage) for stage in range(1, stage_count(config) + 1)]
    scale = config.guidance_scale
    guidance = Guidance(
        family.default_guidance_scale if scale is None else scale, config.guidance_grad
    )
    micro = max(1, config.batch_size // (config.accumulation * processes()))
    models = [
        REWARD_MODELS[name]
        for spec in specs(config)
        for name in sorted(scorers(spec))
        if name in REWARD_MODELS and (name != "clip" or config.reward_model)  # else it is tiny
    ]
    numbers = lora_numbers(config, family)
    own = shortcut_guidance(config) or few_step_guidance(family, guidance.scale)
    jump_guidance = Guidance(own, config.guidance_grad)
    if config.recompute:  # one branch after the other
        guidance, jump_guidance = (replace(g, grad="positive") for g in (guidance, jump_guidance))
    adapted = lora_layers(family)
    call, jump, picture = _counted(family, adapted, (guidance, jump_guidance))
    at_once = 1 if config.recompute else micro  # pictures that are decoded together
    decoding, scoring = picture.kept * at_once, int(sum(gb for _, gb in models) * GB) * micro
    cost = Cost(
        call=_at(call, micro, speed),
        jump=_at(jump, micro, speed),
        decode=2 * picture.operations * micro / speed,
        decode_bytes=decoding,
        score_bytes=scoring,
        steps=schedule.num_steps,
        anchored=config.anchor > 0,
    )
    scoring *= 1 + max(plan.renoise for plan in stages)
    activations = max(cost.activation_bytes(plan, recompute=config.recompute) for plan in stages)
    width = 2 if config.precision == "bf16" else 4
    weights = parameters(family.denoiser) * width
    if config.shard:
        weights -= int(linear_parameters(family.denoiser) * width * (1 - 1 / processes()))
    encoders = encoder_parameters(folder) * (4 if family.text_in_fp32 else width)
    per_number = 2 if config.reward_precision == "bf16" else 4
    scored_by = int(sum(millions * 1e6 * per_number for millions, _ in models))
    parts = {
        "denoiser": weights + width * merged_numbers(config, family, schedule, stages),
        "latent decoder": parameters(family.vae) * (4 if family.vae_dtype == torch.float32 else 2),
        "text encoders": 0 if config.encode_ahead else encoders,
        "rewards": resident_rewards(config, scored_by, scoring, activations) if gpu else scored_by,
        # Weights and gradient in fp32, two moments in fp32 or in 8 bits, an average in fp32.
        "LoRAs, gradients, optimizer": numbers
        * ((10 if config.optimizer == "adamw8bit" else 16) + 4 * bool(config.ema)),
        "activations": activations,
    }
    encoding = weights + parts["latent decoder"] + encoders
    disk = disk_bytes(config, numbers)
    return Estimate(parts, encoding, disk, cost, stages, schedule, speed)


def run_seconds(config: Config, found: Estimate) -> tuple[float, float]:
    """Seconds of training for a budget that has updates, and of drawing the sample grids."""
    assert config.updates is not None
    cost, updates = found.cost, config.updates
    bounds = [0.0, *stage_bounds(config.stage_shares, len(found.stages))]
    training = sum(
        (stop - start) * updates * cost.seconds(plan, recompute=config.recompute)
        for start, stop, plan in zip(bounds, bounds[1:], found.stages, strict=False)
    )
    training *= config.accumulation
    if config.minutes is not None and training > 60 * config.minutes:
        updates = int(updates * 60 * config.minutes / training)
        training = 60 * config.minutes
    at_once = max(1, config.batch_size // (config.accumulation * processes()))
    calls = math.ceil(config.sample_prompts * config.sample_noises / at_once) * cost.steps
    every, times = config.sample_every, config.sample_times
    due = {0, updates} if every or times else set()
    due |= set(range(0, updates, every)) if every else set()
    due |= {math.ceil(updates * part / times) for part in range(1, times)}
    return training, len(due) * calls * cost.call.forward


def resident_rewards(config: Config, weights: int, scoring: int, peak: int) -> int:
    """Bytes that reward models' weights add to a GPU's peak; `scoring` are their activations."""
    if config.reward_device == "cpu":
        return 0
    if config.reward_device == "offload" and config.recompute:
        # They are gone before the picture is decoded, or a call run, again for its backward pass.
        return max(peak, scoring + weights) - peak
    return weights


class Counted(NamedTuple):
    """Of one picture: bytes that a graph keeps, and operations of the forward pass."""

    kept: int
    operations: int


def _at(found: Counted, micro: int, speed: float) -> Call:
    """A call of so many pictures."""
    seconds = found.operations * micro / speed
    return Call(seconds, 2 * seconds, found.kept * micro)  # frozen weights: backward costs as much


def shortcut_guidance(config: Config) -> float | None:
    """What the shortcut will run with, as far as it is known before a download."""
    own = METHODS[config.method].shortcut
    if config.shortcut_guidance_scale is not None or own is None:
        return config.shortcut_guidance_scale
    return known_guidance(config.model, config.shortcut, config.segments, own)


def merged_numbers(
    config: Config, family: PipelineFamily, schedule: Schedule, stages: Sequence[Plan]
) -> int:
    """Numbers in the copies of layers that `merge` folds LoRAs into, see `ModelNetworks`.

    The shortcut's are taken to be those that `shortft shortcut` tunes.
    """
    if not config.merge:
        return 0
    plans = list(stages)
    if config.sample_every or config.sample_times or any(p.needs_rollout for p in plans):
        where = placement(config)
        plans.append(inference_plan(schedule, parts_for(where, config.segments), where))
    steps = [step for plan in plans for step in plan.steps]
    frozen = {(s.net, s.adapters) for s in steps if s.adapters and not s.trains}
    jumps = config.shortcut not in BASE_JUMPS and any(s.net == "shortcut" for s in steps)
    tuned = adapted_layers(family, family.shortcut_targets) if jumps else []
    return sum(layer.weight.numel() for layer in lora_layers(family)) * len(frozen) + sum(
        layer.weight.numel() for layer in tuned
    )


def _counted(
    family: Any, adapted: Sequence[nn.Linear], guidances: Sequence[Guidance]
) -> list[Counted]:
    """One call of the denoiser with gradient under each guidance, and decoding."""
    for layer in adapted:  # so that they keep their input, as a layer with a LoRA does
        layer.weight.requires_grad_(True)
    counted = []
    with FakeTensorMode():
        as_if_real([family.denoiser, family.vae])
        family.device = torch.device("cpu")
        prompt = blank_prompt(family)
        calls = [
            partial(family.predict, family.denoiser, timestep=1.0, cond=prompt, g=guidance)
            for guidance in guidances
        ]
        for action in (*calls, family.decode):
            kept = Kept([*family.denoiser.parameters(), *family.vae.parameters()])
            with (
                FlopCounterMode(display=False) as counter,
                torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack),
            ):
                _ = action(torch.empty(1, *family._latent_shape, requires_grad=True))
            counted.append(Counted(kept.total, counter.get_total_flops()))
    return counted
