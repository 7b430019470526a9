"""When memory runs out: to notice it, and to say what helps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from shortft.assets import EMBEDDED
from shortft.config import Config
from shortft.errors import UserError
from shortft.launcher import processes
from shortft.preflight.machine import devices
from shortft.rewards.places import reward_places
from shortft.rewards.spec import scorers

# Savings that give other updates, which a resumed run must ask for.
NEED_LEAVE = {"--precision", "--decoder", "--optimizer"}


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text


def savings(config: Config, micro_batch: int | None = None) -> dict[str, str]:
    """Options that save memory and are not in use yet: what each saves.

    Args:
        micro_batch: pictures that run at once; None = as the configuration says.
    """
    ways = {}
    parts = config.batch_size // processes()  # as many as a process has pictures
    at_once = micro_batch or parts // config.accumulation
    if not config.recompute:
        ways["--recompute"] = "activations of one call instead of all"
    if at_once > 1:
        ways[f"--accumulation {parts}"] = "pictures one by one, same updates"
    if config.precision == "fp32" and devices()[0].bf16:
        ways["--precision bf16"] = "half"
    if processes() > 1 and not (config.shard or config.merge or config.split_on_out_of_memory):
        ways["--shard"] = "each process keeps a part of the denoiser's weights"
    if config.merge:
        ways["--no-merge"] = "no copies of layers with LoRAs"
    if config.model != EMBEDDED and not config.encode_ahead:
        ways["--encode-ahead"] = "the text encoders"
    if config.model != EMBEDDED and config.decoder is None:
        ways["--decoder with a small one"] = "most of decoding"
    if torch.cuda.is_available():
        if config.reward_device is None and reward_places(
            scorers(config.reward), config.reward_model
        ):
            ways["--reward-device offload"] = "the reward's models while the chain runs"
        if config.optimizer == "adamw":
            ways["--optimizer adamw8bit"] = "three quarters of the optimizer"
    return ways


def advice(config: Config, micro_batch: int) -> str:
    """The message when memory ran out: which options save how much."""
    ways = savings(config, micro_batch)
    found = f"--batch-size {config.batch_size}: out of memory with {micro_batch} pictures at once; "
    kept = "nothing is lost, go on" if processes() == 1 else "go on from the last checkpoint"
    if not ways:
        return f"{found}start a new run with a smaller --rank, or a smaller model"
    listed = ", ".join(
        f"{option}{' --allow-change' if option.split()[0] in NEED_LEAVE else ''} ({what})"
        for option, what in ways.items()
    )
    return f"{found}{kept} by --resume with {listed}"


@contextmanager
def advised(config: Config, micro_batch: int) -> Iterator[None]:
    """Turn a lack of memory into advice.

    Raises:
        UserError: with it.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        raise UserError(advice(config, micro_batch)) from error
