"""`shortft demo`: the whole job on the embedded model, measured on held-out prompts."""

from __future__ import annotations

import json
import time
from pathlib import Path

from shortft.assets import EMBEDDED, prompts_for
from shortft.cause import noting_cause
from shortft.config import load_config
from shortft.errors import UserError
from shortft.memory import peak_memory_bytes

NUM_PROMPTS, SEEDS = 48, 2
MARKER = ".shortft-demo"  # tells a demo's folder, which a new demo may clear, from a real run's


def demo(output_dir: Path, reward: str | None, minutes: float | None, seed: int) -> None:
    """Train, evaluate, draw; writes summary.json, before_after.png, curves.png and the run.

    Raises:
        UserError: if output_dir already holds something else than an earlier demo.
    """
    from rich.console import Console

    from shortft.drawing.curves import draw_curves, read_metrics
    from shortft.drawing.files import write_atomic
    from shortft.drawing.progress import summary_table
    from shortft.evaluate import draw_before_after, evaluate
    from shortft.families import load_family
    from shortft.precision import settled
    from shortft.recipes import recipe
    from shortft.rewards import held_out_scorer, make_reward
    from shortft.train import train

    console = Console()
    began = time.monotonic()
    settings = recipe("emoji")
    settings |= {"output_dir": str(output_dir), "seed": seed}
    if reward is not None:
        settings["reward"] = reward
    if minutes is not None:
        settings |= {"minutes": minutes, "updates": None}
    config = load_config(None, settings)
    clear_earlier_demo(output_dir)
    console.print(f"Aligning the embedded model with reward {config.reward!r} by {config.method}")
    adapter = train(config)

    log = read_metrics(output_dir / "metrics.jsonl").updates
    family = load_family(EMBEDDED, precision=settled(config).precision)
    scored_by = make_reward(config.reward, config.reward_model, family.device)
    listed = prompts_for(EMBEDDED, "held_out")
    prompts = [listed[i * len(listed) // NUM_PROMPTS] for i in range(NUM_PROMPTS)]
    with console.status("") as status, noting_cause(output_dir):
        figures, pictures = evaluate(
            family,
            adapter,
            scored_by,
            prompts,
            seeds=SEEDS,
            num_steps=config.num_steps,
            held_out=held_out_scorer(EMBEDDED, family.device),
            progress=lambda what: status.update(f"{len(prompts)} held-out prompts: {what}"),
        )
    training = sum(row["seconds"] for row in log)
    summary = {
        **figures,
        "updates": len(log),
        "seconds": time.monotonic() - began,
        "training_seconds": training,
        "seconds_per_update": training / max(1, len(log)),
        "peak_memory_bytes": peak_memory_bytes(),
    }
    write_atomic(output_dir / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    draw_before_after(output_dir / "before_after.png", pictures, SEEDS)
    draw_curves(
        output_dir / "metrics.jsonl",
        output_dir / "curves.png",
        title=f"{config.method} on {config.model}",
        reward_name=config.reward,
    )
    console.print(summary_table(summary))
    for warning in figures["warnings"]:
        console.print(f"warning: {warning}", markup=False)
    console.print(
        f"Look at {output_dir}/before_after.png and {output_dir}/curves.png", markup=False
    )


def clear_earlier_demo(output_dir: Path) -> None:
    """Mark the folder as a demo's, and remove what an earlier demo wrote, nothing else.

    Raises:
        UserError: if the folder holds files but no demo.
    """
    import shutil

    if not output_dir.exists() or not any(output_dir.iterdir()):
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / MARKER).touch()
        return
    if not (output_dir / MARKER).exists():
        raise UserError(f"--output-dir {output_dir}: is not empty and no demo; name another folder")
    for name in ("checkpoints", "samples", "adapter", "tensorboard"):
        shutil.rmtree(output_dir / name, ignore_errors=True)
    for name in ("summary.json", "before_after.png", "curves.png", "metrics.jsonl", "config.yaml"):
        (output_dir / name).unlink(missing_ok=True)
