"""What an update costs, from what single calls cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from shortft.plans import Plan


@dataclass(frozen=True)
class Cost:
    """Seconds and bytes of single calls at a run's micro-batch size.

    Attributes:
        forward: seconds of a call without gradient (guided base).
        gradient: seconds of a call with gradient, forward and backward (guided policy).
        decode: seconds of decoding and scoring with gradient.
        call_bytes: activations that a call with gradient keeps.
        decode_bytes: activations that decoding and scoring keep.
        steps: calls of a whole rollout.
    """

    forward: float
    gradient: float
    decode: float
    call_bytes: int
    decode_bytes: int
    steps: int

    def seconds(self, plan: Plan, *, recompute: bool) -> float:
        """Of one micro-batch."""
        again = self.forward * plan.grad_calls if recompute else 0.0
        without = self.forward * (plan.calls - plan.grad_calls)
        if plan.needs_rollout:
            without += self.forward * self.steps
        return without + self.gradient * plan.grad_calls + again + self.decode

    def activation_bytes(self, plan: Plan, *, recompute: bool) -> int:
        """Activations held at the peak of one micro-batch."""
        if recompute:  # the backward pass is done with the picture before it runs a call again
            return max(self.call_bytes, self.decode_bytes)
        return self.call_bytes * plan.grad_calls + self.decode_bytes


class Kept:
    """Adds up the distinct storages that a graph keeps, `weights` left out.

    Its two methods are the hooks of `torch.autograd.graph.saved_tensors_hooks`.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        # By storage: a linear layer keeps a transposed view of its weight.
        self.seen = {weight.untyped_storage()._cdata for weight in weights}
        self.total = 0

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.total += storage.nbytes()
        return tensor

    def unpack(self, tensor: Tensor) -> Tensor:
        return tensor
