"""What a run's settings make of its chain: where LoRAs act, how many, and each stage's plan."""

from __future__ import annotations

from shortft.config import Config
from shortft.errors import UserError
from shortft.methods import METHODS, make_plan, placement_of
from shortft.plans import Placement, Plan
from shortft.schedule import Schedule
from shortft.seeds import PLAN, generator


def placement(config: Config) -> Placement:
    """Where the run's LoRAs act."""
    return placement_of(config.method, config.method_options, timestep_lora=config.timestep_lora)


def lora_count(config: Config) -> int:
    """How many LoRAs the run trains."""
    return config.segments if placement(config) in ("stacked", "segments") else 1


def stage_count(config: Config) -> int:
    """How many stages the run has."""
    return config.segments if METHODS[config.method].by_segment else 1


def plan_of(config: Config, schedule: Schedule, update: int, stage: int) -> Plan:
    """The plan of an update; random methods draw it anew for each, alike on all processes.

    Raises:
        UserError: if the method's options do not fit the chain.
    """
    try:
        return make_plan(
            config.method,
            schedule,
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
