"""Base against tuned: same prompts, same noise, by the plain inference chain."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shortft.assets import EMBEDDED, prompts_for
from shortft.cause import noting_cause
from shortft.drawing.files import write_atomic
from shortft.errors import NotFinite, UserError
from shortft.families import load_family
from shortft.families.base import Family, Guidance
from shortft.inputs import make_output_dir, read_prompts
from shortft.judge import judge, report_of
from shortft.metrics import bootstrap_interval, collapse_warnings, diversity
from shortft.networks import ModelNetworks
from shortft.plans import base_plan
from shortft.rewards import held_out_scorer, make_reward, ships
from shortft.rewards.combine import WeightedSum
from shortft.rewards.places import check_models_are_used, emoji_clip_warning, with_inherited
from shortft.rewards.spec import scorers
from shortft.sampling import Sampler, load_tuned
from shortft.seeds import EVALUATION, generator, given_back, sample_seed
from shortft.variety import embedder

SMALL = 256  # pixels


@dataclass(frozen=True)
class Pictures:
    """What was evaluated, prompt-major: `seeds` pictures of the first prompt, then the next.

    Attributes:
        prompts: (P·S,) prompts.
        before, after: (P·S, 3, H, W) images of base and tuned model.
        scores_before, scores_after: (P·S,) rewards.
    """

    prompts: list[str]
    before: Tensor
    after: Tensor
    scores_before: Tensor
    scores_after: Tensor


def evaluate(
    family: Family,
    adapter: Path,
    reward: WeightedSum,
    prompts: list[str],
    *,
    seeds: int,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    strength: float = 1.0,
    batch_size: int = 16,
    seed: int = 0,
    before: Tensor | None = None,
    held_out: WeightedSum | None = None,
    plain_chain: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[dict[str, Any], Pictures]:
    """Measure an adapter.

    Args:
        seeds: noises per prompt, at least 2 (diversity compares pictures of one prompt).
        seed: of the noise; noise j of prompt i is the same for base and tuned.
        before: the base's pictures from `base_pictures`, where they were made already.
        held_out: a scorer that only measures.
        plain_chain: run a LoRA of the few-step model on the base's chain.

    Returns:
        The figures, each with 95 % bootstrap intervals over prompts, and the pictures.

    Raises:
        NotFinite: if a score is not a finite number.
        UserError: if the adapter is damaged or does not fit the model, or the reward misbehaves,
            which it is tried for before anything is drawn.
    """
    for scorer in filter(None, (reward, held_out)):
        try_out(scorer, prompts, family)
    repeated = [prompt for prompt in prompts for _ in range(seeds)]
    sampler = load_tuned(
        family, adapter, num_steps, guidance_scale, strength, plain_chain=plain_chain
    )
    if before is None:
        progress("base")
        before = base_pictures(
            family,
            prompts,
            seeds=seeds,
            num_steps=sampler.schedule.num_steps,
            guidance_scale=sampler.nets.guidance.scale,
            batch_size=batch_size,
            seed=seed,
        )
    progress("tuned")
    noises = _noise_seeds(seed, len(prompts), seeds)
    after = sampler.draw(repeated, noises, batch_size=batch_size)
    progress("scores")
    judged = partial(_judged, reward)
    pictures = before, after
    scored = _measured(reward, judged, pictures, repeated, family)
    _check_finite(reward.name, scored, repeated)
    figures: dict[str, Any] = {
        "model": family.source,
        "prompts": len(prompts),
        "seeds_per_prompt": seeds,
        "seed": seed,
        "num_steps": sampler.schedule.num_steps,
        "strength": strength,
        "reward": _compared(reward.name, scored[0], scored[1], seeds),
    }
    if held_out is not None:
        judged = partial(_judged, held_out)
        watched = _measured(held_out, judged, pictures, repeated, family)
        _check_others(held_out.name, watched, repeated)
        figures["held_out"] = _compared(held_out.name, watched[0], watched[1], seeds)
    with embedder((held_out, reward), family.device) as (embed, by):

        def features(images: Tensor) -> Tensor:
            return _in_batches(lambda part, _: embed(part), images, repeated, family)

        variety = [diversity(images, features, repeated) for images in (before, after)]
    name = f"1 - cosine by {by}"
    figures["diversity"] = _compared(name, variety[0], variety[1], 1)
    figures["reports"] = {}
    for part, _ in reward.parts:
        told = partial(report_of, reward, part)
        old, new = _measured(reward, told, pictures, repeated, family)
        _check_others(f"{part.name}'s report", (old, new), repeated)
        figures["reports"][part.name] = {
            **_compared(part.report_name, old, new, seeds),
            "higher_is_better": part.report_higher_is_better,
        }
    figures["warnings"] = collapse_warnings(before, after)
    return figures, Pictures(repeated, before, after, scored[0], scored[1])


def base_pictures(
    family: Family,
    prompts: list[str],
    *,
    seeds: int,
    num_steps: int,
    guidance_scale: float | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> Tensor:
    """(P·S, 3, H, W) pictures of the base model, as `evaluate` makes them."""
    scale = family.default_guidance_scale if guidance_scale is None else guidance_scale
    nets, schedule = ModelNetworks(family, guidance=Guidance(scale)), family.schedule(num_steps)
    repeated = [prompt for prompt in prompts for _ in range(seeds)]
    noises = _noise_seeds(seed, len(prompts), seeds)
    sampler = Sampler(nets, schedule, base_plan(schedule))
    return sampler.draw(repeated, noises, batch_size=batch_size)


def try_out(reward: WeightedSum, prompts: list[str], family: Family) -> None:
    """Score two pictures of noise: a reward that cannot is told before hours of drawing.

    Raises:
        UserError: naming the reward that misbehaves.
    """
    two, side = prompts[:2], family.resolution
    images = torch.rand(len(two), 3, side, side, generator=generator(0, EVALUATION))
    with given_back(), reward.at_work(family.device):  # a user's may draw random numbers
        _in_batches(partial(_judged, reward), images, two, family)
        for part, _ in reward.parts:
            _in_batches(partial(report_of, reward, part), images, two, family)


def _measured(
    scorer: WeightedSum,
    measure: Callable[[Tensor, list[str]], Tensor],
    pictures: tuple[Tensor, Tensor],
    prompts: list[str],
    family: Family,
) -> tuple[Tensor, Tensor]:
    """What a scorer finds (P·S,) of base and tuned model's pictures."""
    with scorer.at_work(family.device):
        old, new = (_in_batches(measure, images, prompts, family) for images in pictures)
    return old, new


def _judged(reward: WeightedSum, images: Tensor, prompts: list[str]) -> Tensor:
    # Without a limit: a batch here is larger than in training, which `--reward-seconds` is for.
    return reward.combine(judge(reward, images, prompts, seconds=None))


def _noise_seeds(seed: int, prompts: int, noises: int) -> list[int]:
    return [sample_seed(seed, EVALUATION, i, j) for i in range(prompts) for j in range(noises)]


def scored_at_once(images: Tensor) -> int:
    """How many pictures (…, H, W) a reward sees together."""
    return 64 if images.shape[-1] <= SMALL else 8


@torch.no_grad()
def _in_batches(
    measure: Callable[[Tensor, list[str]], Tensor],
    images: Tensor,
    prompts: list[str],
    family: Family,
) -> Tensor:
    """A measure of many images, some at a time on the model's device; the result on the CPU."""
    size = scored_at_once(images)
    parts = [
        measure(images[i : i + size].to(family.device), prompts[i : i + size]).float().cpu()
        for i in range(0, len(images), size)
    ]
    return torch.cat(parts)


def _check_finite(name: str, scores: tuple[Tensor, Tensor], prompts: list[str]) -> None:
    for found, whose in zip(scores, ("base", "tuned"), strict=True):
        for score, prompt in zip(found.tolist(), prompts, strict=True):
            if not math.isfinite(score):
                raise NotFinite(
                    f"reward {name}: its score of the {whose} model's picture of {prompt!r} is "
                    f"{score}, not a finite number; mend the reward, or look at the picture",
                    tuned=whose == "tuned",
                )


def _check_others(name: str, scores: tuple[Tensor, Tensor], prompts: list[str]) -> None:
    """The same for what only is looked at: a mistake to be told, no failed trial of a rate."""
    try:
        _check_finite(name, scores, prompts)
    except NotFinite as error:
        raise UserError(str(error)) from None


def _compared(name: str, before: Tensor, after: Tensor, seeds: int) -> dict[str, Any]:
    """Means, their intervals over prompts, and the interval of the paired change."""
    old, new = (x.float().cpu().view(-1, seeds).mean(1) for x in (before, after))
    pick = generator(0, EVALUATION)
    return {
        "name": name,
        "before": float(old.mean()),
        "after": float(new.mean()),
        "before_interval": bootstrap_interval(old, pick)[1:],
        "after_interval": bootstrap_interval(new, pick)[1:],
        "change_interval": bootstrap_interval(new - old, pick)[1:],
    }


def watching(
    held_out: str | None, model: str, reward_model: str | None, device: torch.device | str
) -> WeightedSum | None:
    """The scorer that only measures: the given one, or the model's own, or none."""
    if held_out:
        return make_reward(held_out, reward_model, device)
    return held_out_scorer(model, device)


def evaluate_command(
    model: str | None,
    adapter: Path,
    reward: str | None,
    held_out: str | None,
    reward_model: str | None,
    prompts_path: Path | None,
    output_dir: Path,
    seeds: int,
    num_prompts: int,
    num_steps: int | None,
    guidance_scale: float | None,
    strength: float,
    precision: str,
    batch_size: int,
    plain_chain: bool,
    pipeline: str | None = None,
) -> None:
    """`shortft evaluate`: print the table, write evaluation.json and before_after.png.

    What is not given is the adapter's own: base model, reward, held-out scorer, and their models. A
    reward that is code runs only where it is given: an adapter from elsewhere could name any.
    """
    from rich.console import Console

    from shortft.adapter import read_info
    from shortft.drawing.progress import summary_table

    if seeds < 2:
        raise UserError(
            f"--seeds {seeds}: diversity compares pictures of one prompt; give 2 or more"
        )
    info = read_info(adapter)
    own, inherits = info.config, set[str]()
    if reward is None:
        reward = str(own.get("reward") or "clip")
        if not ships(reward):
            raise UserError(
                f"--reward: not given, and the adapter's own, {reward}, is none of shortft's: code "
                "runs only where it is named; give --reward"
            )
        inherits |= scorers(reward)
    if held_out is None and ships(str(own.get("held_out"))):
        held_out = str(own["held_out"])
        inherits |= scorers(held_out)
    used = scorers(reward) | (scorers(held_out) if held_out else set())
    check_models_are_used(used, reward_model)
    reward_model = with_inherited(reward_model, inherits, own.get("reward_model"))
    model, pipeline = info.base(model, pipeline)
    prompts = read_prompts(prompts_path) if prompts_path else prompts_for(model, "held_out")
    make_output_dir("--output-dir", output_dir)
    console = Console()
    told = emoji_clip_warning(used, reward_model)
    if told and model != EMBEDDED:
        console.print(f"warning: {told}", markup=False)
    family = load_family(model, pipeline=pipeline, precision=precision, resolution=info.resolution)
    family.encode_ahead(prompts[:num_prompts])  # the text encoders are not needed any more
    scored_by = make_reward(reward, reward_model, family.device)
    watched_by = watching(held_out, model, reward_model, family.device)
    with console.status("") as status, noting_cause(output_dir):
        figures, pictures = evaluate(
            family,
            adapter,
            scored_by,
            prompts[:num_prompts],
            seeds=seeds,
            num_steps=num_steps,
            guidance_scale=guidance_scale,
            strength=strength,
            batch_size=batch_size,
            held_out=watched_by,
            plain_chain=plain_chain,
            progress=lambda what: status.update(f"{len(prompts[:num_prompts])} prompts: {what}"),
        )
    write_atomic(output_dir / "evaluation.json", (json.dumps(figures, indent=2) + "\n").encode())
    draw_before_after(output_dir / "before_after.png", pictures, seeds)
    console.print(summary_table(figures))
    for warning in figures["warnings"]:
        console.print(f"warning: {warning}", markup=False)
    console.print(f"{output_dir}/evaluation.json, {output_dir}/before_after.png", markup=False)


def draw_before_after(path: Path, pictures: Pictures, seeds: int) -> None:
    """The first noise of up to 16 evenly spaced prompts, base above tuned."""
    from shortft.drawing.grids import before_after

    total = len(pictures.prompts) // seeds
    count = min(16, total)
    rows = [i * total // count * seeds for i in range(count)]
    before_after(
        path,
        pictures.before[rows],
        pictures.after[rows],
        [pictures.prompts[row] for row in rows],
        scores_before=pictures.scores_before[rows],
        scores_after=pictures.scores_after[rows],
    )
