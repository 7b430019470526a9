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
        UserError: if it asks for DeepSpeed, Megatron, FSDP's offloading, or another precision or
            accumulation than the configuration, or if `shard` does not fit that.
    """
    global _shares
    check_launched_alike(config)
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


def check_launched_alike(config: Config) -> None:
    """Refuse what accelerate's launcher asks for and this run would not do.

    Raises:
        UserError: naming both.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", "", *(["bf16"] if config.precision in ("bf16", "auto") else [])):
        remedy = "pass --precision bf16 too, or" if precision == "bf16" else "use --precision bf16;"
        raise UserError(
            f"accelerate launch: --mixed_precision {precision} is not what --precision "
            f"{config.precision} does; {remedy} launch with --mixed_precision no"
        )
    parts = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if parts not in ("1", "auto", str(config.accumulation)):
        raise UserError(
            f"accelerate launch: --gradient_accumulation_steps {parts} is not --accumulation "
            f"{config.accumulation}; leave it out there and use --accumulation"
        )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend not in ("no", ""):
        raise UserError(
            f"accelerate launch: --dynamo_backend {backend} is not supported; launch with "
            "--dynamo_backend no"
        )


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
