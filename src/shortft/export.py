"""`shortft export`: an adapter in the layouts that other tools read.

Tools without timestep schedules get one plain LoRA that acts at every timestep: the stacked LoRAs
side by side, each weighted by the share of the steps at which it acts. What that costs in reward
is measured, not assumed.
"""

from __future__ import annotations

import gc
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diffusers import ConfigMixin
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from shortft.adapter import AdapterInfo, load_into, lora_file, read_info
from shortft.assets import prompts_for
from shortft.cause import noting_cause
from shortft.comfyui import workflow
from shortft.drawing.files import write_atomic
from shortft.errors import NotFinite, UserError, traceback_file
from shortft.families import load_family, open_pipeline
from shortft.families.base import Family, Guidance
from shortft.families.files import DEFAULTS_FILE
from shortft.inputs import make_output_dir, read_prompts
from shortft.lora_formats import kohya_state, write_plain_adapter
from shortft.model_card import card, header, public, run_figures, shareable
from shortft.networks import ModelNetworks
from shortft.plans import adapters_at
from shortft.quiet import quiet
from shortft.rewards import ships
from shortft.rewards.places import check_models_are_used
from shortft.rewards.spec import scorers
from shortft.schedule import segments
from shortft.space import check_space, size_of

Format = Literal["diffusers", "kohya", "comfyui", "merged"]
PLAIN = "plain.safetensors"
BYTES = {"fp32": 4, "bf16": 2}  # of one weight
SMALL_FILES = 50_000_000  # a pipeline's tokenizers and configurations


@dataclass(frozen=True)
class Loss:
    """What a plain LoRA loses: mean rewards of the base, with the schedule, and without it."""

    base: float
    scheduled: float
    plain: float

    def text(self) -> str:
        gain = self.scheduled - self.base
        told = gain > 0.001 * abs(self.base)  # below, the share is rounding
        kept = f", {100 * (self.plain - self.base) / gain:.0f} % of the gain" if told else ""
        return (
            f"reward on held-out prompts: base {self.base:.4f}, with the schedule "
            f"{self.scheduled:.4f}, as one plain LoRA {self.plain:.4f}{kept}"
        )


def measure_loss(
    family: Family,
    adapter: Path,
    plain: Path,
    info: AdapterInfo,
    prompts: list[str],
    reward_spec: str,
    reward_model: str | None,
    *,
    batch_size: int = 16,
) -> Loss:
    """Mean rewards of base, scheduled and plain adapter on the same prompts and noise."""
    from shortft.evaluate import base_pictures, evaluate, try_out
    from shortft.rewards import make_reward

    reward = make_reward(reward_spec, reward_model, str(family.device))
    try_out(reward, prompts, family)
    before = base_pictures(
        family,
        prompts,
        seeds=2,
        num_steps=info.num_steps,
        guidance_scale=info.guidance_scale,
        batch_size=batch_size,
    )
    figures = [
        evaluate(family, path, reward, prompts, seeds=2, before=before, batch_size=batch_size)[0][
            "reward"
        ]
        for path in (adapter, plain)
    ]
    return Loss(figures[0]["before"], figures[0]["after"], figures[1]["after"])


def export_command(
    adapter: Path,
    kind: Format,
    output_dir: Path,
    model: str | None,
    prompts_path: Path | None,
    num_prompts: int,
    measure: bool,
    reward: str | None = None,
    reward_model: str | None = None,
    pipeline: str | None = None,
    precision: str = "fp32",
    batch_size: int = 16,
) -> None:
    """`shortft export`: write the files and a card; print what a plain LoRA loses.

    Args:
        reward: what to measure by; the adapter's own if not given, unless that is code, which an
            adapter from elsewhere could name.

    Raises:
        UserError: if the adapter is damaged, or the folder holds something already.
    """
    from rich.console import Console

    earlier = output_dir / traceback_file()  # of a reward that has been mended since
    if output_dir.exists() and any(path != earlier for path in output_dir.iterdir()):
        raise UserError(f"--output-dir {output_dir}: is not empty; name another directory")
    info = read_info(adapter)
    if info.placement == "few_step":
        raise UserError(
            f"{adapter}: is a LoRA of the few-step model and means little on the base; use its "
            f"{lora_file(1)} (diffusers' layout) beside the few-step LoRA"
        )
    own_reward = str(info.config.get("reward", ""))
    if reward is not None or ships(own_reward):
        check_models_are_used(scorers(reward or own_reward), reward_model)
    base, pipeline = info.base(model, pipeline)
    try:
        states = [load_file(adapter / lora_file(n)) for n in range(1, info.loras + 1)]
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{adapter}: a LoRA cannot be read ({error}); restore it or train again"
        ) from error
    measures = (
        measure and info.placement != "everywhere" and (reward is not None or ships(own_reward))
    )
    needed = 3 * size_of(adapter)  # numbered, plain, and the plain one while it is measured
    check_space(output_dir, needed, "the export's files", "")
    make_output_dir("--output-dir", output_dir)
    earlier.unlink(missing_ok=True)
    console = Console()
    with console.status(f"loading {base}"):
        family = load_family(
            base,
            pipeline=pipeline,
            precision=precision,
            device=None if measures else "cpu",  # a mere conversion needs no GPU
            resolution=info.resolution,
        )
    if kind == "merged":
        needed += family.all_parameters * BYTES[precision] + SMALL_FILES
        remedy = "" if precision == "bf16" else "pass --precision bf16 for half of it, "
        check_space(output_dir, needed, "the export's files", remedy)
    # Whether it fits, before anything is written.
    load_into(ModelNetworks(family, guidance=Guidance(), loras=info.loras, rank=info.rank), adapter)
    # While its text encoders are there.
    zeros = kind == "comfyui" and _empty_is_zeros(family)
    name = adapter.resolve().parent.name or "shortft"
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix=".plain-", dir=output_dir) as made:
        scratch = Path(made)
        plain = write_plain_adapter(states, info, family, scratch)
        if info.placement == "everywhere":
            notes.append("It acts at every timestep: use it like any LoRA.")
        elif measure and not measures:
            notes.append(
                "What a plain LoRA loses was not measured: the adapter's reward "
                f"({public(own_reward, info.local)}) is none of shortft's own, and code runs only "
                "where it is named (--reward)."
            )
        elif measures:
            listed = _measured_on(info, prompts_path, num_prompts)
            family.encode_ahead(listed)  # the text encoders are not needed any more
            try:
                status = console.status(f"measuring on {len(listed)} held-out prompts")
                with status, noting_cause(output_dir):
                    loss = measure_loss(
                        family,
                        adapter,
                        scratch,
                        info,
                        listed,
                        reward or own_reward,
                        reward_model or info.config.get("reward_model"),
                        batch_size=batch_size,
                    )
                notes.append(f"{loss.text()}.")
            except NotFinite as error:
                told = str(error)
                for part in scorers(reward or own_reward):
                    told = told.replace(part, public(part))
                notes.append(f"What a plain LoRA loses could not be measured: {told}.")
        for note in notes:
            console.print(note, markup=False, highlight=False, soft_wrap=True)
        if kind == "merged":
            own = {"guidance_scale": info.guidance_scale, "resolution": family.resolution}
            del family  # one copy of the model at a time
            gc.collect()
            whole = open_pipeline(base, pipeline, precision)
            _write_merged(whole, public(base, info.local), scratch, output_dir)
            write_atomic(output_dir / DEFAULTS_FILE, (json.dumps(own) + "\n").encode())
            notes.append("The LoRA is merged into the denoiser; load it as a whole model.")
        else:
            notes += _write_loras(
                kind, states, info, plain, family, name, scratch, output_dir, zeros_for_empty=zeros
            )
    if kind == "diffusers":
        fields = json.dumps(vars(shareable(info)), indent=2) + "\n"
        write_atomic(output_dir / "adapter.json", fields.encode())
        notes.append(
            "`shortft.load_adapter(pipe, FOLDER)` routes the numbered LoRAs by timestep; "
            f"`pipe.load_lora_weights(FOLDER, weight_name='{PLAIN}')` loads the plain one."
        )
    files = sorted(p.name for p in output_dir.iterdir())
    figures = run_figures(adapter, info.config.get("guard"))
    text = card(info, kind, files, notes, figures)
    write_atomic(output_dir / "README.md", text.encode())
    written = ", ".join([*files, "README.md"])
    console.print(f"{output_dir}: {written}", markup=False, soft_wrap=True)


def _measured_on(info: AdapterInfo, prompts_path: Path | None, num_prompts: int) -> list[str]:
    """Evenly spaced prompts of the user's file, or of the model's held-out ones."""
    listed = (
        read_prompts(prompts_path) if prompts_path else prompts_for(info.base_model, "held_out")
    )
    count = min(num_prompts, len(listed))
    return [listed[i * len(listed) // count] for i in range(count)]


def _empty_is_zeros(family: Family) -> bool:
    """Whether a model is given zeros for the empty prompt, not its own encoding of it."""
    negative = family.encode([""]).negative
    return negative.numel() > 0 and not bool(negative.any())


def _write_loras(
    kind: Format,
    states: list[dict[str, Tensor]],
    info: AdapterInfo,
    plain: AdapterInfo,
    family: Family,
    name: str,
    scratch: Path,
    output_dir: Path,
    *,
    zeros_for_empty: bool,
) -> list[str]:
    """The numbered LoRAs and the plain one; for ComfyUI a workflow that schedules them."""

    def converted(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state if kind == "diffusers" else kohya_state(state, family)

    schedule = info.schedule(family.schedule(info.num_steps))
    names = []
    for number, state in enumerate(states, start=1):
        file = lora_file(number) if kind == "diffusers" else f"{name}-{number}.safetensors"
        fields = header(info, family, schedule, f"{name} {number}", info.rank)
        write_atomic(output_dir / file, save(converted(state), fields))
        names.append(file)
    whole = PLAIN if kind == "diffusers" else f"{name}-plain.safetensors"
    fields = header(info, family, schedule, name, plain.rank)
    write_atomic(output_dir / whole, save(converted(load_file(scratch / lora_file(1))), fields))
    if kind != "comfyui":
        return []
    stacked = adapters_at(segments(schedule, info.parts), info.placement)
    graph = workflow(
        family.name,
        schedule,
        stacked,
        names,
        info.guidance_scale,
        family.resolution,
        zeros_for_empty=zeros_for_empty,
    )
    write_atomic(output_dir / "workflow.json", (json.dumps(graph, indent=2) + "\n").encode())
    switched = "" if info.parts == 1 else "The hooks switch each LoRA on at its timesteps. "
    return [
        "Put the numbered files into ComfyUI's `models/loras`, load `workflow.json` (API format), "
        f"and choose your model and prompt. {switched}"
        "ComfyUI itself was not at hand when this was written: the workflow follows its nodes' "
        "declared inputs."
    ]


def _write_merged(pipe: Any, base: str, plain: Path, output_dir: Path) -> None:
    """A whole diffusers pipeline with the plain LoRA folded into its denoiser.

    Args:
        base: what its configurations say they come from, in place of a folder of this disk.
    """
    for part in (pipe, *pipe.components.values()):
        if isinstance(part, ConfigMixin) and "_name_or_path" in part.config:
            part.register_to_config(_name_or_path=base)
    with quiet():
        pipe.load_lora_weights(str(plain), weight_name=lora_file(1))
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        pipe.save_pretrained(output_dir)
