"""What a reward is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class Reward(Protocol):
    """A score of pictures that gradients can climb, and the figure that a report shows for it.

    Pictures are `images_BCHW`: (B, 3, H, W), RGB, in [0, 1]. Scores have shape (B,), are float32
    (float64 if the pictures are), and higher is better. Each picture is scored on its own: the
    rest of the batch does not matter.
    """

    @property
    def name(self) -> str:
        """Name in `REWARDS`, ``file.py:name``, or the whole specification of a mix."""
        ...

    @property
    def report_name(self) -> str:
        """What `report` measures, with its unit, e.g. ``JPEG size (kB, quality 95)``."""
        ...

    @property
    def report_higher_is_better(self) -> bool:
        """Which way `report` improves."""
        ...

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,), differentiable in the pixels."""
        ...

    def report(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """The same quality in a unit that people know: (B,), no gradient."""
        ...
