"""When memory runs out: to notice it, and to say what helps."""

from __future__ import annotations

import os

import torch

from shortft.config import Config


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text


def advice(config: Config, micro_batch: int) -> str:
    """Which options save how much, of those that are not in use yet."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    ways = []
    if not config.recompute:
        ways.append("--recompute (activations of one call instead of all)")
    if config.guidance_grad == "both":
        ways.append("--guidance-grad positive (half of each call)")
    if micro_batch > 1:
        ways.append(f"--accumulation {config.batch_size} (pictures one by one, same updates)")
    if config.precision == "fp32":
        ways.append("--precision bf16 (half)")
    if several and not config.shard:
        ways.append("--shard (each process keeps a part of the denoiser's weights)")
    if config.merge:
        ways.append("--no-merge (no copies of layers with LoRAs)")
    listed = ", ".join(ways) or "a smaller --rank, or a smaller model"
    return (
        f"--batch-size {config.batch_size}: out of memory with {micro_batch} pictures at once; "
        f"nothing is lost, go on by --resume with {listed}"
    )
