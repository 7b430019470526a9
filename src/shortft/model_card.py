"""What an export says about itself: the fields of its files' headers, and its README.md."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from shortft import __version__
from shortft.adapter import AdapterInfo
from shortft.drawing.curves import read_metrics
from shortft.families.base import Family
from shortft.methods.catalog import METHODS
from shortft.schedule import Schedule
from shortft.shortcuts import AUTO

# Settings that are worth telling and hold no place on the author's disk.
TOLD = (
    "method",
    "method_options",
    "reward",
    "updates",
    "minutes",
    "batch_size",
    "learning_rate",
    "rank",
    "segments",
    "timestep_lora",
    "num_steps",
    "shortcut",
    "precision",
    "resolution",
    "seed",
)
OF_SEGMENTS = ("segments", "shortcut")


def public(name: str, local_names: Sequence[str] = ()) -> str:
    """A model, reward or file without the folders of the author's disk; hub ids stay as they are.

    Of ``path/to/mine.py:warm`` the file's name and the function's stay.

    Args:
        local_names: what lay on the machine of the training, which may not be there any more.
    """
    local = name in local_names
    name = re.sub(r"[^,+]*/(?=[^/,]*\.py\s*:)", "", name)
    path = Path(name).expanduser()
    local |= path.is_absolute() or name.startswith((".", "~", "\\")) or path.exists()
    return path.name if local else name


def shareable(info: AdapterInfo) -> AdapterInfo:
    """``adapter.json`` as others may see it: settings without paths, models by name."""
    return replace(
        info,
        base_model=public(info.base_model, info.local),
        config=told_settings(info),
        local=[public(name, info.local) for name in info.local],
    )


def told_settings(info: AdapterInfo) -> dict[str, Any]:
    """The settings of `TOLD` that the run had."""
    config = info.config
    method = METHODS.get(config.get("method", ""))
    unused: tuple[str, ...] = ()
    if method is not None:
        unused += () if method.uses_segments else OF_SEGMENTS
        unused += () if method.by_segment else ("timestep_lora",)
        if config.get("shortcut") == AUTO:
            config = {**config, "shortcut": method.shortcut}
    told = [name for name in TOLD if name not in unused and config.get(name) not in (None, {})]
    settings = {name: config[name] for name in told}
    return {
        name: public(value, info.local) if name in ("reward", "shortcut") else value
        for name, value in settings.items()
    }


def base_names(family: Family, schedule: Schedule) -> tuple[str, str]:
    """How kohya's scripts call a base model, and its architecture by Stability AI's model spec."""
    config: Any = family.denoiser.config
    if family.name == "sd":
        if config.cross_attention_dim != 1024:
            return "sd_v1", "stable-diffusion-v1"
        v = schedule.prediction_type == "v_prediction"
        return ("sd_v2_v", "stable-diffusion-v2-768-v") if v else ("sd_v2", _V2)
    if family.name == "sdxl":
        return "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"
    if family.name == "sd3":
        if config.dual_attention_layers:
            return "sd3", "stable-diffusion-3-5-medium"
        return "sd3", f"stable-diffusion-3-{'5-large' if config.num_layers >= 38 else 'm'}"
    if family.name == "flux2":  # as ai-toolkit and musubi-tuner call them
        size = "9b" if config.num_attention_heads >= 32 else "4b"
        return f"flux2_klein_{size}", f"Flux.2-klein-{size}"
    return "flux1", f"flux-1-{'dev' if config.guidance_embeds else 'schnell'}"


_V2 = "stable-diffusion-v2-512"


def header(
    info: AdapterInfo, family: Family, schedule: Schedule, title: str, rank: int
) -> dict[str, str]:
    """The fields of a LoRA file's header that tools show and sort by."""
    base, architecture = base_names(family, schedule)
    settings = told_settings(info)
    fields = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "ss_base_model_version": base,
        "ss_v2": str(base.startswith("sd_v2")),
        "ss_sd_model_name": public(info.base_model, info.local),
        "ss_output_name": title,
        "ss_training_comment": f"shortft {settings.get('method')}: {settings.get('reward')}",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.resolution": f"{family.resolution}x{family.resolution}",
        "modelspec.description": f"Reward LoRA ({settings.get('reward')}), made by shortft",
        "modelspec.date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }
    if schedule.prediction_type != "flow":
        v = schedule.prediction_type == "v_prediction"
        fields["modelspec.prediction_type"] = "v" if v else "epsilon"
    return fields


def run_figures(adapter: Path, guard: str | None = None) -> list[str]:
    """What the run's log says about its fixed pictures, as lines; none where there is no log.

    Args:
        adapter: a folder of the run; of ``best``, and where ``guard: stop`` went back to it, the
            figures are those of the best evaluation, else those of the last.
    """
    adapter = adapter.resolve()
    log = adapter.parent / "metrics.jsonl"
    if not log.is_file():
        return []
    metrics = read_metrics(log)
    lines = []
    if metrics.updates:
        seconds = sum(float(row.get("seconds", 0)) for row in metrics.updates)
        lines.append(f"- {len(metrics.updates)} updates, {seconds / 60:.1f} minutes of training")
    best = [row for row in metrics.evaluations if row.get("best")]
    went_back = guard == "stop" and any("guard" in row for row in metrics.evaluations[-1:])
    looks = best if adapter.name == "best" or went_back else metrics.evaluations
    for key, name in (("eval_reward", "reward"), ("eval_held_out", "held-out scorer")):
        # A score that was not finite is null in the log.
        measured = [row for row in metrics.evaluations if row.get(key) is not None]
        of_adapter = [row for row in looks if row.get(key) is not None]
        if measured and of_adapter:
            first, last = measured[0], of_adapter[-1]
            if last is not first:
                lines.append(
                    f"- {name} on fixed prompts: {first[key]:.4f} at update {first['update']}, "
                    f"{last[key]:.4f} at update {last['update']}"
                )
    return lines


def card(
    info: AdapterInfo,
    kind: str,
    files: Sequence[str],
    notes: Sequence[str],
    figures: Sequence[str] = (),
) -> str:
    """README.md of an export: what it is, how it was made, and how it is used."""
    base = public(info.base_model, info.local)
    settings: Mapping[str, Any] = told_settings(info)
    hub = (
        [f"base_model: {base.partition('@')[0]}"] if re.fullmatch(r"[\w.-]+/[\w.@-]+", base) else []
    )
    lines = [
        "---",
        *hub,
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        "tags: [lora, text-to-image, shortft]",
        "---",
        f"# {settings.get('reward', 'reward')} LoRA for {base}",
        "",
        f"Trained by shortft {__version__} ({kind} export). Guidance scale "
        f"{info.guidance_scale:g}, {info.num_steps} steps.",
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in settings.items()),
        "",
        *(["Of the run:", "", *figures, ""] if figures else []),
        "Files: " + ", ".join(f"`{name}`" for name in files) + ".",
        "",
        *(line for note in notes for line in (note, "")),
        f"Licence: a LoRA is used under the licence of its base model ({base}); look there, and at "
        "the licences of the reward's models, before you share or sell anything made with it.",
    ]
    return "\n".join(lines) + "\n"
