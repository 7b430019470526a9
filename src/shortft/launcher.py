"""What torchrun or accelerate, which started this process, ask of a run."""

from __future__ import annotations

import os

from shortft.config import Config
from shortft.errors import UserError

_shares = False  # accelerate was told to use FSDP


def processes() -> int:
    """How many processes share the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def as_launched(config: Config) -> Config:
    """The configuration with what accelerate's launcher asks for: FSDP is `shard` here.

    Raises:
        UserError: if it asks for DeepSpeed, Megatron or FSDP's offloading, or if `shard` does not
            fit the configuration.
    """
    global _shares
    for name in ("DEEPSPEED", "MEGATRON_LM"):
        if _asked(f"ACCELERATE_USE_{name}"):
            raise UserError(
                f"accelerate launch: {name} is asked for, which is not supported; start without it "
                "(docs/several-gpus.md), and share the model out by --shard"
            )
    if _asked("ACCELERATE_USE_FSDP"):
        if _asked("FSDP_OFFLOAD_PARAMS"):
            raise UserError(
                "accelerate launch: --fsdp_offload_params true is not supported; leave it out, and "
                "save memory by --recompute and --encode-ahead"
            )
        # accelerate has nothing to wrap, and transformers must not leave weights for FSDP to fill.
        os.environ["ACCELERATE_USE_FSDP"] = "false"
        _shares = True
    return Config.model_validate({**config.model_dump(), "shard": True}) if _shares else config


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")


def check_split(config: Config, count: int) -> None:
    """Whether a batch can be split over so many processes and the parts of each.

    Raises:
        UserError: if not.
    """
    share = config.accumulation * count
    if config.batch_size % share:
        raise UserError(
            f"--batch-size {config.batch_size}: cannot be split over {count} processes × "
            f"{config.accumulation} parts; use a multiple of {share}, or another --accumulation"
        )
