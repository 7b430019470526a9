"""A trained adapter inside an ordinary diffusers pipeline: LoRAs that are switched by timestep."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from torch import nn

from shortft.adapter import AdapterInfo, lora_file, read_info
from shortft.errors import UserError
from shortft.networks import lora_layers, lora_name
from shortft.plans import adapters_at
from shortft.quiet import quiet
from shortft.schedule import cut

ROUTER = "_shortft_router"  # attribute of a denoiser


def denoiser_of(pipe: Any) -> Any:
    """A diffusers pipeline's denoiser: its transformer or its U-Net."""
    return pipe.components.get("transformer") or pipe.components["unet"]


class TimestepRouter:
    """Switches LoRAs by timestep inside a diffusers pipeline, until `remove` is called.

    At every call of the denoiser it looks up how many LoRAs act at that timestep of the
    pipeline's own schedule, so that any number of inference steps works that leaves no segment
    empty. Pipelines that share the denoiser must share the scheduler object as well, and run one
    after the other. Other adapters are the pipeline's business, also those that come or are
    switched later; `pipe.disable_lora()` switches these off as well, and
    `pipe.unload_lora_weights()` ends the routing. What was disabled before stays inactive.
    """

    def __init__(
        self,
        pipe: Any,
        info: AdapterInfo,
        strength: float,
        disabled: Mapping[LoraLayer, list[str]] | None = None,
    ) -> None:
        """Begin to route.

        Args:
            disabled: layers whose LoRAs were switched off before, with those that were chosen in
                them: `remove` gives them back so.
        """
        self._disabled = disabled or {}
        self.info = info
        self.strength = strength
        self._pipe = pipe
        self._names = [lora_name(n) for n in range(1, info.loras + 1)]
        self._routes: dict[tuple[float, ...], dict[float, int]] = {}
        self._denoiser = denoiser_of(pipe)
        names = set(self._names)
        self._layers = [m for m in lora_layers(self._denoiser) if names & m.lora_A.keys()]
        self._active = 0
        before = getattr(self._denoiser, ROUTER, None)
        if before is not None:  # its LoRAs were unloaded by the pipeline
            before.end()
        setattr(self._denoiser, ROUTER, self)
        self._hook = self._denoiser.register_forward_pre_hook(self._route, with_kwargs=True)
        self._switch(0)

    def _route(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not set(self._names) <= getattr(module, "peft_config", {}).keys():
            self.end()
            return
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        value = timestep.flatten()[0].item() if isinstance(timestep, torch.Tensor) else timestep
        counts, scheduler = self._counts(), self._pipe.scheduler
        # Some networks are told a fraction of the training time, and half precision rounds it.
        total = scheduler.config.num_train_timesteps

        def off(visited: float) -> float:
            return min(abs(value - visited), abs(value * total - visited))

        visited = min(counts, key=off)
        # Rounded, close steps look alike: a scheduler that counts its steps knows which one it is.
        step = getattr(scheduler, "step_index", None)
        if step is not None and step < len(scheduler.timesteps):
            counted = float(scheduler.timesteps[step])
            visited = counted if off(counted) <= total / 200 else visited
        if off(visited) > total / 200:
            raise RuntimeError(
                f"the denoiser was called at timestep {value}, which is not in the pipeline's "
                f"schedule {list(counts)}: the LoRAs cannot be routed"
            )
        self._switch(counts[visited])

    def _counts(self) -> dict[float, int]:
        """LoRAs per timestep, from the timesteps that the pipeline's scheduler visits now."""
        scheduler, info = self._pipe.scheduler, self.info
        total = scheduler.config.num_train_timesteps
        unset = scheduler.timesteps is None or len(scheduler.timesteps) == total
        if unset and getattr(scheduler, "num_inference_steps", None) is None:
            raise RuntimeError(
                "the pipeline that load_adapter was given has not set its scheduler's steps; "
                "pipelines that share its denoiser must share its scheduler object too"
            )
        # PNDM visits a timestep twice.
        times = tuple(dict.fromkeys(float(t) for t in scheduler.timesteps))
        if times not in self._routes:
            config = scheduler.config
            flow = "FlowMatch" in type(scheduler).__name__ or bool(config.get("use_flow_sigmas"))
            k = 1 if info.placement == "few_step" else info.parts
            parts = cut(times, k, info.cut(flow=flow), total)
            counts = adapters_at(parts, info.placement)
            self._routes[times] = dict(zip(times, counts, strict=True))
        return self._routes[times]

    def _switch(self, count: int) -> None:
        """Let the first LoRAs act, beside whatever else is active in their layers."""
        own, changed = self._names[:count], False
        for layer in self._layers:
            if layer.merged:
                raise RuntimeError(
                    "a LoRA was fused into the denoiser after load_adapter, so that the adapter "
                    "cannot act; call pipe.unfuse_lora(), or fuse it before load_adapter"
                )
            active = list(layer.active_adapters)
            others = [name for name in active if name not in self._names]
            wanted = others + [name for name in own if name in layer.lora_A]
            if active != wanted:
                layer.set_adapter(wanted)
                changed = True
            for name in wanted[len(others) :]:
                layer.set_scale(name, self.strength)
        if changed:
            self._denoiser.requires_grad_(False)
        self._active = count

    def set_strength(self, strength: float) -> None:
        """Scale the adapter: 0 is the base model, 1 the trained strength."""
        self.strength = strength

    def end(self) -> None:
        """Stop routing; LoRAs that are still there stay as they are."""
        self._hook.remove()
        self._layers = []
        if getattr(self._denoiser, ROUTER, None) is self:
            delattr(self._denoiser, ROUTER)

    def remove(self) -> None:
        """Take the LoRAs and the routing out of the pipeline again."""
        if getattr(self._denoiser, ROUTER, None) not in (None, self):
            return  # they were unloaded, and another adapter's took their place
        for layer in lora_layers(self._denoiser):  # the pipeline may have put them anywhere
            others = [name for name in layer.active_adapters if name not in self._names]
            if list(layer.active_adapters) != others:
                layer.set_adapter(others)
        self._denoiser.requires_grad_(False)
        self.end()
        self._pipe.delete_adapters(self._names)
        for layer, active in self._disabled.items():
            if not layer.active_adapters and set(active) <= set(layer.lora_A):  # as they were left
                layer.set_adapter(active)
                layer.enable_adapters(False)
        self._denoiser.requires_grad_(False)


def load_adapter(pipe: Any, path: str | Path, *, strength: float = 1.0) -> TimestepRouter:
    """Load an adapter into a diffusers pipeline and route it by timestep.

    Args:
        pipe: a pipeline of the family that the adapter was trained on. With the training's number
            of steps and size, and DDIM, Euler's steps (SDXL) or flow matching's, its pictures are
            those of `shortft sample`; another scheduler takes other steps, and the LoRAs act at the
            ends of the same segments of them.
        path: the adapter directory written by ``shortft train``.
        strength: scale of the LoRAs; 1 as trained.

    Returns:
        The router; its `set_strength` and `remove` act on the pipeline.

    Raises:
        UserError: if the adapter is damaged, was made for another architecture, one is loaded
            already, or the pipeline's attention is fused.
    """
    directory = Path(path)
    info = read_info(directory)
    names = [lora_name(n) for n in range(1, info.loras + 1)]
    denoiser = denoiser_of(pipe)
    if set(names) & set(getattr(denoiser, "peft_config", {})):
        raise UserError(f"{directory}: the pipeline holds an adapter already; remove() it first")
    if _fused(denoiser):
        raise UserError(
            f"{directory}: the pipeline's attention is fused (fuse_qkv_projections), which passes "
            "LoRAs by; call pipe.unfuse_qkv_projections() first"
        )
    for number in range(1, info.loras + 1):
        _check_fit(pipe, directory / lora_file(number), info)
    before = {
        layer: (list(layer.active_adapters), layer.disable_adapters)
        for layer in lora_layers(denoiser)
    }
    for number, name in enumerate(names, start=1):
        try:
            with quiet(), torch.random.fork_rng(devices=[]):
                pipe.load_lora_weights(
                    str(directory), weight_name=lora_file(number), adapter_name=name
                )
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            half_loaded = set(names) & set(getattr(denoiser, "peft_config", {}))
            if half_loaded:
                pipe.delete_adapters(sorted(half_loaded))
            for layer, (active, disabled) in before.items():
                layer.set_adapter(active)
                layer.enable_adapters(not disabled)
            denoiser.requires_grad_(False)
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"{directory / lora_file(number)}: does not fit this pipeline ({reason}); the "
                f"adapter was trained on {info.base_model}"
            ) from error
    for layer in lora_layers(denoiser):  # loading made the last one the only one
        active, disabled = before.get(layer, ([], False))
        layer.enable_adapters(True)
        layer.set_adapter([] if disabled else active)
    off = {layer: active for layer, (active, disabled) in before.items() if disabled}
    return TimestepRouter(pipe, info, strength, off)


def _fused(denoiser: Any) -> bool:
    """Whether attention runs on copies of its layers."""
    kinds = [type(processor).__name__ for processor in denoiser.attn_processors.values()]
    parts = [m for m in denoiser.modules() if isinstance(m, AttentionModuleMixin)]
    return any("Fused" in kind for kind in kinds) or any(m.fused_projections for m in parts)


def _check_fit(pipe: Any, file: Path, info: AdapterInfo) -> None:
    """Whether the denoiser has every layer of a LoRA file: diffusers leaves out what it lacks.

    Raises:
        UserError: if not.
    """
    denoiser = denoiser_of(pipe)
    part = "transformer" if pipe.components.get("transformer") is denoiser else "unet"
    try:
        with safe_open(str(file), "pt") as opened:
            names = opened.keys()
            shapes = {name: opened.get_slice(name).get_shape() for name in names}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{file}: damaged ({error}); copy the adapter again, or train again"
        ) from error
    for key, shape in shapes.items():
        path, _, side = key.removeprefix(f"{part}.").rpartition(".lora_")
        try:
            found: Any = denoiser.get_submodule(path) if key.startswith(f"{part}.") else None
            layer = found.get_base_layer() if isinstance(found, LoraLayer) else found
            outer, inner = shape[:2]
            fits = inner == layer.in_features if side[0] == "A" else outer == layer.out_features
        except (AttributeError, ValueError, IndexError):
            fits = False
        if not fits:
            raise UserError(
                f"{file}: does not fit this pipeline, whose {part} has no such layer "
                f"({key}); the adapter was trained on {info.base_model}"
            )
