"""A timestep schedule as a ComfyUI workflow: LoRA hooks with keyframes (API format).

Nodes and their inputs are those that ComfyUI's nodes.py, nodes_hooks.py, nodes_model_advanced.py,
nodes_custom_sampler.py and nodes_flux.py declare; ``tests/comfyui_nodes.py`` lists them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from shortft.schedule import Schedule

Graph = dict[str, dict[str, Any]]
Link = list[Any]
CHOOSE = "CHOOSE-{}.safetensors"
FLUX2_SHIFT = math.exp(2.02)  # of ComfyUI's FLUX.2, whatever steps Flux2Scheduler gives it


def shares(schedule: Schedule, shift: float | None = None) -> list[float]:
    """Where each step lies for ComfyUI: 0 at the start of sampling, 1 at its end.

    Share p stands for training timestep (1 - p)·(T - 1), and for flow matching for the sigma that
    1 - p becomes by the shift (`percent_to_sigma` of ComfyUI's model_sampling.py).

    Args:
        shift: of the model in ComfyUI, where it is not the schedule's.
    """
    if schedule.prediction_type != "flow":
        last = schedule.train_timesteps - 1
        return [1 - t / last for t in schedule.timesteps.tolist()]
    shift = shift or schedule.shift
    return [1 - s / (shift - (shift - 1) * s) for s in schedule.sigma[:-1].tolist()]


def keyframes(places: Sequence[float], active: Sequence[bool]) -> list[tuple[float, float]]:
    """When a LoRA is switched: (start as a share of sampling, strength), in order.

    A switch lies half-way between the steps that it separates, so that a sampler whose steps are
    a little off is routed alike.

    Args:
        places: of all steps, see `shares`.
        active: at which of them the LoRA acts.
    """
    frames = [(0.0, float(active[0]))]
    for i in range(1, len(active)):
        if active[i] != active[i - 1]:
            frames.append((round((places[i - 1] + places[i]) / 2, 4), float(active[i])))
    return frames


class Builder:
    """Collects nodes; `add` returns the link to a node's first output."""

    def __init__(self) -> None:
        self.graph: Graph = {}

    def add(self, kind: str, **inputs: Any) -> Link:
        self.graph[str(len(self.graph) + 1)] = {"class_type": kind, "inputs": inputs}
        return [str(len(self.graph)), 0]


def workflow(
    family: str,
    schedule: Schedule,
    stacked: Sequence[int],
    files: Sequence[str],
    guidance_scale: float,
    resolution: int,
    *,
    zeros_for_empty: bool = False,
) -> Graph:
    """A text-to-image workflow in which every LoRA acts at its own timesteps.

    Args:
        family: "sd", "sdxl", "sd3", "flux" or "flux2"; what ComfyUI loads and samples with
            follows it.
        schedule: the chain of the adapter.
        stacked: how many LoRAs act at each of its steps.
        files: names of the LoRA files 1…k in ComfyUI's `models/loras`.
        resolution: height and width of the pictures.
        zeros_for_empty: the empty prompt is zeros for the model, not what its text encoders make of
            no text, as for SDXL.
    """
    build = Builder()
    model, clip, vae = _load(build, family, schedule, resolution)
    places = shares(schedule, FLUX2_SHIFT if family == "flux2" else None)
    hooks = _hooks(build, places, stacked, files)
    sides = []
    for text in ("YOUR PROMPT", ""):
        encoded = build.add("CLIPTextEncode", clip=clip, text=text)
        if family == "flux" and text:
            encoded = build.add("FluxGuidance", conditioning=encoded, guidance=guidance_scale)
        if zeros_for_empty and not text:
            encoded = build.add("ConditioningZeroOut", conditioning=encoded)
        sides.append(
            build.add(
                "ConditioningSetProperties",
                cond_NEW=encoded,
                strength=1.0,
                set_cond_area="default",
                hooks=hooks,
            )
        )
    sample = _sample_flux2 if family == "flux2" else _sample
    samples = sample(build, family, schedule, (model, *sides), guidance_scale, resolution)
    images = build.add("VAEDecode", samples=samples, vae=vae)
    build.add("SaveImage", images=images, filename_prefix="shortft")
    return build.graph


def _sample(
    build: Builder,
    family: str,
    schedule: Schedule,
    inputs: tuple[Link, ...],
    guidance_scale: float,
    resolution: int,
) -> Link:
    """Latents of a picture; inputs: model, prompt, empty prompt."""
    model, positive, negative = inputs
    flow = schedule.prediction_type == "flow"
    latents = build.add(
        "EmptySD3LatentImage" if flow else "EmptyLatentImage",
        width=resolution,
        height=resolution,
        batch_size=1,
    )
    return build.add(
        "KSampler",
        model=model,
        positive=positive,
        negative=negative,
        latent_image=latents,
        seed=0,
        steps=schedule.num_steps,
        cfg=1.0 if family == "flux" else guidance_scale,
        sampler_name="euler" if flow else "ddim",
        # With these each takes the steps of the family's own schedule.
        scheduler={"flux": "simple", "sd3": "normal"}.get(family, "ddim_uniform"),
        denoise=1.0,
    )


def _sample_flux2(
    build: Builder,
    family: str,
    schedule: Schedule,
    inputs: tuple[Link, ...],
    guidance_scale: float,
    resolution: int,
) -> Link:
    """The same for FLUX.2, whose shift by the number of steps only its own scheduler node knows."""
    model, positive, negative = inputs
    size = {"width": resolution, "height": resolution}
    return build.add(
        "SamplerCustomAdvanced",
        noise=build.add("RandomNoise", noise_seed=0),
        guider=build.add(
            "CFGGuider", model=model, positive=positive, negative=negative, cfg=guidance_scale
        ),
        sampler=build.add("KSamplerSelect", sampler_name="euler"),
        sigmas=build.add("Flux2Scheduler", steps=schedule.num_steps, **size),
        latent_image=build.add("EmptyFlux2LatentImage", batch_size=1, **size),
    )


def _load(
    build: Builder, family: str, schedule: Schedule, resolution: int
) -> tuple[Link, Link, Link]:
    """Model, text encoders and decoder, with the family's shift of the schedule."""
    if family == "flux2":
        return (
            build.add("UNETLoader", unet_name=CHOOSE.format("FLUX2-MODEL"), weight_dtype="default"),
            build.add("CLIPLoader", clip_name=CHOOSE.format("QWEN3"), type="flux2"),
            build.add("VAELoader", vae_name=CHOOSE.format("FLUX2-VAE")),
        )
    if family == "flux":
        model = build.add(
            "UNETLoader", unet_name=CHOOSE.format("FLUX-MODEL"), weight_dtype="default"
        )
        clip = build.add(
            "DualCLIPLoader",
            clip_name1=CHOOSE.format("T5XXL"),
            clip_name2=CHOOSE.format("CLIP-L"),
            type="flux",
        )
        vae = build.add("VAELoader", vae_name=CHOOSE.format("FLUX-VAE"))
        # FLUX.1-schnell has no shift: both ends 0. The node finds mu by the number of tokens.
        low, high = (0.5, 1.15) if schedule.shift != 1 else (0.0, 0.0)
        model = build.add(
            "ModelSamplingFlux",
            model=model,
            max_shift=high,
            base_shift=low,
            width=resolution,
            height=resolution,
        )
        return model, clip, vae
    model = build.add("CheckpointLoaderSimple", ckpt_name=CHOOSE.format("YOUR-CHECKPOINT"))
    clip, vae = [model[0], 1], [model[0], 2]
    if family == "sd3":
        model = build.add("ModelSamplingSD3", model=model, shift=round(schedule.shift, 2))
    return model, clip, vae


def _hooks(
    build: Builder, places: Sequence[float], stacked: Sequence[int], files: Sequence[str]
) -> Link | None:
    """All LoRAs' hooks, each with its keyframes, as one."""
    hooks: Link | None = None
    for number, file in enumerate(files, start=1):
        frame: Link | None = None
        for start, strength in keyframes(places, [count >= number for count in stacked]):
            before = {} if frame is None else {"prev_hook_kf": frame}
            frame = build.add(
                "CreateHookKeyframe", strength_mult=strength, start_percent=start, **before
            )
        own = build.add("CreateHookLoraModelOnly", lora_name=file, strength_model=1.0)
        own = build.add("SetHookKeyframes", hooks=own, hook_kf=frame)
        hooks = own if hooks is None else build.add("CombineHooks2", hooks_A=hooks, hooks_B=own)
    return hooks
