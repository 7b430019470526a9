"""Scoring pictures by rewards that may be anybody's: every way to fail is named."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import torch
from torch import Tensor

from shortft.errors import UserError, traceback_file
from shortft.out_of_memory import ran_out
from shortft.rewards.base import Reward
from shortft.rewards.combine import WeightedSum


def judge(
    reward: WeightedSum, images: Tensor, prompts: Sequence[str], *, seconds: float | None
) -> dict[str, Tensor]:
    """Each part's scores (B,), differentiable in the pixels.

    Args:
        images: (B, 3, H, W) in [0, 1].
        seconds: after which a part counts as hanging; None waits for ever.

    Raises:
        UserError: naming the part that raised, hung, gave the wrong shape, or gave no gradient.
    """
    parts = {}
    for part, _ in reward.parts:
        with blaming(part.name, "raised"), time_limit(seconds, f"--reward {part.name}"):
            scores = reward.score(part, images, prompts)
        check_shape(scores, len(images), f"--reward {part.name}: returned")
        if images.requires_grad and not scores.requires_grad:
            raise UserError(
                f"--reward {part.name}: its scores carry no gradient; compute them from the "
                "pixels by torch operations, without no_grad, detach, NumPy or PIL"
            )
        parts[part.name] = scores
    return parts


def report_of(reward: WeightedSum, part: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """What a part reports of pictures (B, 3, H, W): (B,).

    Raises:
        UserError: naming the part whose report raised, or gave the wrong shape.
    """
    with blaming(part.name, "its report raised"):
        found = reward.report_of(part, images, prompts)
    check_shape(found, len(images), f"--reward {part.name}: its report returned")
    return found


def check_shape(found: object, batch: int, what: str) -> None:
    """Whether there is one number per picture.

    Raises:
        UserError: if not.
    """
    if not isinstance(found, Tensor) or found.shape != (batch,):
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise UserError(f"{what} {got}; return one score per picture, shape ({batch},)")


def pull(loss: Tensor, pixels: Tensor, name: str) -> Tensor:
    """The gradient of a loss in the pixels (B, 3, H, W), and in nothing else.

    A reward's own weights get none, frozen or not.

    Raises:
        UserError: naming the reward, if its backward pass fails or does not reach the pixels.
    """
    with blaming(name, "its backward pass raised"):
        (gradient,) = torch.autograd.grad(loss, pixels, allow_unused=True)
    if gradient is None:
        raise UserError(
            f"--reward {name}: no gradient reaches the pixels; compute the scores from them, "
            "without detach"
        )
    return gradient


@contextmanager
def blaming(name: str, what: str) -> Iterator[None]:
    """Say whose fault somebody else's error is; its traceback is kept by the run.

    Raises:
        UserError: for any error in the body but a user's mistake and a lack of memory.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or ran_out(error):
            raise
        reason = str(error).strip().splitlines()
        raise UserError(
            f"--reward {name}: {what} {type(error).__name__}{': ' + reason[0] if reason else ''}; "
            f"the whole traceback is in {traceback_file()}"
        ) from error


@contextmanager
def time_limit(seconds: float | None, what: str) -> Iterator[None]:
    """Raise if the body takes longer, on the main thread of systems that have timers.

    Raises:
        UserError: naming what took too long.
    """
    usable = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if seconds is None or not usable:
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise UserError(
            f"{what}: took longer than {seconds:g} s; raise --reward-seconds, or mend the reward"
        )

    began = time.monotonic()
    before = signal.signal(signal.SIGALRM, ring)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:  # somebody else's alarm goes on
            rest = max(left - (time.monotonic() - began), 1e-3)
            signal.setitimer(signal.ITIMER_REAL, rest, interval)
