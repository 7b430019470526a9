"""Rewards: differentiable functions of pictures and prompts, one file each.

Importing this package loads no torch; building a reward does.
"""

from shortft.rewards.base import Reward
from shortft.rewards.registry import REWARDS, held_out_scorer, make_reward, ships
from shortft.rewards.spec import anchor_warning, parse_reward_spec

__all__ = [
    "REWARDS",
    "Reward",
    "anchor_warning",
    "held_out_scorer",
    "make_reward",
    "parse_reward_spec",
    "ships",
]
