"""Make a shortcut: a few-step LoRA that jumps over ShortFT's segments like the base would walk.

Two ways. `regression` fits each jump to where the base's own guided chain goes: the sampler is a
deterministic map, so it needs no images and its targets have no noise; states that the
shortened chain itself visits are added as it learns, so that errors do not add up over the
chain. `consistency` is trajectory-segmented consistency distillation (Hyper-SD §3.1).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import Tensor, nn

from shortft.chain import run_chain
from shortft.errors import UserError
from shortft.families.base import Conditioning, Family, Guidance
from shortft.networks import SHORTCUT, add_lora, lora_parameters, lora_state, view
from shortft.plans import base_plan
from shortft.schedule import Schedule, jump, segments, to_x0_eps
from shortft.seeds import generator, sample_seed
from shortft.shortcut_check import Jumper, Jumping, jump_plan
from shortft.weights_file import disk_error

FOLDED_FROM = 8  # samples
EMA_DECAY = 0.998


@dataclass
class Bank:
    """Pieces of the base's guided trajectories: from `begin` it walks to `end` at point `stop`.

    They lie in main memory.

    Attributes:
        start, stop: (M,) schedule points.
        begin, end: (M, C, h, w) latents.
        prompt: (M,) rows of the prompt table.
    """

    start: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    stop: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    prompt: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    begin: Tensor = field(default_factory=lambda: torch.empty(0))
    end: Tensor = field(default_factory=lambda: torch.empty(0))

    def __len__(self) -> int:
        return len(self.start)

    def add(self, start: int, stop: int, begin: Tensor, end: Tensor, prompt: Tensor) -> None:
        count = len(begin)
        self.start = torch.cat([self.start, torch.full((count,), start)])
        self.stop = torch.cat([self.stop, torch.full((count,), stop)])
        self.prompt = torch.cat([self.prompt, prompt])
        begin, end = begin.float().cpu(), end.float().cpu()
        self.begin = torch.cat([self.begin, begin]) if len(self.begin) else begin
        self.end = torch.cat([self.end, end]) if len(self.end) else end


class Folded(nn.Module):
    """A module called with some of its weights replaced; gradient flows to the replacements."""

    def __init__(self, module: nn.Module, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.call = functools.partial(torch.func.functional_call, module)
        self.weights = weights

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self.weights, args, kwargs)


class Distiller:
    """Trains a shortcut LoRA on a view of the family's denoiser.

    Args:
        family: the model to imitate.
        guidance: the guidance of the chain to imitate.
        prompts: to draw from.
        rank: of the LoRA on attention, feed-forward, convolution, projection and time layers.
        student_guidance: how the shortcut itself runs. Unguided it costs one evaluation and must
            learn guidance too; with the chain's own it costs two and starts as a guided DDIM jump.
    """

    def __init__(
        self,
        family: Family,
        schedule: Schedule,
        k: int,
        guidance: Guidance,
        prompts: Sequence[str],
        *,
        rank: int = 64,
        student_guidance: Guidance | None = None,
        seed: int = 0,
    ) -> None:
        self.family, self.schedule, self.k = family, schedule, k
        self.guidance, self.prompts = guidance, prompts
        self.student_guidance = student_guidance or Guidance()
        self.seed = seed
        self.parts = segments(schedule, k)
        self.student = view(family.denoiser)
        add_lora(
            self.student,
            SHORTCUT,
            rank=rank,
            targets=family.shortcut_targets,
            generator=generator(seed, 0),
        )
        self.student.to(family.device)
        # The frozen weights stay frozen; peft lets only the new ones require gradient.
        self.parameters = lora_parameters(self.student, SHORTCUT)
        family.denoiser.requires_grad_(False)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.teacher_view = view(self.student, frozen=True)
        self.updates = 0
        self.draws = 0  # so far; each is another, also after a resume that goes on counting

    # What the base does

    @torch.no_grad()
    def walk(self, latents: Tensor, cond: Conditioning, start: int, stop: int) -> Tensor:
        """The base's guided chain from one point to a later one."""
        for i in range(start, stop):
            timestep = float(self.schedule.timesteps[i])
            prediction = self.family.predict(
                self.family.denoiser, latents, timestep, cond, self.guidance
            )
            latents = jump(self.schedule, latents, prediction, i, i + 1)
        return latents

    @torch.no_grad()
    def true_pieces(self, bank: Bank | None, count: int) -> tuple[Tensor, Tensor]:
        """Walk `count` true trajectories; add them to a bank, cut at the segments' jumps.

        Returns:
            in main memory, the chain's ends (count, C, h, w) and rows (count,) of the prompt table.
        """
        rows, cond, noise = self._draw(count)
        states: dict[int, Tensor] = {}
        nets = Jumping(self.family, self.guidance, self._jumper())
        run_chain(
            base_plan(self.schedule), nets, noise, cond, self.schedule, observe=states.__setitem__
        )
        for part in self.parts:
            if bank is not None and len(part) > 1:
                bank.add(part[0], part[-1], states[part[0]], states[part[-1]], rows)
        return states[self.schedule.num_steps].cpu(), rows

    @torch.no_grad()
    def visited_pieces(self, bank: Bank, count: int) -> None:
        """Add states that the shortened chain visits, with where the base would take them."""
        rows, cond, noise = self._draw(count)
        states: dict[int, Tensor] = {}
        nets = Jumping(self.family, self.guidance, self._jumper())
        run_chain(
            jump_plan(self.schedule, self.k, first=False),
            nets,
            noise,
            cond,
            self.schedule,
            observe=states.__setitem__,
        )
        for part in self.parts[2:]:
            if len(part) > 1:
                begin = states[part[0]]
                end = self.walk(begin, cond, part[0], part[-1])
                bank.add(part[0], part[-1], begin, end, rows)

    # Losses: (B,) per sample

    def regression_loss(self, bank: Bank, batch_size: int) -> Tensor:
        """Pseudo-Huber distance of the student's jumps from the base's, in units of the jump."""
        rows = self._rows(len(bank), batch_size)
        start, stop = bank.start[rows], bank.stop[rows]
        begin, end = (x[rows].to(self.family.device) for x in (bank.begin, bank.end))
        landed = self._student_jump(
            self.student, begin, self._prompts(bank.prompt[rows]), start, stop
        )
        return _distance(landed, end, (end - begin))

    def consistency_loss(self, images: Tensor, prompts: Tensor, batch_size: int) -> Tensor:
        """Trajectory-segmented consistency (Hyper-SD eq. 4) on the chain's own grid.

        A sample is noised to a point n of a segment, the base takes one guided step, and the
        student's jumps from both to a common later point of the segment must agree.
        """
        device = self.family.device
        rows = self._rows(len(images), batch_size)
        points = [(i, p[-1]) for p in self.parts for i in p[:-1]]
        picked = self._rows(len(points), batch_size).tolist()
        here = torch.tensor([points[i][0] for i in picked], device=device)
        floor = torch.tensor([points[i][1] for i in picked], device=device)
        share = torch.rand(batch_size, generator=self._generator())
        # A target point in [n + 1, floor], drawn per sample.
        target = here + 1 + (share.to(device) * (floor - here)).long()
        cond = self._prompts(prompts[rows])
        x0 = images[rows].to(device)
        noise = torch.randn(x0.shape, generator=self._generator()).to(device)
        alpha, sigma = self._coefficients(here, x0)
        x = alpha * x0 + sigma * noise
        with torch.no_grad():
            timesteps = self.schedule.timesteps.to(device)[here]
            eps = self.family.predict(self.family.denoiser, x, timesteps, cond, self.guidance)
            following = self._move(x, eps, here, here + 1)
            # Where the next point is the target itself, the teacher's point is the answer.
            last = (here + 1 >= target).view(-1, 1, 1, 1)
            safe = torch.minimum(here + 1, target - 1).clamp(min=0)
            ahead = self._student_jump(self.teacher_view, following, cond, safe, target)
            answer = torch.where(last, following, ahead)
            alpha, sigma = self._coefficients(target, x)
            unit = alpha * x0 + sigma * noise - x
        landed = self._student_jump(self.student, x, cond, here, target)
        return _distance(landed, answer, unit)

    # The training loop's pieces

    def update(
        self, draw: Callable[[], Tensor], optimizer: torch.optim.Optimizer, parts: int = 1
    ) -> float | None:
        """One optimizer update and one of the average.

        Args:
            draw: losses (B,) of fresh samples; called once for each of the update's parts, which
                weigh alike.

        Returns:
            the mean loss; None where it or the gradient is not finite, which changes nothing.
        """
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for _ in range(parts):
            loss = draw().mean() / parts
            loss.backward()
            total += float(loss.detach())
        norm = nn.utils.clip_grad_norm_(list(self.parameters.values()), 1.0)
        if not (math.isfinite(total) and bool(norm.isfinite())):
            return None
        optimizer.step()
        self.updates += 1
        decay = min(EMA_DECAY, (1 + self.updates) / (10 + self.updates))
        for name, parameter in self.parameters.items():
            self.average[name].lerp_(parameter.detach(), 1 - decay)
        return total

    def averaged(self) -> nn.Module:
        """A view with the averaged LoRA; it follows later updates of the average."""
        module = view(self.student, frozen=True)
        for name, parameter in lora_parameters(module, SHORTCUT).items():
            parameter.data = self.average[name]
        return module

    def save(self, path: Path) -> None:
        """Write the averaged LoRA in diffusers' layout; what was there stays where that fails.

        Raises:
            UserError: if it is not finite.
            OSError: if the disk refuses.
        """
        state = {key: v.half() for key, v in lora_state(self.averaged(), SHORTCUT).items()}
        if not all(bool(v.isfinite().all()) for v in state.values()):
            raise UserError(
                f"--output {path}: not written, since weights of the LoRA are not finite in half "
                "precision; lower --learning-rate"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}")
        try:
            self.family.save_lora(state, scratch)
            scratch.replace(path)
        except SafetensorError as error:
            raise disk_error(error, path) from error
        finally:
            scratch.unlink(missing_ok=True)

    def load(self, path: Path) -> None:
        """Go on from a saved LoRA of the same rank and layers."""
        other = view(self.family.denoiser)
        self.family.load_lora(other, path, SHORTCUT)
        saved = lora_parameters(other, SHORTCUT)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if name not in saved or saved[name].shape != parameter.shape:
                    raise UserError(
                        f"{path}: has another rank or other layers; use the same --rank"
                    )
                parameter.copy_(saved[name])
                self.average[name].copy_(saved[name])

    def _jumper(self) -> Jumper:
        return Jumper("shortcut", self.averaged(), self.student_guidance)

    def _student_jump(
        self, net: nn.Module, x: Tensor, cond: Conditioning, start: Tensor, stop: Tensor
    ) -> Tensor:
        """The student's jump, differentiable in the LoRA.

        With many samples the LoRA is folded into the weights once per call, which takes half of the
        time of running it as branches, and twice the weights' memory on top.
        """
        if len(x) >= FOLDED_FROM:
            weights = {
                f"{name}.weight": _folded(layer)
                for name, layer in net.named_modules()
                if isinstance(layer, LoraLayer)
            }
            net = Folded(self.family.denoiser, weights)
        timesteps = self.schedule.timesteps.to(x.device)[start]
        prediction = self.family.predict(net, x, timesteps, cond, self.student_guidance)
        return self._move(x, prediction, start, stop)

    def _move(self, x: Tensor, prediction: Tensor, start: Tensor, stop: Tensor) -> Tensor:
        """`schedule.jump` with points per sample."""
        alpha, sigma = self._coefficients(start, x)
        x0, eps = to_x0_eps(x, prediction, alpha, sigma, self.schedule.prediction_type)
        alpha, sigma = self._coefficients(stop, x)
        return alpha * x0 + sigma * eps

    def _coefficients(self, points: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, *[1] * (x.dim() - 1))
        alpha = self.schedule.alpha.to(points.device)[points]
        sigma = self.schedule.sigma.to(points.device)[points]
        return alpha.view(shape).to(x), sigma.view(shape).to(x)

    def _draw(self, count: int) -> tuple[Tensor, Conditioning, Tensor]:
        rows = self._rows(len(self.prompts), count)
        self.draws += 1
        seeds = [sample_seed(self.seed, 1, self.draws, i) for i in range(count)]
        return rows, self._prompts(rows), self.family.noise(seeds)

    def _prompts(self, rows: Tensor) -> Conditioning:
        return self.family.encode([self.prompts[row] for row in rows.tolist()])

    def _rows(self, total: int, count: int) -> Tensor:
        return torch.randint(total, (count,), generator=self._generator())

    def _generator(self) -> torch.Generator:
        self.draws += 1
        return generator(self.seed, 2, self.draws)


def _folded(layer: Any) -> Tensor:
    """A layer's weight with the LoRA in it, summed in the LoRA's number format, in its own."""
    weight: Tensor = layer.get_base_layer().weight
    return (weight + layer.get_delta_weight(SHORTCUT)).to(weight.dtype)


def _distance(x: Tensor, target: Tensor, unit: Tensor, c: float = 0.03) -> Tensor:
    """(B,) pseudo-Huber distance (Song & Dhariwal 2023 §3.3), relative to the norm of `unit`."""
    scale = unit.flatten(1).norm(dim=1).clamp(min=1e-6)
    relative = (x - target).flatten(1).norm(dim=1) / scale
    return (relative.square() + c**2).sqrt() - c
