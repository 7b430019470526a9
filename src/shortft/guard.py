"""Guard against over-optimisation: a reward that rises while a scorer it cannot see falls.

Rewards get hacked. On fixed prompts the true chain's pictures are scored by the reward and by a
held-out scorer; where the second has lost more than was allowed while the first rose, what is
being learned is the reward's weakness.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Look:
    """One evaluation on the fixed prompts.

    Attributes:
        update: after which update.
        reward, held_out: mean scores; held_out is None where no such scorer is at hand.
    """

    update: int
    reward: float
    held_out: float | None

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.reward) and math.isfinite(self.held_out or 0.0)


class Guard:
    """Remembers the first and the best evaluation; those that are not finite teach it nothing.

    The best one has the highest score of the chosen kind among those whose held-out score has
    fallen by no more than allowed.

    Args:
        drop: share of the held-out score's first value that it may lose.
        by: which score makes an evaluation the best.
    """

    def __init__(self, drop: float, by: Literal["reward", "held_out"] = "reward") -> None:
        self.drop = drop
        self.by = by
        self.first: Look | None = None
        self.best: Look | None = None

    def see(self, look: Look) -> tuple[bool, str | None]:
        """Take in an evaluation.

        Returns:
            Whether it is the best so far, and what is wrong, if anything.
        """
        if not look.is_finite:
            return False, None
        if self.first is None:
            self.first = self.best = look
            return True, None
        fallen = self._fallen(look)
        alarm = None
        if fallen and look.reward > self.first.reward:
            alarm = (
                f"the reward rose from {self.first.reward:.4g} to {look.reward:.4g} while the "
                f"held-out scorer fell from {self.first.held_out:.4g} to {look.held_out:.4g}, "
                f"more than {100 * self.drop:g} %: the reward is being hacked"
            )
        better = not fallen and (self.best is None or self._score(look) > self._score(self.best))
        if better:
            self.best = look
        return better, alarm

    def state(self) -> dict[str, Any]:
        """For a checkpoint's JSON."""
        return {
            n: look and asdict(look) for n, look in (("first", self.first), ("best", self.best))
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go back to what `state` returned."""
        self.first, self.best = (
            Look(**saved[name]) if saved.get(name) else None for name in ("first", "best")
        )

    def _score(self, look: Look) -> float:
        score = look.reward if self.by == "reward" else look.held_out
        assert score is not None, "the trainer has made sure that there is a held-out scorer"
        return score

    def _fallen(self, look: Look) -> bool:
        assert self.first is not None
        if look.held_out is None or self.first.held_out is None:
            return False
        return look.held_out < self.first.held_out - self.drop * abs(self.first.held_out)
