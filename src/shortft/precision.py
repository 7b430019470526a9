"""The number format that `precision: auto` stands for."""

from __future__ import annotations

from typing import Literal

from shortft.config import Config
from shortft.preflight import machine


def own_precision() -> Literal["fp32", "bf16"]:
    """bf16 where this machine computes in it, else fp32."""
    return "bf16" if machine.devices()[0].bf16 else "fp32"


def settled(config: Config, before: object = None) -> Config:
    """The configuration with a format in place of ``auto``; others as they are.

    Args:
        before: the format of the run, or comparison, that goes on; it stays what it was.
    """
    if config.precision != "auto":
        return config
    precision = before if before in ("fp32", "bf16") else own_precision()
    return config.model_copy(update={"precision": precision})


def emulated(config: Config) -> str | None:
    """A line of warning where the run's format is not this machine's."""
    device = machine.devices()[0]
    if config.precision != "bf16" or device.bf16:
        return None
    return (
        f"--precision bf16: {device.name} does not compute in it, but imitates it, which can be "
        "many times slower; give --precision fp32 (and --allow-change to a run that goes on)"
    )
