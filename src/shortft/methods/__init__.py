"""Methods: functions of a schedule (and random numbers) that return a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from shortft.methods.catalog import METHODS, Method, Option, read_options

if TYPE_CHECKING:
    import torch

    from shortft.plans import Placement, Plan
    from shortft.schedule import Schedule

__all__ = ["METHODS", "Method", "Option", "make_plan", "placement_of", "read_options"]


def placement_of(
    method: str, options: Mapping[str, Any], *, timestep_lora: bool = True
) -> Placement:
    """Where a method's LoRAs act at inference."""
    if not METHODS[method].by_segment:
        return METHODS[method].placement
    if options["loras"] == "segment":
        return "segments" if timestep_lora else "everywhere"
    return "stacked" if timestep_lora else "shared"


def make_plan(
    method: str,
    schedule: Schedule,
    k: int,
    stage: int,
    draw: torch.Generator,
    options: Mapping[str, Any],
    *,
    timestep_lora: bool = True,
    shortcut: bool = True,
) -> Plan:
    """The plan of one update.

    Args:
        k: segments, for methods with jumps; the others ignore it. Only shortft has stages.
        draw: source of the method's random choices.
        options: all of the method's options, see `read_options`.
        timestep_lora: one LoRA per segment, or one shared LoRA.
        shortcut: whether there is a shortcut network.

    Raises:
        ValueError: if the options do not fit the schedule.
    """
    from shortft.methods import suffix, surrogate
    from shortft.methods.shortft import few_step_plan, jumps_plan, shortft_plan

    values = dict(options)
    if values.get("jump") == "auto":
        by = "half" if method == "jumps" else "shortcut"
        values["jump"] = by if shortcut else "ddim"
    if METHODS[method].by_segment:
        placement = placement_of(method, values, timestep_lora=timestep_lora)
        del values["loras"]
        return shortft_plan(schedule, k, stage, placement=placement, **values)
    if METHODS[method].few_step:
        return few_step_plan(schedule, k)
    if method == "jumps":
        return jumps_plan(schedule, k, **values)
    make = getattr(suffix, method, None) or getattr(surrogate, method)
    plan: Plan = make(schedule, draw, **values)
    return plan
