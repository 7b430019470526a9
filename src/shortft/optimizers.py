"""Optimizers by name, and their state as tensors for a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shortft.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq", "state1", "state2")  # torch's and bitsandbytes' names


def make_optimizer(
    name: str,
    groups: Sequence[Sequence[nn.Parameter]],
    *,
    learning_rate: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """AdamW, or bitsandbytes' with its two moments in 8 bits (Dettmers et al. 2022).

    Args:
        name: "adamw" or "adamw8bit".
        groups: parameters, one group each.

    Raises:
        UserError: if bitsandbytes is asked for and cannot be used.
    """
    kind: Any = torch.optim.AdamW
    if name == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit

            kind = AdamW8bit
        except (ImportError, OSError, RuntimeError) as error:
            raise UserError(
                f"--optimizer adamw8bit: bitsandbytes cannot be used here ({error}); install it "
                "by `pip install bitsandbytes`, or use --optimizer adamw"
            ) from error
    parameters = [{"params": list(group)} for group in groups]
    optimizer: torch.optim.Optimizer = kind(
        parameters, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.999)
    )
    return optimizer


def state_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """What an optimizer remembers of a parameter; whole numbers as int64 tensors."""
    found = optimizer.state.get(parameter, {})
    # bitsandbytes shares its tables between parameters, which safetensors refuses to write.
    return {
        key: torch.as_tensor(value).clone() if key.startswith("qmap") else torch.as_tensor(value)
        for key, value in found.items()
    }


def set_state(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, state: Mapping[str, Tensor]
) -> None:
    """Give back what `state_of` returned, on the parameter's device.

    Raises:
        ValueError: the state is no whole one, or another parameter's.
    """
    moments = [state[key] for key in MOMENTS if key in state]
    if "step" not in state or len(moments) != 2:
        raise ValueError(f"an optimizer's state is incomplete ({', '.join(sorted(state))})")
    if any(moment.shape != parameter.shape for moment in moments):
        raise ValueError("an optimizer's state is of another shape than its parameter")
    optimizer.state[parameter] = {key: _given_back(key, v, parameter) for key, v in state.items()}


def _given_back(key: str, value: Tensor, parameter: nn.Parameter) -> Tensor | int:
    if key == "step":  # counted on the CPU: a float tensor by torch, a number by bitsandbytes
        return value if value.is_floating_point() else int(value)
    return value.to(parameter.device)
