"""What an update costs, from what single calls cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from shortft.plans import Plan


@dataclass(frozen=True)
class Call:
    """One network call at a run's micro-batch size.

    Attributes:
        forward: seconds without gradient.
        gradient: seconds with gradient, forward and backward.
        kept: bytes of activations that it keeps for its backward pass.
    """

    forward: float
    gradient: float
    kept: int


@dataclass(frozen=True)
class Cost:
    """Seconds and bytes of what an update is made of.

    Attributes:
        call: of base and policy, with the chain's guidance.
        jump: of the shortcut, with its own guidance.
        decode: seconds of decoding and scoring the chain's ends with gradient.
        decode_bytes: activations that decoding them keeps, all at once or, recomputed, of one.
        score_bytes: those of scoring them, where they are not among the others.
        steps: calls of a whole rollout.
        anchored: whether calls that train run once more without LoRAs.
    """

    call: Call
    jump: Call
    decode: float
    decode_bytes: int
    steps: int
    anchored: bool = False
    score_bytes: int = 0

    def seconds(self, plan: Plan, *, recompute: bool) -> float:
        """Of one micro-batch."""
        total = (
            self.decode * (1 + plan.renoise) + self.call.forward * self.steps * plan.needs_rollout
        )
        for call, with_gradient in self._calls(plan):
            total += call.gradient if with_gradient else call.forward
            total += call.forward * (recompute and with_gradient)
        return total

    def activation_bytes(self, plan: Plan, *, recompute: bool) -> int:
        """Activations held at the peak of one micro-batch."""
        kept = [call.kept for call, with_gradient in self._calls(plan) if with_gradient]
        ends = 1 + plan.renoise
        if recompute:  # the backward pass is done with the picture before it runs a call again
            return max([*kept, self.decode_bytes, self.score_bytes * ends])
        return sum(kept) + (self.decode_bytes + self.score_bytes) * ends

    def _calls(self, plan: Plan) -> Iterator[tuple[Call, bool]]:
        """Every network call of a plan, and whether it carries gradient."""
        masks = zip(plan.steps, plan.grad_mask, plan.input_mask, strict=True)
        for step, with_gradient, through_input in masks:
            if step.net == "cached":
                continue
            call = self.jump if step.net == "shortcut" else self.call
            yield call, with_gradient
            if self.anchored and step.trains:
                yield call, through_input
        for _ in range(plan.renoise):
            yield self.call, plan.grad_mask[-1]
            if self.anchored and plan.steps[-1].trains:
                yield self.call, False


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
