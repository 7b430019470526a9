"""Reward models that wait in main memory and visit the chain's device only while they score."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def visiting(reward: object, device: torch.device | str) -> Iterator[None]:
    """Let the frozen models inside a reward live on `device` while the body runs.

    Gradients through them have to be taken in the body. Their weights are copied there and
    dropped afterwards; the originals do not move, so that coming back costs nothing.
    """
    tensors = [t for model in models_in(reward) for t in (*model.parameters(), *model.buffers())]
    homes = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device)
        yield
    finally:
        for tensor, home in zip(tensors, homes, strict=True):
            tensor.data = home


def models_in(reward: object) -> list[nn.Module]:
    """The networks that a reward holds, in its parts, members and attributes; none twice."""
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    waiting = [reward]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, nn.Module):
            found[id(item)] = item
        elif isinstance(item, (list, tuple, set, frozenset)):
            waiting.extend(item)
        elif isinstance(item, dict):
            waiting.extend(item.values())
        elif type(item).__module__ != "builtins":
            waiting.extend(getattr(item, "__dict__", {}).values())
    return list(found.values())
