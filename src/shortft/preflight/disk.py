"""Whether a run fits on the disk."""

from __future__ import annotations

from shortft.config import Config
from shortft.preflight.outline import lora_numbers, outline
from shortft.space import check_space, size_of

SMALL_FILES = 50_000_000  # bytes for pictures, logs and curves


def disk_bytes(config: Config, numbers: int) -> int:
    """What a run will write beside the checkpoints and adapters that are there.

    Args:
        numbers: see `lora_numbers`.
    """
    watched = bool(config.sample_every or config.sample_times)
    # Weights, two moments, an average and the best weights, in fp32.
    checkpoint = 4 * numbers * (3 + bool(config.ema) + watched)
    # One more than is kept, while it is written; two adapters, of which one twice.
    whole = checkpoint * (config.keep_checkpoints + 1) + 3 * 4 * numbers
    there = sum(size_of(config.output_dir / name) for name in ("checkpoints", "adapter", "best"))
    return max(whole - there, checkpoint) + SMALL_FILES


def check_room(config: Config, numbers: int | None = None) -> None:
    """Whether a run's checkpoints and adapters fit on the disk.

    Args:
        numbers: see `lora_numbers`; None = where the model's outline is known, counted on it.

    Raises:
        UserError: if not.
    """
    if numbers is None:
        family = outline(config)
        numbers = lora_numbers(config, family) if family is not None else None
    if numbers is not None:
        needed = disk_bytes(config, numbers)
        what = "the run's checkpoints and adapters"
        check_space(config.output_dir, needed, what, "lower --keep-checkpoints, ")
