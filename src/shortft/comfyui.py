"""A timestep schedule as a ComfyUI workflow: LoRA hooks with keyframes (API format)."""

from __future__ import annotations

from typing import Any

from shortft.adapter import AdapterInfo

Graph = dict[str, dict[str, Any]]


def keyframes(info: AdapterInfo, number: int, total: int) -> list[tuple[float, float]]:
    """When LoRA `number` is switched: (start as a share of sampling, strength), in order.

    ComfyUI's share p stands for training timestep (1 - p)·(total - 1). A switch lies half-way
    between the steps that it separates, so that a sampler whose timesteps are a little off is
    routed alike.
    """
    last = total - 1
    step = total / info.num_steps
    frames: list[tuple[float, float]] = []
    active = [t for t, count in zip(info.timesteps, info.stacked, strict=True) if count >= number]
    stretches: list[tuple[float, float]] = []  # from a higher timestep to a lower one
    for timestep in active:
        if stretches and stretches[-1][1] - timestep <= 1.5 * step:
            stretches[-1] = (stretches[-1][0], timestep)
        else:
            stretches.append((timestep, timestep))
    for first, low in stretches:
        begin = 1 - (first + step / 2) / last
        if first >= total - 1.5 * step:  # from the first step on; a keyframe holds for one at least
            frames.append((0.0, 1.0))
        else:
            if not frames:
                frames.append((0.0, 0.0))
            frames.append((round(begin, 3), 1.0))
        end = 1 - (low - step / 2) / last
        if end < 1:
            frames.append((round(end, 3), 0.0))
    return frames


def workflow(info: AdapterInfo, files: list[str], total: int) -> Graph:
    """A text-to-image workflow in which every LoRA acts at its own timesteps.

    Args:
        files: names of the LoRA files 1…k in ComfyUI's `models/loras`.
        total: T, the training timesteps.
    """
    graph: Graph = {}

    def node(kind: str, **inputs: Any) -> list[Any]:
        graph[str(len(graph) + 1)] = {"class_type": kind, "inputs": inputs}
        return [str(len(graph)), 0]

    checkpoint = node("CheckpointLoaderSimple", ckpt_name="CHOOSE-YOUR-CHECKPOINT.safetensors")
    model, clip, vae = checkpoint, [checkpoint[0], 1], [checkpoint[0], 2]
    hooks: list[Any] | None = None
    for number, file in enumerate(files, start=1):
        frame: list[Any] | None = None
        for start, strength in keyframes(info, number, total):
            more = {} if frame is None else {"prev_hook_kf": frame}
            frame = node("CreateHookKeyframe", strength_mult=strength, start_percent=start, **more)
        own = node("CreateHookLoraModelOnly", lora_name=file, strength_model=1.0)
        own = node("SetHookKeyframes", hooks=own, hook_kf=frame)
        hooks = own if hooks is None else node("CombineHooks2", hooks_A=hooks, hooks_B=own)
    sides = []
    for text in ("YOUR PROMPT", ""):
        encoded = node("CLIPTextEncode", clip=clip, text=text)
        sides.append(
            node(
                "ConditioningSetProperties",
                cond_NEW=encoded,
                strength=1.0,
                set_cond_area="default",
                opt_hooks=hooks,
            )
        )
    latents = node("EmptyLatentImage", width=512, height=512, batch_size=1)
    samples = node(
        "KSampler",
        model=model,
        positive=sides[0],
        negative=sides[1],
        latent_image=latents,
        seed=0,
        steps=info.num_steps,
        cfg=info.guidance_scale,
        sampler_name="ddim",
        scheduler="ddim_uniform",
        denoise=1.0,
    )
    images = node("VAEDecode", samples=samples, vae=vae)
    node("SaveImage", images=images, filename_prefix="shortft")
    return graph
