"""A frozen network's weights, shared out over the processes of a run: each keeps a part of them.

This is what FSDP and ZeRO-3 do to save memory, for weights that never change: there is no gradient
to reduce and no optimizer state, so that a layer which gathers its weight when it is run, and once
more in the backward pass, is all of it. FSDP itself wraps one tree of modules; the networks of
training are several trees on one set of weights, which may all share these layers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class ShardedLinear(nn.Linear):
    """A frozen linear layer of which each process keeps an equal part.

    Its `weight` is this process's part, flat; the bias stays whole. Every process must run the same
    sharded layers in the same order, forward and backward.
    """

    def forward(self, x: Tensor) -> Tensor:
        shape = (self.out_features, self.in_features)
        out: Tensor = _Gathered.apply(x, self.weight, self.bias, shape)
        return out


class _Gathered(torch.autograd.Function):
    """``x Wᵀ + b``; the graph keeps the part of W alone, as W would be kept whole by `F.linear`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, part: Tensor, bias: Tensor | None, shape: tuple[int, int]
    ) -> Tensor:
        ctx.part, ctx.shape, ctx.dtype = part, shape, x.dtype
        return F.linear(x, gathered(part, shape), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        weight = gathered(ctx.part, ctx.shape).to(grad.dtype)
        return (grad @ weight).to(ctx.dtype), None, None, None


# The same collective under its newer name, where torch has it.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@torch.no_grad()
def gathered(part: Tensor, shape: tuple[int, int]) -> Tensor:
    """The whole weight, from the parts of all processes."""
    whole = part.new_empty(part.numel() * dist.get_world_size())
    _gather(whole, part)
    return whole[: shape[0] * shape[1]].view(shape)


def shard(network: nn.Module) -> None:
    """Let this process keep its part of every linear layer, in place; alone it keeps all of them.

    Convolutions, embeddings and norms stay whole: a U-Net keeps much, a transformer little.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    size, rank = dist.get_world_size(), dist.get_rank()
    for layer in network.modules():
        if type(layer) is nn.Linear:
            whole = layer.weight.detach().flatten()
            part = -(-whole.numel() // size)
            own = whole.new_zeros(part)
            kept = whole[rank * part : (rank + 1) * part]
            own[: kept.numel()] = kept
            layer.weight = nn.Parameter(own, requires_grad=False)
            layer.__class__ = ShardedLinear
