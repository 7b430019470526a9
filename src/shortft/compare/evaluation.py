"""What measures a finished run: the plain base chain, on the same prompts and noise for all."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from shortft.compare.jobs import SEARCH_SEED, Job, Workshop
from shortft.config import Config
from shortft.errors import NotFinite
from shortft.inputs import read_prompts
from shortft.methods.catalog import METHODS

if TYPE_CHECKING:
    from shortft.evaluate import Pictures
    from shortft.families.base import Family


def evaluator(
    workshop: Workshop, *, keeps: bool | None = None
) -> Callable[[Job, Config], dict[str, Any]]:
    """What measures a finished run; the base model's pictures are made once.

    Args:
        keeps: the model in memory between evaluations; if not given, unless it would take a GPU's
            memory from the runs.
    """
    import torch

    from shortft.doctor import versions
    from shortft.drawing.curves import read_metrics
    from shortft.evaluate import base_pictures, evaluate, watching
    from shortft.families import default_device, load_family
    from shortft.preflight import machine
    from shortft.rewards import make_reward

    base = workshop.base
    spec = workshop.comparison
    load = partial(
        load_family,
        base.model,
        pipeline=base.pipeline,
        precision=base.precision,
        resolution=base.resolution,
    )
    if keeps is None:
        keeps = default_device() == "cpu"
    kept = load() if keeps else None
    before: dict[bool, Any] = {}
    # Without gradient there is room for more than in training.
    at_once = max(1, min(16, 2 * base.batch_size // base.accumulation))

    def evaluate_run(job: Job, config: Config) -> dict[str, Any]:
        prompts = read_prompts(config.sample_from) if config.sample_from else []
        prompts = prompts[: spec.num_prompts]
        if kept is not None:
            return measure(kept, prompts, job, config)
        measured: dict[str, Any] = {}
        failed = None
        try:
            measured = measure(load_with(prompts), prompts, job, config)
        except NotFinite as error:  # whose traceback holds the model
            failed = NotFinite(str(error), tuned=error.tuned)
        gc.collect()
        torch.cuda.empty_cache()
        if failed is not None:
            raise failed
        return measured

    def load_with(prompts: list[str]) -> Family:
        family = load()
        family.encode_ahead(prompts)
        return family

    def measure(family: Family, prompts: list[str], job: Job, config: Config) -> dict[str, Any]:
        seed = SEARCH_SEED if job.search else 0
        if job.search not in before:
            before[job.search] = base_pictures(
                family,
                prompts,
                seeds=spec.noises,
                num_steps=config.num_steps,
                guidance_scale=config.guidance_scale,
                batch_size=at_once,
                seed=seed,
            )

        watched_by = watching(config.held_out, config.model, config.reward_model, family.device)

        def measured(*, plain_chain: bool) -> tuple[dict[str, Any], Pictures]:
            return evaluate(
                family,
                job.folder / "adapter",
                make_reward(job.reward, config.reward_model, family.device),
                prompts,
                seeds=spec.noises,
                num_steps=config.num_steps,
                batch_size=at_once,
                seed=seed,
                before=before[job.search],
                held_out=watched_by,
                plain_chain=plain_chain,
            )

        figures, pictures = measured(plain_chain=False)
        if METHODS[config.method].few_step and not job.search:
            figures["plain_chain"] = measured(plain_chain=True)[0]
        rows = read_metrics(job.folder / "metrics.jsonl")
        seconds = [row["seconds"] for row in rows.updates]
        if not job.search:
            from safetensors.torch import save_file

            shown = {"before": pictures.before[:: spec.noises][:8].contiguous()}
            shown["after"] = pictures.after[:: spec.noises][:8].contiguous()
            save_file(shown, job.folder / "pictures.safetensors")
        return {
            **figures,
            "updates": len(seconds),
            "training_seconds": sum(seconds),
            "seconds_per_update": sum(seconds) / max(1, len(seconds)),
            "peak_memory_bytes": max(row["peak_memory_bytes"] for row in rows.updates),
            "skipped": sum(bool(row["skipped"]) for row in rows.updates),
            "curve": [[row["at_seconds"], row["eval_reward"]] for row in rows.evaluations],
            "made_by": f"{versions()}; {machine.in_words()}",
        }

    return evaluate_run
